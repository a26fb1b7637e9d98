"""Listings: offsets, limits, encodings. Listings of real Nix are in tests/golden."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable

import brotli
import pytest
import zstandard

from veneer.formats import listing
from veneer.formats.listing import MAX_SIZE, decode_listing_bytes, parse_listing, write_listing
from veneer.formats.nar import nar_size, with_offsets
from veneer.model.errors import FormatError, LimitError
from veneer.model.tree import MAX_DEPTH, Directory, Node, RegularFile, Symlink

TREE = with_offsets(
    Directory(
        (
            (b'"quoted"\\\n\x01', RegularFile(1, False, 0)),
            (b"bin", Directory(((b"x", RegularFile(10, True, 0)),))),
            (b"empty", Directory(())),
            (b"link", Symlink("zü".encode())),
            ("\U0001f600".encode(), RegularFile(0, False, 0)),
        )
    )
)
SIZE = nar_size(TREE)


def listed(root: object, version: object = 1) -> bytes:
    return json.dumps({"version": version, "root": root}).encode()


def file(**fields: object) -> dict[str, object]:
    return {"type": "regular", "size": 3, **fields}


def folder(**entries: object) -> dict[str, object]:
    return {"type": "directory", "entries": entries}


def nested(depth: int, inner: Node) -> Node:
    for _ in range(depth):
        inner = Directory(((b"d", inner),))
    return inner


def test_what_is_written_is_read_back() -> None:
    assert parse_listing(write_listing(TREE), nar_size=SIZE) == TREE


def test_offsets_are_written_whatever_the_tree_says() -> None:
    assert write_listing(RegularFile(3, True, 7)) == (
        b'{"root":{"executable":true,"narOffset":128,"size":3,"type":"regular"},"version":1}'
    )


@pytest.mark.parametrize(
    "fields", [{}, {"narOffset": None}, {"narOffset": 96}, {"executable": False}, {"unknown": [{}]}]
)
def test_absent_offsets_are_computed(fields: dict[str, object]) -> None:
    assert parse_listing(listed(file(**fields)), nar_size=120) == RegularFile(3, False, 96)


def test_entries_in_any_order_are_sorted_by_bytes() -> None:
    data = listed(
        {"entries": {"é": file(), "\U0001f600": file(), "z": file(), "Z": file()}, "type": "directory"}
    )
    tree = parse_listing(data, nar_size=None)
    assert isinstance(tree, Directory)
    assert [name.decode() for name, _ in tree.entries] == ["Z", "z", "é", "\U0001f600"]
    assert tree == with_offsets(tree)


@pytest.mark.parametrize("offset", [0, 95, 97, -1, 1 << 70])
def test_offsets_that_are_not_canonical_are_refused(offset: int) -> None:
    with pytest.raises(FormatError, match="narOffset"):
        parse_listing(listed(file(narOffset=offset)), nar_size=None)


def test_a_tree_of_another_nar_is_refused() -> None:
    with pytest.raises(FormatError, match="NarSize is 128"):
        parse_listing(listed(file()), nar_size=128)


@pytest.mark.parametrize(
    "root",
    [
        None,
        [],
        {},
        {"type": "fifo"},
        {"type": "directory"},
        {"type": "directory", "entries": []},
        {"type": "symlink"},
        {"type": "symlink", "target": ""},
        {"type": "symlink", "target": "a\0"},
        {"type": "symlink", "target": "a" * 4096},
        {"type": "regular"},
        file(size=-1),
        file(size=1.5),
        file(size="3"),
        file(size=1 << 63),
        file(size=(1 << 63) - 1),
        file(executable=1),
        folder(**{"": file()}),
        folder(**{".": file()}),
        folder(**{"..": file()}),
        folder(**{"a/b": file()}),
        folder(**{"a\0": file()}),
        folder(**{"ä" * 128: file()}),
    ],
)
def test_impossible_trees_are_refused(root: object) -> None:
    with pytest.raises(FormatError):
        parse_listing(listed(root), nar_size=None)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"{}",
        b'{"version":1}',
        listed(file(), 2),
        listed(file(), "1"),
        listed(file())[:-1],
        listed(file()) + b"x",
        b'{"root":{"type":"symlink","target":"\xff"},"version":1}',
        b'{"root":{"type":"symlink","target":"\\ud800"},"version":1}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_other_data_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        parse_listing(data, nar_size=None)


def test_a_huge_listing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MAX_SIZE", 1000)
    with pytest.raises(LimitError):
        parse_listing(b" " * 1001, nar_size=None)
    monkeypatch.setattr(listing, "MAX_ENTRIES", 2)
    with pytest.raises(LimitError):
        parse_listing(listed(folder(a=file(), b=file())), nar_size=None)


@pytest.mark.parametrize("depth", [100, 1000, MAX_DEPTH])
def test_deep_trees_are_read(depth: int) -> None:
    tree = nested(
        depth, Directory((("ü\\".encode(), RegularFile(3, True, 0)), ("ü{}".encode(), Symlink(b"\xc3\xbc"))))
    )
    if depth == MAX_DEPTH:
        tree = nested(depth, RegularFile(3, True, 0))
    data = write_listing(tree)
    assert write_listing(parse_listing(data, nar_size=nar_size(tree))) == data
    spaced = data.replace(b'":', b'" : ').replace(b'{"', b'\n{\t"').replace(b',"', b' ,\r\n"')
    assert write_listing(parse_listing(spaced, nar_size=None)) == data


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 100_000])
def test_deeper_trees_are_refused_not_crashed_on(depth: int) -> None:
    with pytest.raises(LimitError):
        parse_listing(write_listing(nested(depth, RegularFile(0, False, 0))), nar_size=None)


@pytest.mark.parametrize(
    "inner",
    [
        b"",
        b"1",
        b"{}",
        b'{"type":"regular"}',
        b'{"type":"regular","size":-1}',
        b'{"type":"regular","size":1,}',
        b'{"type":"regular" "size":1}',
        b'{"type":"regular","size":1,"size":1}',
        b'{"type":"regular","size":tru}',
        b'{"type":"regular","size":1,"x":{}}',
        b'{"type":"directory"}',
        b'{"type":"directory","entries":1}',
        b'{"type":"directory","entries":{"a":1}}',
        b'{"type":"directory","entries":{1:1}}',
        b'{"type":"symlink","target":"\\q"}',
        b'{"type":"symlink","target":"\xff"}',
        b'{"type":"symlink","target":"open}',
        b'{"type":"symlink","target":"x"}}',
    ],
)
def test_deep_trees_are_checked_as_others_are(inner: bytes) -> None:
    marker = b'{"target":"marker","type":"symlink"}'
    data = write_listing(nested(700, Symlink(b"marker")))
    assert marker in data
    with pytest.raises(FormatError):
        parse_listing(data.replace(marker, inner), nar_size=None)
    with pytest.raises(FormatError):
        parse_listing(data + b"x", nar_size=None)


def test_names_that_are_not_utf8_cannot_be_written() -> None:
    with pytest.raises(FormatError, match="UTF-8"):
        write_listing(Directory(((b"\xff", Symlink(b"x")),)))
    with pytest.raises(FormatError, match="UTF-8"):
        write_listing(Symlink(b"\xff"))


ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "brotli": brotli.compress,
    "zstd": zstandard.compress,
    "xz": lzma.compress,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
}


@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("data", [b"{}", b" \n{}", write_listing(TREE), b'{"a":1}' * 100_000], ids=len)
def test_every_encoding_is_recognised(encode: Callable[[bytes], bytes], data: bytes) -> None:
    assert decode_listing_bytes(encode(data), MAX_SIZE) == data
    assert decode_listing_bytes(encode(data), len(data)) == data


@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
def test_bombs_are_refused(encode: Callable[[bytes], bytes]) -> None:
    bomb = encode(b"{" + bytes(10_000_000))
    for limit in (1000, 9_999_999, 10_000_000):
        with pytest.raises(LimitError):
            decode_listing_bytes(bomb, limit)


@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
def test_cut_listings_are_refused_in_the_end(encode: Callable[[bytes], bytes]) -> None:
    data = encode(write_listing(TREE))
    for cut in range(len(data)):
        with pytest.raises(FormatError):
            parse_listing(decode_listing_bytes(data[:cut], 10_000), nar_size=SIZE)


@pytest.mark.parametrize("name", ["xz", "gzip", "bzip2"])
def test_garbage_after_the_end_is_refused(name: str) -> None:
    with pytest.raises(FormatError):
        decode_listing_bytes(ENCODERS[name](b"{}") + b"garbage", 100)
