"""Reading store paths without a mount: links, misses, and a cache that changes underneath."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import pytest

from veneer.cli.client import Client
from veneer.cli.demo_cache import Content, File, Link, tree_of
from veneer.cli.ls import describe, entries
from veneer.cli.reader import StoreReader
from veneer.formats.nar import nar_of, nar_size
from veneer.formats.tree_index import encode_tree, nar_file, tree_file
from veneer.model.errors import CacheError, NotFoundError, UsageError, VeneerError

A = "0000000000000000000000000000000a-tools"
B = "0000000000000000000000000000000b-data"
TOOLS: Content = {
    "bin": {
        "tool": File(b"#!tool", executable=True),
        "alias": Link("tool"),
        "far": Link(f"/nix/store/{B}/share/text"),
        "up": Link("../../" + B),
        "out": Link("/etc/passwd"),
        "loop": Link("loop"),
        "store": Link("/nix/store/"),
    },
    "lib": Link("bin"),
}
DATA: Content = {"share": {"text": File(b"text" * 1000), "empty": File(b"")}}


class FakeStore:
    """A cache directory and a client that publishes into it when it is asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths: dict[str, tuple[int, Content]] = {A: (1, TOOLS), B: (2, DATA)}
        self.asked: list[str] = []
        self.on_control: Callable[[str, int], None] = lambda verb, number: None

    def control(self, verb: str, arguments: Mapping[str, object]) -> dict[str, object]:
        self.asked.append(verb)
        name = str(arguments["path"])
        if name not in self.paths:
            raise NotFoundError("no source has it")
        number, content = self.paths[name]
        tree, read = tree_of(content)
        if verb == "tree":
            digest = {"path_number": number, "generation": bytes(16), "nar_hash": bytes(32)}
            self._write(tree_file(number), bytes(encode_tree(tree, nar_size=nar_size(tree), **digest)))  # type: ignore[arg-type]
        else:
            self._write(nar_file(number), b"".join(nar_of(tree, read)))
        self.on_control(verb, number)
        return {"number": number}

    def _write(self, name: str, data: bytes) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_bytes(data)


@pytest.fixture
def store(tmp_path: Path) -> FakeStore:
    return FakeStore(tmp_path)


def reader_of(store: FakeStore) -> StoreReader:
    return StoreReader(cast(Client, store), store.root)


def read(store: FakeStore, *path: str) -> bytes:
    reader = reader_of(store)
    return b"".join(reader.content(*reader.resolve([part.encode() for part in path], follow=True)))


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ((A, "bin", "tool"), b"#!tool"),
        ((A, "bin", "alias"), b"#!tool"),
        ((A, "lib", "alias"), b"#!tool"),
        ((A, "bin", "far"), b"text" * 1000),
        ((A, "bin", "up", "share", "text"), b"text" * 1000),
        ((A, "bin", "..", ".", "", "bin", "tool"), b"#!tool"),
        ((B, "share", "empty"), b""),
    ],
)
def test_files_are_read_through_links_and_across_store_paths(
    store: FakeStore, path: tuple[str, ...], data: bytes
) -> None:
    assert read(store, *path) == data


@pytest.mark.parametrize(
    ("path", "kind", "what"),
    [
        ((A, "bin", "missing"), NotFoundError, "no such file"),
        ((A, "bin", "tool", "below"), NotFoundError, "no such file"),
        ((A.replace("a-", "c-"),), NotFoundError, "no source has it"),
        ((A, "bin", "out"), VeneerError, "leads out of the store"),
        ((A, "bin", "loop"), VeneerError, "too many links"),
        ((A, "bin", "store"), UsageError, "store directory itself"),
        ((A, ".."), UsageError, "store directory itself"),
    ],
)
def test_what_cannot_be_reached_says_why(
    store: FakeStore, path: tuple[str, ...], kind: type[VeneerError], what: str
) -> None:
    with pytest.raises(kind, match=what):
        read(store, *path)


def test_a_listing_asks_for_no_content(store: FakeStore) -> None:
    reader = reader_of(store)
    held, entry = reader.resolve([A.encode()], follow=True)
    tree = reader.tree(held)
    rows = [describe(tree, found, name) for name, found in entries(tree, entry, recursive=True)]
    assert [row["name"] for row in rows] == [
        "bin", "bin/alias", "bin/far", "bin/loop", "bin/out", "bin/store", "bin/tool", "bin/up", "lib",
    ]  # fmt: skip
    assert rows[6] == {"name": "bin/tool", "type": "regular", "size": 6, "executable": True}
    assert rows[8] == {"name": "lib", "type": "symlink", "target": "bin"}
    assert store.asked == ["tree"]


def test_a_listed_file_is_its_own_only_row(store: FakeStore) -> None:
    reader = reader_of(store)
    held, entry = reader.resolve([A.encode(), b"bin", b"tool"], follow=True)
    assert [name for name, _ in entries(reader.tree(held), entry, recursive=True)] == [b"tool"]


def test_content_evicted_before_it_was_opened_is_asked_for_again(store: FakeStore) -> None:
    gone = [True]

    def evict(verb: str, number: int) -> None:
        if verb == "content" and gone:
            gone.pop()
            (store.root / nar_file(number)).unlink()

    store.on_control = evict
    assert read(store, A, "bin", "tool") == b"#!tool"


def test_a_cache_that_drops_everything_is_an_error(store: FakeStore) -> None:
    store.on_control = lambda verb, number: (store.root / tree_file(number)).unlink()
    with pytest.raises(CacheError):
        read(store, A, "bin", "tool")


def test_a_tree_that_was_not_that_of_the_nar_is_read_again(store: FakeStore) -> None:
    reader = reader_of(store)
    found = reader.resolve([A.encode(), b"bin", b"tool"], follow=True)
    store.paths[A] = (3, {"bin": {"more": File(b"1234567"), "tool": File(b"#!real")}})
    assert b"".join(reader.content(*found)) == b"#!real"
