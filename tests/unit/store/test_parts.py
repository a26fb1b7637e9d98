"""NARs that are had in parts: what is moved, what is believed, what happens when a part is wrong."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.caches import read_ready
from tests.support.callers import eventually
from tests.support.damage import flip
from tests.support.published_cache import FRAME, PublishedCache
from tests.support.signed_cache import MadePath, SignedCache, make_path
from tests.support.store_bench import Bench, run, settled
from veneer.cache.index import NarState
from veneer.formats.signature import SecretKey
from veneer.model.errors import HashMismatchError, VeneerError
from veneer.sources.object_store import ObjectStoreSource
from veneer.store import chunk_fetch
from veneer.store.account import Account


@pytest.fixture
def cache(tmp_path: Path, big: MadePath) -> PublishedCache:
    return PublishedCache(tmp_path / "published", [big, make_path("small")])


def test_a_part_costs_its_frames_and_no_more(tmp_path: Path, cache: PublishedCache, big: MadePath) -> None:
    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        before = bench.account.wire_bytes
        assert await bench.read(view, row, 1_000_000, 5000) == big.nar[1_000_000:1_005_000]
        assert bench.account.wire_bytes - before < 2 * FRAME + cache.chunk_map("big").stat().st_size + 100
        assert bench.state(row) is NarState.SPARSE
        totals = bench.cache.index.totals()
        assert totals.nars == 0 and FRAME <= totals.nar_bytes <= 3 * FRAME

    run(tmp_path, body)


def test_what_is_here_is_not_asked_for_again_even_after_a_restart(
    tmp_path: Path, cache: PublishedCache, big: MadePath
) -> None:
    async def first(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        await bench.read(view, row, 500_000, 100_000)

    async def second(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        before = bench.account.wire_bytes
        assert await bench.read(view, row, 500_000, 100_000) == big.nar[500_000:600_000]
        assert bench.account.wire_bytes == before

    run(tmp_path, first)
    run(tmp_path, second)


def test_small_nars_are_fetched_whole(tmp_path: Path, cache: PublishedCache) -> None:
    small = cache.paths["small"]

    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, small)
        ready = await bench.store.content(view, row.number, 200, 10, bench.account)
        assert ready.whole and ready.end == len(small.nar)

    run(tmp_path, body)


def test_parts_become_whole_once_most_is_here_and_nothing_is_fetched_twice(
    tmp_path: Path, cache: PublishedCache, big: MadePath
) -> None:
    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        before = bench.account.wire_bytes
        for offset in range(0, len(big.nar) - 120_000, 3 * FRAME):
            await bench.read(view, row, offset, 2 * FRAME)
        await settled()
        assert bench.state(row) is NarState.WHOLE
        assert bench.nar(row.number) == big.nar
        assert not bench.cache.nars.files(row.number)[1].exists()
        moved = bench.account.wire_bytes - before
        assert moved <= cache.nar("big").stat().st_size + cache.chunk_map("big").stat().st_size

    run(tmp_path, body)


def test_a_reader_that_goes_on_is_served_ahead_in_big_requests(
    tmp_path: Path, cache: PublishedCache, big: MadePath
) -> None:
    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        before = bench.account.requests
        for offset in range(0, len(big.nar) - 16_384, 16_384):
            assert await bench.read(view, row, offset, 16_384) == big.nar[offset : offset + 16_384]
        assert bench.account.requests - before < len(big.nar) / FRAME / 3

    run(tmp_path, body)


def test_a_reader_asks_himself_for_what_waits_for_room_in_memory(
    tmp_path: Path, cache: PublishedCache, big: MadePath
) -> None:
    """While readers hold more than half of it, nothing in the background begins."""

    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        memory = bench.store.parts._fetch._memory
        load = bench.store.load(view, big.path, [(1_000_000, 5000)], bench.account)
        async with asyncio.timeout(20), memory.hold(memory._limit // 2 + 1, urgent=True):
            loading = asyncio.create_task(load)
            await asyncio.to_thread(eventually, lambda: memory._waiting[False])
            assert await bench.read(view, row, 1_000_000, 5000) == big.nar[1_000_000:1_005_000]
        await loading

    run(tmp_path, body)


def test_whole_takes_what_is_missing_only(tmp_path: Path, cache: PublishedCache, big: MadePath) -> None:
    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        await bench.read(view, row, 0, 1_000_000)
        before = bench.account.wire_bytes
        row = await bench.store.whole(view, big.path, bench.account)
        assert bench.nar(row.number) == big.nar
        assert bench.account.wire_bytes - before < cache.nar("big").stat().st_size - 900_000

    run(tmp_path, body)


def test_readers_of_one_part_share_one_request(tmp_path: Path, cache: PublishedCache, big: MadePath) -> None:
    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        before = bench.account.requests
        got = await asyncio.gather(*(bench.read(view, row, 700_000, 100) for _ in range(20)))
        assert set(got) == {big.nar[700_000:700_100]}
        assert bench.account.requests - before == 2  # the chunk map and one part

    run(tmp_path, body)


def test_a_chunk_that_another_nar_holds_is_copied(tmp_path: Path, big: MadePath) -> None:
    other = MadePath(make_path("rebuilt").path, big.nar, big.tree, big.data)
    cache = PublishedCache(tmp_path / "published", [big, other])

    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        await bench.read(view, row, 0, 1_000_000)
        row = await bench.looked_up(view, other)
        before = bench.account.wire_bytes
        assert await bench.read(view, row, 100, 900_000) == big.nar[100:900_100]
        assert bench.account.wire_bytes - before <= cache.chunk_map("rebuilt").stat().st_size
        await settled()
        row = await bench.store.whole(view, other.path, bench.account)
        assert bench.nar(row.number) == big.nar

    run(tmp_path, body)


def test_after_eviction_parts_come_back_and_are_checked(
    tmp_path: Path, cache: PublishedCache, big: MadePath
) -> None:
    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        await bench.read(view, row, 0, 100_000)
        assert bench.store.evict(0) and bench.dropped == [row.number]
        assert not bench.cache.nars.files(row.number)[1].exists()
        assert bench.cache.index.totals().nar_bytes == 0
        before = bench.account.wire_bytes
        assert await bench.read(view, row, 50_000, 100) == big.nar[50_000:50_100]
        assert bench.account.wire_bytes - before < 2 * FRAME

    run(tmp_path, body)


def test_a_tampered_chunk_is_never_served(tmp_path: Path, cache: PublishedCache, big: MadePath) -> None:
    flip(cache.nar("big"), 1_500_000)

    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        assert await bench.read(view, row, 100, 1000) == big.nar[100:1100]
        with pytest.raises(VeneerError):
            await bench.read(view, row, 1_480_000, 60_000)
        assert any("big" in story.path for story in bench.store.stories.rows())
        assert bench.state(row) is not NarState.WHOLE

    run(tmp_path, body)


def test_with_a_second_source_a_tampered_chunk_is_made_up_for(
    tmp_path: Path, cache: PublishedCache, big: MadePath
) -> None:
    flip(cache.nar("big"), 1_500_000)
    good = SignedCache(tmp_path / "good", [big], secret=cache.secret)

    async def body(bench: Bench) -> None:
        view = bench.view(cache.url + "?priority=1", f"{good.url}?priority=2", keys=(cache.key,))
        row = await bench.looked_up(view, big)
        assert await bench.read(view, row, 1_480_000, 60_000) == big.nar[1_480_000:1_540_000]
        assert await bench.read(view, row, 0, 100) == big.nar[:100]

    run(tmp_path, body)


def cut_frames(cache: PublishedCache) -> None:
    file = cache.nar("big")
    file.write_bytes(file.read_bytes()[:-50_000])


def map_of_another(cache: PublishedCache) -> None:
    cache.chunk_map("big").write_bytes(cache.chunk_map("small").read_bytes())


def map_of_another_file(cache: PublishedCache) -> None:
    data = cache.chunk_map("big").read_bytes()
    cache.chunk_map("big").write_bytes(data.replace(b"URL: nar/", b"URL: nax/"))


def map_without_signature(cache: PublishedCache) -> None:
    lines = cache.chunk_map("big").read_bytes().split(b"\n", 7)
    cache.chunk_map("big").write_bytes(b"\n".join(x for x in lines if not x.startswith(b"Sig: ")))


def map_of_another_key(cache: PublishedCache) -> None:
    other = PublishedCache(
        cache.directory.parent / "other", list(cache.paths.values()), secret=SecretKey.generate("made-1")
    )
    cache.chunk_map("big").write_bytes(other.chunk_map("big").read_bytes())


def no_map(cache: PublishedCache) -> None:
    cache.chunk_map("big").unlink()


def garbage(cache: PublishedCache) -> None:
    cache.chunk_map("big").write_bytes(os.urandom(1000))


@pytest.mark.parametrize(
    "spoil", [map_of_another, map_of_another_file, map_without_signature, map_of_another_key, no_map, garbage]
)
def test_without_a_chunk_map_that_counts_the_nar_is_read_whole(
    tmp_path: Path, cache: PublishedCache, big: MadePath, spoil: Callable[[PublishedCache], None]
) -> None:
    spoil(cache)

    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        ready = await bench.store.content(view, row.number, 100, 1000, bench.account)
        assert ready.whole
        assert bench.nar(row.number) == big.nar

    run(tmp_path, body)


def test_a_chunk_map_is_believed_in_the_views_that_trust_its_key_only(
    tmp_path: Path, cache: PublishedCache, big: MadePath
) -> None:
    """Two caches with the same NAR, signed by two keys; a view that trusts one reads nothing that the other vouched for."""
    other = PublishedCache(tmp_path / "other", [big], secret=SecretKey.generate("made-2"))
    flip(other.nar("big"), 100_000)
    other.chunk_map("big").unlink()

    async def body(bench: Bench) -> None:
        one = bench.view(cache.url, keys=(cache.key,))
        two = bench.view(other.url, keys=(other.key,))
        row = await bench.looked_up(one, big)
        assert (await bench.looked_up(two, big)).number == row.number
        assert await bench.read(one, row, 1_000_000, 100) == big.nar[1_000_000:1_000_100]
        with pytest.raises(VeneerError):
            await bench.read(two, row, 1_000_000, 100)
        assert await bench.read(one, row, 90_000, 30_000) == big.nar[90_000:120_000]

    run(tmp_path, body)


def in_blocks(data: bytes) -> bytes:
    """An .xz file of several blocks."""
    import subprocess

    return subprocess.run(
        ["xz", "-0", "-T1", "--block-size=131072", "-c"], input=data, capture_output=True, check=True
    ).stdout


def ordinary(tmp_path: Path, big: MadePath, compression: str, monkeypatch: pytest.MonkeyPatch) -> SignedCache:
    from tests.support import signed_cache

    if compression == "xz":
        monkeypatch.setitem(signed_cache._PACKERS, "xz", in_blocks)
    return SignedCache(tmp_path / compression, [big], compression=compression)


@pytest.mark.parametrize("compression", ["none", "xz", "seekable"])
def test_ordinary_caches_give_parts_to_deferred_readers_and_all_is_checked_after(
    tmp_path: Path, big: MadePath, compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache: SignedCache | PublishedCache
    if compression == "seekable":
        cache = PublishedCache(tmp_path / "seekable", [big])
        cache.chunk_map("big").unlink()
    else:
        cache = ordinary(tmp_path, big, compression, monkeypatch)

    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big, verify="deferred")
        ready = await bench.store.content(view, row.number, 2_000_000, 100, bench.account)
        assert not ready.whole
        assert read_ready(bench.cache, ready, 2_000_000, 100) == big.nar[2_000_000:2_000_100]
        await settled()
        assert bench.state(row) is NarState.WHOLE
        assert bench.nar(row.number) == big.nar
        assert bench.condemned == []

    run(tmp_path, body)


def test_what_deferred_readers_saw_of_a_wrong_nar_is_condemned(
    tmp_path: Path, big: MadePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = SignedCache(tmp_path / "none", [big])
    flip(cache.nar("big"), 1_500_000)

    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big, verify="deferred")
        await bench.read(view, row, 2_000_000, 100)
        await settled()
        assert [number for number, _ in bench.condemned] == [row.number]
        with pytest.raises(HashMismatchError):
            await bench.read(view, row, 0, 100)
        assert not any(file.exists() for file in bench.cache.nars.files(row.number))

    run(tmp_path, body)


def test_digests_learnt_from_a_whole_nar_let_it_come_back_in_parts(
    tmp_path: Path, big: MadePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ordinary(tmp_path, big, "xz", monkeypatch)

    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        assert (await bench.store.content(view, row.number, 0, 100, bench.account)).whole
        await settled()
        bench.store.evict(0)
        before = bench.account.wire_bytes
        assert await bench.read(view, row, 2_000_000, 100) == big.nar[2_000_000:2_000_100]
        assert bench.account.wire_bytes - before < 200_000
        bench.store.evict(0)
        flip(cache.nar("big"), 1_000_000)
        with pytest.raises(VeneerError):
            await bench.read(view, row, 900_000, 200_000)

    run(tmp_path, body)


def test_an_interrupted_reader_leaves_the_request_to_the_others(
    tmp_path: Path, cache: PublishedCache, big: MadePath
) -> None:
    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        one = asyncio.create_task(bench.read(view, row, 800_000, 100))
        two = asyncio.create_task(bench.read(view, row, 800_000, 100))
        await asyncio.sleep(0)
        one.cancel()
        assert await two == big.nar[800_000:800_100]

    run(tmp_path, body)


def test_wanted_parts_overtake_those_that_nobody_waits_for(
    tmp_path: Path, cache: PublishedCache, big: MadePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[int] = []
    begun = asyncio.Event()
    part = ObjectStoreSource.part

    async def noted(self: ObjectStoreSource, info: object, offset: int, size: int, meter: object) -> bytes:
        order.append(offset)
        begun.set()
        return await part(self, info, offset, size, meter)  # type: ignore[arg-type]

    monkeypatch.setattr(ObjectStoreSource, "part", noted)
    monkeypatch.setattr(chunk_fetch, "REQUEST", FRAME)

    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        await bench.read(view, row, 0, 10)
        order.clear()
        begun.clear()
        account = Account()
        loading = asyncio.create_task(bench.store.load(view, big.path, [(0, len(big.nar))], account))
        await begun.wait()
        last = len(big.nar) - 1000
        assert await bench.read(view, row, last, 100) == big.nar[last : last + 100]
        assert order.index(max(order)) < len(big.nar) // FRAME // 2
        await loading

    run(tmp_path, body)


def test_a_nar_that_arrives_after_its_number_was_condemned_is_kept_under_the_next_one(
    tmp_path: Path, big: MadePath
) -> None:
    cache = SignedCache(tmp_path / "xz", [big], compression="xz")

    async def body(bench: Bench) -> None:
        view, row = await bench.opened(cache, big)
        whole = asyncio.create_task(bench.store.whole(view, big.path, bench.account))
        while row.number not in bench.store.fetcher.busy:  # noqa: ASYNC110 (a state that nobody announces)
            await asyncio.sleep(0)
        fresh = bench.store._condemn(row, HashMismatchError("it was read in parts, and they were wrong"))
        assert (await whole).number == fresh.number
        assert bench.nar(fresh.number) == big.nar
        assert bench.cache.index.quarantines(bench.clock()) == []

    run(tmp_path, body)
