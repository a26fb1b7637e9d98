"""NARs in parts where several things happen at once, or not in the usual order: no holes, nothing unchecked, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.caches import open_cache, read_ready
from tests.support.damage import flip
from tests.support.published_cache import PublishedCache
from tests.support.signed_cache import MadePath, SignedCache, make_path
from tests.support.store_bench import Bench, run, settled
from veneer.cache.chunk_maps import ChunkMap
from veneer.cache.index import NarState
from veneer.cache.sparse import SparseNar
from veneer.daemon.compose import build_view
from veneer.formats.chunk_map import parse_chunk_map, place_chunks, write_chunk_map
from veneer.model.errors import CacheFullError, HashMismatchError
from veneer.mount.content import Contents
from veneer.sources.base import RangesUnsupportedError
from veneer.sources.object_store import ObjectStoreSource
from veneer.store import chunk_fetch, parts
from veneer.store.account import Account
from veneer.store.chunk_finder import ChunkFinder
from veneer.store.resolve import Candidate
from veneer.store.views import View, ViewConfig

USER_ID = 12345
WRONG = 1_500_000


@pytest.fixture(scope="module")
def more(big: MadePath) -> MadePath:
    return make_path("more", len(big.data) + 8)


@pytest.fixture
def cache(tmp_path: Path, big: MadePath, more: MadePath) -> PublishedCache:
    return PublishedCache(tmp_path / "published", [big, more])


@pytest.fixture
def good(tmp_path: Path, big: MadePath) -> SignedCache:
    return SignedCache(tmp_path / "good", [big])


@pytest.fixture
def evil(tmp_path: Path, big: MadePath, good: SignedCache) -> SignedCache:
    """With the same key; the byte at WRONG is another one."""
    cache = SignedCache(tmp_path / "evil", [big], secret=good.secret)
    flip(cache.nar("big"), WRONG)
    return cache


class Gate:
    """Holds requests for parts whose (source URL, offset) ``holds`` says until ``open`` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, holds: Callable[[str, int], bool]) -> None:
        self.open = asyncio.Event()
        self.held = asyncio.Event()
        part = ObjectStoreSource.part

        async def gated(
            source: ObjectStoreSource, info: object, offset: int, size: int, meter: object
        ) -> bytes:
            if holds(source.url, offset):
                self.held.set()
                await self.open.wait()
            return await part(source, info, offset, size, meter)  # type: ignore[arg-type]

        monkeypatch.setattr(ObjectStoreSource, "part", gated)


async def only_tasks(prefix: str, count: int) -> None:
    """Until no more than ``count`` tasks of that name are left."""
    while sum(t.get_name().startswith(prefix) for t in asyncio.all_tasks()) > count:  # noqa: ASYNC110 - they tell nobody
        await asyncio.sleep(0.01)


def test_who_loads_waits_for_what_a_reader_took_over(
    tmp_path: Path, cache: PublishedCache, big: MadePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_fetch, "REQUEST", 1)

    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        last = parse_chunk_map(cache.chunk_map("big").read_bytes()).chunks[-1]
        gate = Gate(monkeypatch, lambda _, offset: offset == last.compressed_offset)
        loading = asyncio.create_task(bench.store.load(view, big.path, [(0, len(big.nar))], Account()))
        await asyncio.sleep(0)
        reading = asyncio.create_task(bench.read(view, row, last.offset, 10))
        await gate.held.wait()
        await only_tasks("part of", 1)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not loading.done()
        gate.open.set()
        assert await reading == big.nar[last.offset : last.offset + 10]
        await loading
        await settled()
        assert bench.nar(row.number) == big.nar

    run(tmp_path, body)


