"""Parts of NARs over HTTP from servers that lie, cut and lose: the right bytes or an error, never wrong ones."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.caches import read_ready
from tests.support.faulty_http import (
    Body,
    FaultyServer,
    Flipped,
    RangeIgnored,
    Reset,
    Status,
    Truncated,
    WrongLength,
    WrongRange,
)
from tests.support.published_cache import PublishedCache
from tests.support.signed_cache import MadePath, make_path
from tests.support.store_bench import Bench, run
from veneer.formats.seekable_zstd import FOOTER_SIZE
from veneer.model.errors import VeneerError
from veneer.store.views import View

SIZE = 6_000_001
SPANS = ((1_000_000, 5000), (100, 50), (5_400_000, 300_000), (0, 1), (3_000_000, 1_000_000))
"""(offset, size) of reads, in this order."""

ONCE, ALWAYS = 1, None
FAULTS = [
    (WrongRange(), ONCE),
    (WrongRange(by=-1), ALWAYS),
    (RangeIgnored(), ONCE),
    (RangeIgnored(), ALWAYS),
    (Truncated(1000), ONCE),
    (Truncated(1000), ALWAYS),
    (Reset(500), ONCE),
    (Reset(500), ALWAYS),
    (Flipped(700), ONCE),
    (Flipped(700), ALWAYS),
    (WrongLength(1), ALWAYS),
    (Status(404), ALWAYS),
    (Status(503), ONCE),
    (Status(503), ALWAYS),
    (Status(416), ALWAYS),
    (Body(b"not a NAR at all"), ALWAYS),
]


@dataclass(frozen=True)
class Place:
    """A published cache behind a server that fails as told, and a healthy one that is asked second."""

    cache: PublishedCache
    made: MadePath
    server: FaultyServer


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishedCache:
    made = [make_path("big", SIZE), make_path("other", SIZE + 8)]
    return PublishedCache(tmp_path_factory.mktemp("published") / "cache", made)


@pytest.fixture
def place(published: PublishedCache) -> Iterator[Place]:
    with FaultyServer(published.directory) as server:
        yield Place(published, published.paths["big"], server)


async def read_all(bench: Bench, view: View, place: Place, *, may_fail: bool, trusting: bool = False) -> int:
    """Reads every span; how many failed. What is given must be the NAR's bytes."""
    failed = 0
    row = await bench.looked_up(view, place.made)
    for offset, size in SPANS:
        try:
            async with asyncio.timeout(30):
                ready = await bench.store.content(view, row.number, offset, size, bench.account)
        except VeneerError:
            failed += 1
            assert may_fail
            row = await bench.looked_up(view, place.made)
            continue
        data = read_ready(bench.cache, ready, offset, size)
        if not trusting:  # who defers the check may see what the source flipped
            assert data == place.made.nar[offset : offset + size]
    return failed


@pytest.mark.parametrize(("fault", "times"), FAULTS, ids=[f"{f!r}-{t or 'always'}" for f, t in FAULTS])
@pytest.mark.parametrize("verify", ["strict", "deferred"])
def test_a_source_that_fails_at_parts_gives_right_bytes_or_an_error(
    tmp_path: Path, place: Place, fault: object, times: int | None, verify: str
) -> None:
    place.server.fail("/nar/*", fault, times)  # type: ignore[arg-type]

    async def body(bench: Bench) -> None:
        view = bench.view(place.server.url, keys=(place.cache.key,), verify=verify)
        trusting = verify == "deferred" and isinstance(fault, Flipped)
        await read_all(bench, view, place, may_fail=True, trusting=trusting)
        place.server.heal()
        bench.clock.now += 7200  # quarantines and refusals have passed
        assert await read_all(bench, view, place, may_fail=False) == 0

    run(tmp_path, body)


@pytest.mark.parametrize(
    "fault", [f for f, t in FAULTS if t is ALWAYS], ids=[repr(f) for f, t in FAULTS if t is ALWAYS]
)
def test_a_second_source_makes_up_for_the_first(tmp_path: Path, place: Place, fault: object) -> None:
    place.server.fail("/nar/*", fault)  # type: ignore[arg-type]

    async def body(bench: Bench) -> None:
        view = bench.view(
            f"{place.server.url}?priority=1", f"{place.cache.url}?priority=2", keys=(place.cache.key,)
        )
        assert await read_all(bench, view, place, may_fail=False) == 0

    run(tmp_path, body)


@pytest.mark.parametrize(
    "fault", [Status(404), Status(500), Flipped(300), Truncated(200), Reset(), Body(b"?")]
)
def test_a_chunk_map_that_cannot_be_had_means_reading_whole(
    tmp_path: Path, place: Place, fault: object
) -> None:
    place.server.fail("/*.chunks", fault)  # type: ignore[arg-type]

    async def body(bench: Bench) -> None:
        view = bench.view(place.server.url, keys=(place.cache.key,))
        assert await read_all(bench, view, place, may_fail=False) == 0
        assert bench.cache.index.totals().nars == 1

    run(tmp_path, body)


def test_the_chunk_map_of_another_nar_means_reading_whole(tmp_path: Path, place: Place) -> None:
    place.server.fail("/*.chunks", Body(place.cache.chunk_map("other").read_bytes()))

    async def body(bench: Bench) -> None:
        view = bench.view(place.server.url, keys=(place.cache.key,))
        assert await read_all(bench, view, place, may_fail=False) == 0
        assert bench.cache.index.totals().nars == 1

    run(tmp_path, body)


def test_a_stale_footer_gives_deferred_readers_right_bytes_or_an_error(
    tmp_path: Path, published: PublishedCache
) -> None:
    """The seek table is of another file of the same length."""
    made = make_path("stale", SIZE)
    cache = PublishedCache(tmp_path / "cache", [made], frame_size=48 << 10)
    cache.chunk_map("stale").unlink()
    file, other = cache.nar("stale"), PublishedCache(tmp_path / "b", [made], frame_size=96 << 10).nar("stale")
    data, table = bytearray(file.read_bytes()), other.read_bytes()
    count = int.from_bytes(table[-FOOTER_SIZE : -FOOTER_SIZE + 4], "little")
    rows = table[-FOOTER_SIZE - 8 * count : -FOOTER_SIZE]
    swapped = b"".join(rows[at : at + 8] for at in range(0, len(rows), 8))
    data[-FOOTER_SIZE - len(swapped) : -FOOTER_SIZE] = swapped
    file.write_bytes(data)

    async def body(bench: Bench) -> None:
        view = bench.view(cache.url, keys=(cache.key,), verify="deferred")
        await read_all(bench, view, Place(cache, made, None), may_fail=True)  # type: ignore[arg-type]

    run(tmp_path, body)
