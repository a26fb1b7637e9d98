"""Order, fail-over and rest of several sources. The clock is the test's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest

from tests.support.source_cache import entry
from veneer.formats.cache_info import CacheInfo
from veneer.model.errors import FormatError, SourceError
from veneer.model.path_info import UnverifiedPathInfo
from veneer.sources.base import Meter, unmetered
from veneer.sources.chain import SourceChain

INFO = entry(1).info
HASH = INFO.store_path.hash_part


class Fake:
    """Answers as told; ``answer`` may be changed while it is in use."""

    def __init__(
        self,
        name: str,
        answer: UnverifiedPathInfo | Exception | None = None,
        *,
        priority: int | None = None,
        says: CacheInfo | Exception | asyncio.Event | None = None,
    ) -> None:
        self.url = name
        self.answer = answer
        self.asked = 0
        self.closed = False
        self.hold: asyncio.Event | None = None
        self._priority = priority
        self._says = says
        self._learnt = 50

    @property
    def priority(self) -> int:
        return self._learnt if self._priority is None else self._priority

    async def nix_cache_info(self) -> CacheInfo:
        if isinstance(self._says, asyncio.Event):
            await self._says.wait()
            self._learnt = 1
            return CacheInfo(priority=1)
        if isinstance(self._says, Exception):
            raise self._says
        info = self._says or CacheInfo()
        self._learnt = info.priority
        return info

    async def path_info(self, hash_part: str, meter: Meter = unmetered) -> UnverifiedPathInfo | None:
        self.asked += 1
        meter(1)
        if self.hold is not None:
            await self.hold.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def listing(self, hash_part: str, meter: Meter = unmetered) -> bytes | None:
        raise NotImplementedError

    def nar(self, info: UnverifiedPathInfo, meter: Meter = unmetered) -> AsyncGenerator[bytes, None]:
        raise NotImplementedError

    async def part(self, info: UnverifiedPathInfo, offset: int, size: int, meter: Meter = unmetered) -> bytes:
        raise NotImplementedError

    async def sidecar(
        self, hash_part: str, suffix: str, limit: int, meter: Meter = unmetered
    ) -> bytes | None:
        raise NotImplementedError

    async def close(self) -> None:
        self.closed = True


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def run(body: Callable[[Clock], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(body(Clock()), 10)

    asyncio.run(main())


async def who_has(chain: SourceChain) -> tuple[list[str], list[Exception]]:
    answers = chain.path_infos(HASH)
    return [source.url async for source, _ in answers], answers.failures


def test_lower_priority_first_then_position() -> None:
    async def body(clock: Clock) -> None:
        chain = SourceChain(
            [Fake("a", INFO, priority=50), Fake("b", INFO, priority=40), Fake("c", INFO, priority=40)],
            clock=clock,
        )
        assert await who_has(chain) == (["b", "c", "a"], [])

    run(body)


def test_a_caches_own_priority_counts_where_its_url_gives_none() -> None:
    async def body(clock: Clock) -> None:
        chain = SourceChain(
            [
                Fake("a", INFO, says=CacheInfo(priority=45)),
                Fake("b", INFO, says=CacheInfo(priority=30)),
                Fake("c", INFO, priority=10, says=CacheInfo(priority=99)),
            ],
            clock=clock,
        )
        assert [source.url for source in chain.sources] == ["c", "a", "b"]
        assert (await who_has(chain))[0] == ["c", "b", "a"]
        assert [source.url for source in chain.sources] == ["c", "b", "a"]

    run(body)


def test_a_slow_description_does_not_hold_questions_up_for_long() -> None:
    async def body(clock: Clock) -> None:
        gate = asyncio.Event()
        chain = SourceChain([Fake("a", INFO), Fake("slow", INFO, says=gate)], clock=clock, learn_seconds=0.01)
        assert (await who_has(chain))[0] == ["a", "slow"]
        gate.set()
        await asyncio.sleep(0.01)
        assert (await who_has(chain))[0] == ["slow", "a"]
        await chain.close()

    run(body)


def test_a_single_source_is_not_asked_for_its_description() -> None:
    async def body(clock: Clock) -> None:
        chain = SourceChain([Fake("a", INFO, says=SourceError("never asked"))], clock=clock)
        assert await who_has(chain) == (["a"], [])

    run(body)


def test_sources_without_the_path_are_passed_over_without_failure() -> None:
    async def body(clock: Clock) -> None:
        assert await who_has(SourceChain([Fake("a"), Fake("b", INFO), Fake("c")], clock=clock)) == (["b"], [])
        assert await who_has(SourceChain([Fake("a"), Fake("b")], clock=clock)) == ([], [])
        assert await who_has(SourceChain([], clock=clock)) == ([], [])

    run(body)


def test_later_sources_are_asked_only_when_the_iteration_goes_on() -> None:
    async def body(clock: Clock) -> None:
        first, second = Fake("a", INFO), Fake("b", INFO)
        answers = SourceChain([first, second], clock=clock).path_infos(HASH)
        assert (await anext(answers))[0] is first
        assert second.asked == 0

    run(body)


def test_failures_are_collected_and_the_next_source_answers() -> None:
    async def body(clock: Clock) -> None:
        down, odd = SourceError("down", where="a"), FormatError("odd", where="b")
        chain = SourceChain([Fake("a", down), Fake("b", odd), Fake("c", INFO)], clock=clock)
        assert await who_has(chain) == (["c"], [down, odd])

    run(body)


def test_a_failed_source_rests_and_is_then_tried_again() -> None:
    async def body(clock: Clock) -> None:
        flaky = Fake("a", SourceError("down", where="http://a"))
        chain = SourceChain([flaky, Fake("b", INFO)], clock=clock, rest_seconds=5)
        await who_has(chain)
        for _ in range(3):
            names, failures = await who_has(chain)
            assert names == ["b"]
            assert isinstance(failures[0], SourceError)
            assert str(failures[0]) == "resting after a failure: down (http://a)"
        assert flaky.asked == 1
        assert chain.resting() == {"a": "down (http://a)"}
        clock.now += 5
        await who_has(chain)
        assert flaky.asked == 2
        clock.now += 5
        flaky.answer = INFO
        assert await who_has(chain) == (["a", "b"], [])
        assert chain.resting() == {}

    run(body)


def test_a_malformed_answer_puts_nobody_to_rest() -> None:
    async def body(clock: Clock) -> None:
        odd = Fake("a", FormatError("odd"))
        chain = SourceChain([odd], clock=clock)
        await who_has(chain)
        await who_has(chain)
        assert odd.asked == 2
        assert chain.resting() == {}

    run(body)


def test_after_the_rest_one_question_tries_for_all() -> None:
    async def body(clock: Clock) -> None:
        flaky = Fake("a", SourceError("down"))
        chain = SourceChain([flaky], clock=clock, rest_seconds=5)
        await who_has(chain)
        clock.now += 5
        flaky.hold = asyncio.Event()
        first = asyncio.create_task(who_has(chain))
        await asyncio.sleep(0)
        others = await asyncio.gather(*(who_has(chain) for _ in range(5)))
        assert all(len(failures) == 1 for _, failures in others)
        assert flaky.asked == 2
        flaky.answer = INFO
        flaky.hold.set()
        assert await first == (["a"], [])
        assert await who_has(chain) == (["a"], [])

    run(body)


def test_a_cancelled_trial_lets_the_next_question_try() -> None:
    async def body(clock: Clock) -> None:
        flaky = Fake("a", SourceError("down"))
        chain = SourceChain([flaky], clock=clock, rest_seconds=5)
        await who_has(chain)
        clock.now += 5
        flaky.answer = INFO
        flaky.hold = asyncio.Event()
        trial = asyncio.create_task(who_has(chain))
        await asyncio.sleep(0)
        trial.cancel()
        await asyncio.gather(trial, return_exceptions=True)
        flaky.hold.set()
        assert await who_has(chain) == (["a"], [])

    run(body)


def test_a_source_whose_description_cannot_be_had_rests_at_once() -> None:
    async def body(clock: Clock) -> None:
        down = Fake("a", INFO, says=SourceError("down"))
        chain = SourceChain([down, Fake("b", INFO)], clock=clock)
        names, failures = await who_has(chain)
        assert names == ["b"]
        assert len(failures) == 1
        assert down.asked == 0

    run(body)


def test_the_meter_is_handed_on() -> None:
    async def body(clock: Clock) -> None:
        counted: list[int] = []
        await anext(SourceChain([Fake("a", INFO)], clock=clock).path_infos(HASH, counted.append))
        assert counted == [1]

    run(body)


def test_close_closes_every_source_though_one_fails() -> None:
    class Stubborn(Fake):
        async def close(self) -> None:
            raise SourceError("stuck")

    async def body(clock: Clock) -> None:
        gate = asyncio.Event()
        sources = [Stubborn("a", INFO), Fake("b", INFO, says=gate)]
        chain = SourceChain(sources, clock=clock, learn_seconds=0.01)
        await who_has(chain)
        with pytest.raises(SourceError, match="stuck"):
            await chain.close()
        assert sources[1].closed

    run(body)