def test_what_deferred_readers_saw_is_not_checked_before_all_of_it_is_here(
    tmp_path: Path, big: MadePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader takes a chunk over from the rest that is fetched behind him."""
    monkeypatch.setattr(chunk_fetch, "REQUEST", 1)
    cache = SignedCache(tmp_path / "none", [big])
    last = len(big.nar) // (256 << 10) * (256 << 10)

    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big, verify="deferred")
        gate = Gate(monkeypatch, lambda _, offset: offset == last)
        await bench.read(view, row, 2_000_000, 100)
        await asyncio.sleep(0)
        reading = asyncio.create_task(bench.read(view, row, last, 10))
        await gate.held.wait()
        await only_tasks("part of", 1)
        rest = next(t for t in asyncio.all_tasks() if t.get_name().startswith("rest of"))
        assert not (await asyncio.wait({rest}, timeout=0.3))[0]
        gate.open.set()
        assert await reading == big.nar[last : last + 10]
        await settled()
        assert bench.condemned == [] and bench.state(row) is NarState.WHOLE

    run(tmp_path, body)


@contextmanager
def place_of_another_user() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="sparse-"))
    try:
        if os.getuid() == 0:
            os.chown(place, USER_ID, USER_ID)
        yield place
    finally:
        shutil.rmtree(place)


def test_an_ordinary_user_goes_on_with_a_sparse_nar() -> None:
    chunks = place_chunks([(10, 100, bytes(32)), (10, 100, bytes(32))])
    with place_of_another_user() as place:
        child = os.fork()
        if not child:
            status = 1
            try:
                if os.getuid() == 0:
                    os.setgroups([])
                    os.setgid(USER_ID)
                    os.setuid(USER_ID)
                nar = SparseNar(place / "a", 1, chunks, None)
                nar.write(0, b"x" * 100)
                nar.finish()
                again = SparseNar(place / "a", 1, chunks, b"\x01\x00")
                again.write(1, b"y" * 100)
                status = 0 if os.pread(again.fileno, 200, 0) == b"x" * 100 + b"y" * 100 else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_parts_keep_to_the_caches_limit(
    tmp_path: Path, cache: PublishedCache, big: MadePath, more: MadePath
) -> None:
    async def body(bench: Bench) -> None:
        view = bench.view(cache.url, keys=(cache.key,))
        rows = [await bench.looked_up(view, made) for made in (big, more)]
        bench.cache.max_bytes = 1_000_000 + sum(row.tree_size for row in rows)
        for made in (big, more):
            row = await bench.looked_up(view, made)
            assert await bench.read(view, row, 0, 700_000) == made.nar[:700_000]
        totals = bench.cache.index.totals()
        assert totals.nar_bytes + totals.tree_bytes <= bench.cache.max_bytes
        assert len(bench.dropped) == 1

    run(tmp_path, body)


def open_files_below(place: Path) -> list[str]:
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(str(fd.readlink()))
    return [link for link in links if link.startswith((f"{place}/nars", f"{place}/incoming"))]


def test_a_completed_nar_that_the_cache_cannot_take_leaves_nothing_behind(
    tmp_path: Path, cache: PublishedCache, big: MadePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        await bench.read(view, row, 0, 1000)
        publish = bench.cache.trees.publish
        failures = [CacheFullError("no space left")]

        def full(*args: object, **named: object) -> object:
            if failures:
                raise failures.pop()
            return publish(*args, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(bench.cache.trees, "publish", full)
        bench.cache.trees.drop(row.number)
        await bench.store.whole(view, big.path, bench.account)
        assert failures == []
        assert open_files_below(bench.cache.root) == []
        assert bench.nar(row.number) == big.nar
        assert list((bench.cache.root / "incoming").iterdir()) == []

    run(tmp_path, body)


def test_a_part_that_is_dropped_while_it_is_completed_is_read_whole(
    tmp_path: Path, cache: PublishedCache, big: MadePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        await bench.read(view, row, 0, 1000)
        gate = Gate(monkeypatch, lambda *_: True)
        completing = asyncio.create_task(bench.store.whole(view, big.path, bench.account))
        await gate.held.wait()
        bench.cache.nars.drop(row.number)
        bench.store.parts.forget(row.number)
        gate.open.set()
        assert bench.nar((await completing).number) == big.nar
        assert bench.condemned == [] and bench.store.stories.rows() == []

    run(tmp_path, body)


def test_a_wrong_listing_is_found_out_without_fetching_the_nar_again(
    tmp_path: Path, cache: PublishedCache, big: MadePath
) -> None:
    file = cache.directory / f"{big.path.hash_part}.ls"
    listing = json.loads(file.read_bytes())
    listing["root"]["entries"]["link"]["target"] = "date"
    file.write_text(json.dumps(listing))

    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        assert await bench.read(view, row, 0, 1000) == big.nar[:1000]
        before = bench.account.wire_bytes
        fresh = await bench.store.whole(view, big.path, bench.account)
        assert fresh.number != row.number and [number for number, _ in bench.condemned] == [row.number]
        assert bench.nar(fresh.number) == big.nar
        assert bench.account.wire_bytes - before < cache.nar("big").stat().st_size

    run(tmp_path, body)


def test_unchecked_bytes_of_a_source_are_shown_in_views_that_have_it_only(
    tmp_path: Path, big: MadePath, good: SignedCache, evil: SignedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(bench: Bench) -> None:
        one, row = await bench.opened(evil, big, verify="deferred")
        two, _ = await bench.opened(good, big, verify="deferred")
        gate = Gate(monkeypatch, lambda url, offset: "evil" in url and offset > 2_000_000)
        await bench.read(one, row, 1_500_000, 10)
        reading = asyncio.create_task(bench.read(two, row, 1_500_000, 10))
        await gate.held.wait()
        gate.open.set()
        with suppress(HashMismatchError):  # it has another number by now
            assert await reading == big.nar[1_500_000:1_500_010]
        await settled()
        assert [number for number, _ in bench.condemned] == [row.number]
        row = await bench.looked_up(two, big)
        assert await bench.read(two, row, 1_500_000, 10) == big.nar[1_500_000:1_500_010]

    run(tmp_path, body)


def test_what_was_shown_unchecked_is_checked_before_the_nar_comes_from_elsewhere(
    tmp_path: Path, big: MadePath, good: SignedCache, evil: SignedCache
) -> None:
    async def body(bench: Bench) -> None:
        deferring, row = await bench.opened(evil, big, verify="deferred")
        strict, _ = await bench.opened(good, big)
        await bench.read(deferring, row, 1_500_000, 10)
        await bench.store.whole(strict, big.path, bench.account)
        await settled()
        assert [number for number, _ in bench.condemned] == [row.number]

    run(tmp_path, body)


def test_what_was_shown_unchecked_is_condemned_when_the_rest_cannot_be_had(
    tmp_path: Path, big: MadePath
) -> None:
    cache = SignedCache(tmp_path / "none", [big])

    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big, verify="deferred")
        await bench.read(view, row, 2_000_000, 100)
        (cache.directory / cache.infos["big"].url).unlink()
        await settled()
        assert [number for number, _ in bench.condemned] == [row.number]
        assert not any(file.exists() for file in bench.cache.nars.files(row.number))
        assert open_files_below(bench.cache.root) == []

    run(tmp_path, body)


def test_unchecked_parts_of_a_trusted_source_do_not_pile_up(
    tmp_path: Path, big: MadePath, more: MadePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row tells of them, so nothing else would ever remove them."""
    monkeypatch.setattr(parts, "MAX_OPEN", 1)
    cache = SignedCache(tmp_path / "none", [big, more])

    async def body(bench: Bench) -> None:
        view = bench.view(f"{cache.url}?trusted=true", keys=(cache.key,), verify="deferred")
        for made in (big, more, big, more):
            row = await bench.looked_up(view, made)
            ready = await bench.store.content(view, row.number, 2_000_000, 100, bench.account)
            assert read_ready(bench.cache, ready, 2_000_000, 100) == made.nar[2_000_000:2_000_100]
            await settled()
        assert len(open_files_below(bench.cache.root)) == 1
        assert len(list((bench.cache.root / "nars").rglob("*.sparse"))) == 1
        assert bench.condemned == []

    run(tmp_path, body)


def test_a_sparse_nar_that_was_begun_anew_meanwhile_shows_no_holes(
    tmp_path: Path, cache: PublishedCache, big: MadePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view takes long to find its chunk map; the file that it knew of is evicted and begun again in between."""

    async def body(bench: Bench) -> None:
        one = bench.view(cache.url, keys=(cache.key,))
        slow = bench.view(cache.url, keys=(cache.key,), ttl=11.0)
        row = await bench.looked_up(one, big)
        await bench.looked_up(slow, big)
        await bench.read(one, row, 1_000_000, 100)
        bench.store.parts.forget(row.number)
        find = ChunkFinder.find
        entered, go_on = asyncio.Event(), asyncio.Event()

        async def slowly(
            finder: ChunkFinder,
            view: View,
            row: object,
            candidate: Candidate,
            kept: ChunkMap,
            account: Account,
        ) -> object:
            if view is slow:
                entered.set()
                await go_on.wait()
            return await find(finder, view, row, candidate, kept, account)  # type: ignore[arg-type]

        monkeypatch.setattr(ChunkFinder, "find", slowly)
        reading = asyncio.create_task(bench.read(slow, row, 1_000_000, 100))
        await entered.wait()
        bench.store.evict(0)
        await bench.read(one, row, 3_000_000, 100)
        bench.store.parts.forget(row.number)  # as when many others are open
        go_on.set()
        assert await reading == big.nar[1_000_000:1_000_100]

    run(tmp_path, body)


def test_a_damaged_chunk_map_in_the_index_is_fetched_again(
    tmp_path: Path, cache: PublishedCache, big: MadePath
) -> None:
    async def first(bench: Bench) -> None:
        view = bench.view(cache.url, keys=(cache.key,))
        await bench.read(view, await bench.looked_up(view, big), 1_000_000, 100)
        bench.cache.index.database.run("UPDATE chunk_maps SET chunks = x'00'")
        bench.cache.index.flush()

    async def second(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        assert await bench.read(view, row, 1_000_000, 100) == big.nar[1_000_000:1_000_100]

    run(tmp_path, first)
    run(tmp_path, second)
    run(tmp_path, first)
    open_cache(tmp_path / "cache", boot="another").close()  # hashes what it cannot be sure of


def test_an_unsigned_chunk_map_of_one_source_says_nothing_of_another(
    tmp_path: Path, cache: PublishedCache, big: MadePath
) -> None:
    """Views that ask for no signatures believe their own sources, and no other view's."""
    data = bytearray(big.nar)
    data[1_500_000] ^= 1
    evil = PublishedCache(
        tmp_path / "evil", [MadePath(big.path, bytes(data), big.tree, big.data)], secret=cache.secret
    )
    truth = parse_chunk_map(cache.chunk_map("big").read_bytes())
    lie = parse_chunk_map(evil.chunk_map("big").read_bytes())
    file = evil.nar("big").read_bytes()
    evil.narinfo("big").write_bytes(cache.narinfo("big").read_bytes())
    (evil.directory / truth.url).write_bytes(file)
    evil.chunk_map("big").write_bytes(
        write_chunk_map(replace(lie, nar_hash=truth.nar_hash, url=truth.url, signatures=()))
    )

    async def body(bench: Bench) -> None:
        def unsigned(url: str) -> View:
            config = ViewConfig.from_json({"sources": [{"url": url}], "require_signatures": False})
            bench.views.append(build_view(config, bench.cache, bench.clock))
            return bench.views[-1]

        one, two = unsigned(evil.url), unsigned(cache.url)
        row = await bench.looked_up(one, big)
        assert (await bench.looked_up(two, big)).number == row.number
        assert await bench.read(one, row, 1_500_000, 10) != big.nar[1_500_000:1_500_010]
        assert await bench.read(two, row, 1_500_000, 10) == big.nar[1_500_000:1_500_010]

    run(tmp_path, body)


def test_a_cache_without_room_for_parts_leaves_it_to_reading_whole(
    tmp_path: Path, cache: PublishedCache, big: MadePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)

        def full(*_: object) -> SparseNar:
            raise CacheFullError("no space left")

        monkeypatch.setattr(bench.cache.nars, "sparse", full)
        ready = await bench.store.content(view, row.number, 100, 10, bench.account)
        assert ready.whole and bench.nar(row.number) == big.nar

    run(tmp_path, body)


def test_a_sparse_nar_is_never_taken_for_the_one_before_it(
    tmp_path: Path, cache: PublishedCache, big: MadePath
) -> None:
    """Inodes are used again at once; a mount server that hears late of the old file must not read holes of the new one."""

    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        directory = os.open(bench.cache.root, os.O_RDONLY)
        try:
            for offset in (1_000_000, 3_000_000, 2_000_000):
                ready = await bench.store.content(view, row.number, offset, 100, bench.account)
                bench.store.evict(0)
                await bench.store.content(view, row.number, 5_000_000, 100, bench.account)
                contents = Contents(directory)
                contents.ready(row.number, ready.start, ready.end, whole=False, inode=ready.inode)
                assert contents.get(row.number) is None
        finally:
            os.close(directory)

    run(tmp_path, body)


def test_a_sparse_nar_that_somebody_removed_is_begun_again(
    tmp_path: Path, cache: PublishedCache, big: MadePath
) -> None:
    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        await bench.read(view, row, 1_000_000, 100)
        bench.cache.nars.files(row.number)[1].unlink()
        assert await bench.read(view, row, 1_000_000, 100) == big.nar[1_000_000:1_000_100]

    run(tmp_path, body)


def test_a_check_of_the_cache_leaves_sparse_nars_alone_that_no_row_tells_of(
    tmp_path: Path, big: MadePath
) -> None:
    cache = SignedCache(tmp_path / "none", [big])

    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big, "?trusted=true", verify="deferred")
        await bench.read(view, row, 2_000_000, 100)
        await settled()
        assert row.number in bench.store.busy

    run(tmp_path, body)


def test_parts_of_a_source_that_gives_none_any_more_are_compared_with_the_whole(
    tmp_path: Path, big: MadePath, good: SignedCache, evil: SignedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(bench: Bench) -> None:
        deferring, row = await bench.opened(evil, big, verify="deferred")
        strict, _ = await bench.opened(good, big)
        await bench.read(deferring, row, 1_500_000, 10)

        async def none(*_: object) -> bytes:
            raise RangesUnsupportedError

        monkeypatch.setattr(ObjectStoreSource, "part", none)
        await settled()
        assert bench.condemned == []
        fresh = await bench.store.whole(strict, big.path, bench.account)
        assert [number for number, _ in bench.condemned] == [row.number]
        assert bench.nar(fresh.number) == big.nar
        await settled()  # its digests are learnt
        assert open_files_below(bench.cache.root) == []

    run(tmp_path, body)
