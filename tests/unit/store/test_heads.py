"""What a path's root is, told by the head of its NAR where nobody has a listing."""

from __future__ import annotations

import asyncio
import bz2
import contextlib
import gzip
import hashlib
import json
import lzma
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import brotli
import lz4.frame
import pytest
import zstandard

from tests.support.faulty_http import FaultyServer, RangeIgnored
from tests.support.signed_cache import MadePath, SignedCache, make_path
from tests.support.store_bench import Bench, run
from veneer.cache.index import NarState, PathRow, TreeState
from veneer.formats.nar import nar_of, nar_size, tree_of_nar
from veneer.formats.tree_index import Kind
from veneer.model.errors import FormatError, TruncatedError, VeneerError
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath
from veneer.model.tree import Directory, Node, RegularFile, Symlink
from veneer.sources.base import Meter, unmetered
from veneer.store import heads
from veneer.store.account import Account
from veneer.store.trees import HEADS
from veneer.store.views import View

SIZE = 3_000_001
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "zstd": zstandard.ZstdCompressor(level=3).compress,
    "xz": lambda data: lzma.compress(data, preset=1),
    "gzip": gzip.compress,
    "br": lambda data: brotli.compress(data, quality=1),
    "lz4": lz4.frame.compress,
}


@pytest.fixture(scope="module")
def directory() -> MadePath:
    return make_path("directory", SIZE)


def path_of(name: str, node: Node, data: bytes) -> MadePath:
    nar = b"".join(nar_of(node, lambda _: [data]))
    part = hashlib.sha256(name.encode()).hexdigest()[:32].replace("e", "z")
    return MadePath(StorePath(part, name), nar, tree_of_nar([nar]), data)


def file_path(name: str, *, executable: bool = False) -> MadePath:
    data = hashlib.shake_128(name.encode()).digest(SIZE)
    return path_of(name, RegularFile(SIZE, executable=executable, offset=0), data)


def unlisted(place: Path, *paths: MadePath, compression: str = "zstd") -> SignedCache:
    return SignedCache(place / "cache", paths, compression=compression, listings=False)


async def root_of(
    bench: Bench, cache: SignedCache | str, made: MadePath, *more: str, key: str = ""
) -> PathRow:
    url, key = (cache, key) if isinstance(cache, str) else (cache.url, cache.key)
    return await bench.store.lookup(
        bench.view(url, *more, keys=(key,)), made.path, bench.account, root_only=True
    )


@pytest.mark.parametrize("compression", ["none", "zstd", "xz"])
def test_a_directory_costs_its_head_and_its_tree_comes_with_the_nar(
    tmp_path: Path, directory: MadePath, compression: str
) -> None:
    cache = unlisted(tmp_path, directory, compression=compression)

    async def body(bench: Bench) -> None:
        row = await root_of(bench, cache, directory)
        assert bench.store.is_bare(row)
        assert row.nar is NarState.NONE
        assert bench.account.wire_bytes < heads.ENCODED + 2000
        whole = await bench.store.lookup(
            bench.view(cache.url, keys=(cache.key,)), directory.path, bench.account
        )
        assert (whole.number, whole.tree, whole.nar) == (row.number, TreeState.CHECKED, NarState.WHOLE)
        assert bench.condemned == []
        assert not bench.store.is_bare(await root_of(bench, cache, directory))

    run(tmp_path, body)


@pytest.mark.parametrize("executable", [False, True])
def test_the_head_of_a_file_tells_its_whole_tree(tmp_path: Path, executable: bool) -> None:
    made = file_path("file", executable=executable)
    cache = unlisted(tmp_path, made)

    async def body(bench: Bench) -> None:
        row = await root_of(bench, cache, made)
        assert (row.tree, row.nar) == (TreeState.LISTED, NarState.NONE)
        root = bench.tree(row.number).entry(0)
        assert (root.kind, root.size) == (Kind.EXECUTABLE if executable else Kind.FILE, SIZE)
        shown = bench.cache.trees.path(row.number).read_bytes()
        view = bench.view(cache.url, keys=(cache.key,))
        assert (await bench.store.whole(view, made.path, bench.account)).tree is TreeState.CHECKED
        assert bench.cache.trees.path(row.number).read_bytes() == shown

    run(tmp_path, body)


