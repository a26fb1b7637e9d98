"""A source that may be asked only so fast: what is waited for, how fairly, and that nothing else of it changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.support.signed_cache import SignedCache, make_path
from veneer.model.errors import UsageError
from veneer.sources.opening import open_source
from veneer.sources.options import SourceConfig, SourceOptions, parse_source_url
from veneer.sources.pace import PIECE, Pace, Paces

RATE = 1 << 20


class Time:
    """Jumps to where the next sleeper wants to wake; sleepers of a bucket come one by one."""

    def __init__(self) -> None:
        self.now = 1000.0

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


def with_pace(
    body: Callable[[Pace, Time], Awaitable[None]], bytes_: float | None, requests: float | None
) -> float:
    """Seconds that the body took, by its clock."""

    async def main() -> float:
        passing = Time()
        pace = Pace(bytes_, requests, clock=lambda: passing.now, sleep=passing.sleep)
        await asyncio.wait_for(body(pace, passing), 10)
        return passing.now - 1000.0

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("size", "seconds"), [(RATE - 1, 0), (RATE, 0), (RATE + RATE // 2, 0.5), (11 * RATE, 10)]
)
def test_what_is_above_one_second_of_bytes_waits(size: int, seconds: float) -> None:
    assert with_pace(lambda pace, _: pace.received(size), RATE, None) == pytest.approx(seconds, abs=1e-6)


@pytest.mark.parametrize(("count", "seconds"), [(9, 0), (10, 0), (11, 0.1), (110, 10)])
def test_what_is_above_one_second_of_requests_waits(count: int, seconds: float) -> None:
    async def ask(pace: Pace, _: Time) -> None:
        await asyncio.gather(*(pace.request() for _ in range(count)))

    assert with_pace(ask, None, 10) == pytest.approx(seconds)


def test_less_than_one_request_per_second_is_possible() -> None:
    async def ask(pace: Pace, _: Time) -> None:
        for __ in range(3):
            await pace.request()

    assert with_pace(ask, None, 0.5) == pytest.approx(4)


def test_without_limits_nothing_waits() -> None:
    async def ask(pace: Pace, _: Time) -> None:
        await pace.request()
        await pace.received(1 << 40)

    assert with_pace(ask, None, None) == 0


def test_a_small_transfer_is_not_behind_the_large_ones() -> None:
    """Five large ones and a reader: the reader has its sixth of the rate."""

    async def transfers(pace: Pace, passing: Time) -> None:
        await pace.received(RATE)  # the burst is spent
        began = passing.now
        large = [asyncio.create_task(pace.received(4 * RATE)) for _ in range(5)]
        await asyncio.sleep(0)
        await pace.received(RATE // 4)
        assert passing.now - began <= 6 * (RATE // 4) / RATE + 6 * PIECE / RATE
        assert not any(task.done() for task in large)
        await asyncio.gather(*large)

    with_pace(transfers, RATE, None)


def test_a_cancelled_wait_holds_nobody_up() -> None:
    async def transfers(pace: Pace, passing: Time) -> None:
        task = asyncio.create_task(pace.received(1000 * RATE))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        began = passing.now
        await pace.received(PIECE)
        assert passing.now - began < 2

    with_pace(transfers, RATE, None)


def test_small_answers_are_not_delayed_but_counted() -> None:
    async def transfers(pace: Pace, passing: Time) -> None:
        pace.spent(3 * RATE)
        assert passing.now == 1000
        await pace.received(PIECE)
        assert passing.now == pytest.approx(1002 + PIECE / RATE)

    with_pace(transfers, RATE, None)


def test_views_share_the_pace_of_a_source_and_of_its_limits() -> None:
    def config(url: str) -> SourceConfig:
        return parse_source_url(url)

    paces = Paces()
    one = paces.of(config("https://one.example?bytes-per-second=20000"))
    assert paces.of(config("https://one.example?bytes-per-second=20000&priority=3")) is one
    assert paces.of(config("https://one.example?bytes-per-second=30000")) is not one
    assert paces.of(config("https://two.example?bytes-per-second=20000")) is not one


@pytest.mark.parametrize("value", ["16383", "0", "-1", "fast", "1e9", ""])
def test_a_rate_that_no_reader_would_wait_for_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match="bytes-per-second"):
        parse_source_url(f"https://one.example?bytes-per-second={value}")


def test_the_lowest_rates_are_taken() -> None:
    config = parse_source_url("https://one.example?bytes-per-second=16384&requests-per-second=0.5")
    assert (config.url, config.bytes_per_second, config.requests_per_second) == (
        "https://one.example",
        16384,
        0.5,
    )


def test_a_store_directory_has_no_rate() -> None:
    assert parse_source_url("local?bytes-per-second=16384").unknown == ("bytes-per-second",)


def test_a_nar_comes_whole_and_not_faster_than_its_source_may_send(tmp_path: Path) -> None:
    made = make_path("paced", 600_000)
    cache = SignedCache(tmp_path / "cache", [made])

    async def body() -> None:
        config = parse_source_url(f"file://{cache.directory}?bytes-per-second=400000&requests-per-second=100")
        source = open_source(config, SourceOptions())
        began = time.monotonic()
        info = await source.path_info(made.path.hash_part)
        assert info is not None
        assert b"".join([chunk async for chunk in source.nar(info)]) == made.nar
        assert time.monotonic() - began >= (len(made.nar) - 400_000) / 400_000
        assert await source.part(info, 100, 5) == made.nar[100:105]
        await source.close()

    asyncio.run(asyncio.wait_for(body(), 20))