def test_what_was_shown_is_known_to_the_next_daemon_however_this_one_ends(
    tmp_path: Path, directory: MadePath
) -> None:
    cache = unlisted(tmp_path, directory)

    async def body(bench: Bench) -> None:
        row = await root_of(bench, cache, directory)
        with contextlib.closing(sqlite3.connect(bench.cache.root / "index.sqlite")) as other:
            assert other.execute("SELECT number FROM directories").fetchall() == [(row.number,)]

    run(tmp_path, body)


def test_the_answer_is_remembered(tmp_path: Path, directory: MadePath) -> None:
    cache = unlisted(tmp_path, directory)
    numbers = []

    async def body(bench: Bench) -> None:
        numbers.append((await root_of(bench, cache, directory)).number)
        cache.nar("directory").unlink(missing_ok=True)
        numbers.append((await root_of(bench, cache, directory)).number)

    run(tmp_path, body)
    run(tmp_path, body)  # after a restart
    assert len(set(numbers)) == 1


def test_small_nars_and_those_of_unknown_size_are_read_whole(tmp_path: Path, directory: MadePath) -> None:
    small = make_path("small")
    cache = unlisted(tmp_path, small)
    unsized = SignedCache(tmp_path / "unsized", [directory], compression="zstd", sized=False, listings=False)

    async def body(bench: Bench) -> None:
        for made, of in ((small, cache), (directory, unsized)):
            row = await root_of(bench, of, made)
            assert (row.tree, row.nar) == (TreeState.CHECKED, NarState.WHOLE)

    run(tmp_path, body)


def test_a_server_without_ranges_is_read_whole(
    tmp_path: Path, directory: MadePath, faulty_http: Callable[[Path], FaultyServer]
) -> None:
    cache = unlisted(tmp_path, directory)
    server = faulty_http(cache.directory)
    server.fail("/nar/*", RangeIgnored())

    async def body(bench: Bench) -> None:
        row = await root_of(bench, server.url, directory, key=cache.key)
        assert (row.tree, row.nar) == (TreeState.CHECKED, NarState.WHOLE)

    run(tmp_path, body)


def test_a_head_that_cannot_be_read_is_told_and_another_source_asked(
    tmp_path: Path, directory: MadePath
) -> None:
    good = unlisted(tmp_path, directory)
    bad = SignedCache(tmp_path / "bad", [directory], compression="zstd", listings=False, secret=good.secret)
    bad.nar("directory").write_bytes(b"x" * bad.nar("directory").stat().st_size)

    async def body(bench: Bench) -> None:
        row = await root_of(bench, bad.url, directory, good.url, key=good.key)
        assert (bench.store.is_bare(row), row.nar) == (True, NarState.NONE)
        assert str(bad.directory) in bench.stories()

    run(tmp_path, body)


def test_a_file_that_was_shown_as_a_directory_lives_on_under_another_number(
    tmp_path: Path, directory: MadePath
) -> None:
    """And no head is believed any more, nor a listing."""
    made = file_path("file")
    cache = unlisted(tmp_path, made)
    right = cache.nar("file").read_bytes()
    lie = zstandard.ZstdCompressor().compress(directory.nar)[: len(right)]
    cache.nar("file").write_bytes(lie)

    async def body(bench: Bench) -> None:
        shown = await root_of(bench, cache, made)
        assert bench.store.is_bare(shown)
        cache.nar("file").write_bytes(right)
        view = bench.view(cache.url, keys=(cache.key,))
        row = await bench.store.lookup(view, made.path, bench.account)
        assert bench.condemned == [(shown.number, made.path)]
        assert not bench.cache.index.is_directory(shown.number)
        assert row.number != shown.number
        assert row.tree is TreeState.CHECKED
        assert bench.tree(row.number).entry(0).kind is Kind.FILE
        bench.cache.trees.drop(row.number)
        bench.cache.nars.drop(row.number)
        cache.nar("file").write_bytes(lie)
        with pytest.raises(VeneerError):  # it was read whole
            await root_of(bench, cache, made)

    run(tmp_path, body)


def test_a_listing_that_contradicts_what_was_shown_is_not_believed(
    tmp_path: Path, directory: MadePath
) -> None:
    cache = unlisted(tmp_path, directory)
    listing = cache.directory / f"{directory.path.hash_part}.ls"

    async def body(bench: Bench) -> None:
        shown = await root_of(bench, cache, directory)
        size = len(directory.nar) - nar_size(RegularFile(0, executable=False, offset=0))
        listing.write_text(json.dumps({"version": 1, "root": {"type": "regular", "size": size}}))
        other = SignedCache(tmp_path / "other", [directory], listings=False, secret=cache.secret)
        (other.directory / listing.name).write_bytes(listing.read_bytes())
        view = bench.view(other.url, keys=(cache.key,))
        row = await bench.store.lookup(view, directory.path, bench.account)
        assert (row.number, row.tree, row.nar) == (shown.number, TreeState.CHECKED, NarState.WHOLE)
        assert bench.condemned == []
        assert "not a directory" in bench.stories()

    run(tmp_path, body)


class Held:
    """Heads of this view's first source wait until ``go``."""

    def __init__(self, view: View) -> None:
        self.asked: asyncio.Queue[None] = asyncio.Queue()
        self.go = asyncio.Event()
        self.begun = self.most = 0
        source = view.chain.sources[0]
        self._part, source.part = source.part, self._held  # type: ignore[method-assign]

    async def _held(
        self, info: UnverifiedPathInfo, offset: int, size: int, meter: Meter = unmetered
    ) -> bytes:
        self.begun += 1
        self.most = max(self.most, self.begun)
        self.asked.put_nowait(None)
        await self.go.wait()
        self.begun -= 1
        return await self._part(info, offset, size, meter)


def test_an_ordinary_lookup_beside_it_gets_the_tree_and_the_head_comes_too_late(
    tmp_path: Path, directory: MadePath
) -> None:
    cache = unlisted(tmp_path, directory)

    async def body(bench: Bench) -> None:
        view = bench.view(cache.url, keys=(cache.key,))
        held = Held(view)
        first = asyncio.create_task(bench.store.lookup(view, directory.path, bench.account, root_only=True))
        await held.asked.get()
        assert bench.store.owners == {view.identity}
        second = await bench.store.lookup(view, directory.path, Account())
        assert second.tree is TreeState.CHECKED
        held.go.set()
        assert await first == second
        await asyncio.sleep(0)
        assert bench.store.owners == set()
        assert not bench.cache.index.is_directory(second.number)

    run(tmp_path, body)


def test_no_head_is_asked_for_while_the_nar_comes(tmp_path: Path, directory: MadePath) -> None:
    cache = unlisted(tmp_path, directory)

    async def body(bench: Bench) -> None:
        view = bench.view(cache.url, keys=(cache.key,))
        held = Held(view)
        whole = asyncio.create_task(bench.store.whole(view, directory.path, bench.account))
        for _ in range(10_000):
            if bench.store.fetcher.busy:
                break
            await asyncio.sleep(0)
        row = await bench.store.lookup(view, directory.path, Account(), root_only=True)
        assert row.tree is TreeState.CHECKED
        assert held.asked.empty()
        await whole

    run(tmp_path, body)


def test_heads_are_asked_for_some_at_a_time(tmp_path: Path) -> None:
    paths = [make_path(f"path-{n}", heads.LARGE) for n in range(HEADS + 4)]
    cache = unlisted(tmp_path, *paths, compression="none")

    async def body(bench: Bench) -> None:
        view = bench.view(cache.url, keys=(cache.key,))
        held = Held(view)
        looking = [
            asyncio.create_task(bench.store.lookup(view, made.path, bench.account, root_only=True))
            for made in paths
        ]
        for _ in range(HEADS):
            await held.asked.get()
        for _ in range(100):
            await asyncio.sleep(0)
        held.go.set()
        rows = await asyncio.gather(*looking)
        assert all(bench.store.is_bare(row) for row in rows)
        assert held.most == HEADS

    run(tmp_path, body)


def test_a_head_that_is_too_short_or_of_another_size_is_not_used(
    tmp_path: Path, directory: MadePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = file_path("file")
    cache = unlisted(tmp_path, made, directory)
    right = cache.nar("file").read_bytes()
    longer = path_of("file", RegularFile(SIZE + 8, executable=False, offset=0), made.data + bytes(8))
    cache.nar("file").write_bytes(zstandard.ZstdCompressor().compress(longer.nar)[: len(right)])

    async def body(bench: Bench) -> None:
        with pytest.raises(VeneerError):  # the whole NAR is not that one either
            await root_of(bench, cache, made)
        assert "NarSize" in bench.stories()
        monkeypatch.setattr(heads, "ENCODED", 10)
        row = await root_of(bench, cache, directory)
        assert (row.tree, row.nar) == (TreeState.CHECKED, NarState.WHOLE)

    run(tmp_path, body)


def test_the_head_of_another_build_of_the_path_does_not_count(tmp_path: Path, directory: MadePath) -> None:
    cache = unlisted(tmp_path, directory)
    build = path_of("other", RegularFile(SIZE, executable=False, offset=0), bytes(SIZE))
    other = SignedCache(
        tmp_path / "other", [replace(build, path=directory.path)], listings=False, secret=cache.secret
    )
    cache.nar("directory").unlink()

    async def body(bench: Bench) -> None:
        with pytest.raises(VeneerError):
            await root_of(bench, cache.url, directory, other.url, key=cache.key)
        number = bench.cache.index.path_of(directory.path, cache.infos["directory"].nar_hash)
        assert number is not None and not bench.cache.trees.has(number.number)

    run(tmp_path, body)


def test_a_directory_whose_files_are_lost_is_bare_again(tmp_path: Path, directory: MadePath) -> None:
    cache = unlisted(tmp_path, directory)

    async def body(bench: Bench) -> None:
        view = bench.view(cache.url, keys=(cache.key,))
        row = await bench.store.lookup(view, directory.path, bench.account)
        bench.cache.nars.drop(row.number)
        bench.cache.trees.path(row.number).unlink()  # and nobody noticed
        again = await root_of(bench, cache, directory)
        assert (again.number, bench.store.is_bare(again)) == (row.number, True)

    run(tmp_path, body)


@pytest.mark.parametrize("compression", PACKERS)
@pytest.mark.parametrize(
    ("node", "data"),
    [
        (Directory(((b"a", RegularFile(300_000, executable=False, offset=0)),)), b"x" * 300_000),
        (RegularFile(300_000, executable=True, offset=0), b"y" * 300_000),
        (Symlink(b"t" * 4095), b""),
    ],
    ids=["directory", "file", "link"],
)
def test_a_head_cut_anywhere_tells_the_root_or_nothing(compression: str, node: Node, data: bytes) -> None:
    made = path_of("x", node, data)
    packed = PACKERS[compression](made.nar)
    root = Directory(()) if isinstance(made.tree, Directory) else made.tree
    told = 0
    for end in [*range(min(len(packed), 600)), len(packed) // 2, len(packed)]:
        try:
            found = heads._root(compression, packed[:end])
        except TruncatedError:
            continue
        assert found is None or found == root
        told += found is not None
    assert told


def test_an_unknown_compression_is_an_error_and_bzip2_tells_nothing_before_its_first_block() -> None:
    with pytest.raises(FormatError):
        heads._root("rar", b"x")
    noise = hashlib.shake_128(b"noise").digest(1 << 20)
    made = path_of("x", RegularFile(len(noise), executable=False, offset=0), noise)
    with pytest.raises(TruncatedError):
        heads._root("bzip2", bz2.compress(made.nar)[: heads.ENCODED])
