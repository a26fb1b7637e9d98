"""The bound on bytes under way: one under, at and over it, in which order, and what is left after failures."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from veneer.store.in_flight import InFlight
from veneer.store.store import STREAM_BYTES, Limits

LIMIT = 100


class Users:
    """Tasks that hold bytes until they are told to let go."""

    def __init__(self, gate: InFlight) -> None:
        self.gate = gate
        self.inside: list[str] = []
        self.most = 0
        self.over: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, name: str, size: int, *, urgent: bool = True) -> None:
        """It is in, or waits."""
        self.over[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._use(name, size, urgent))
        await settle()

    async def go(self, name: str) -> None:
        self.over[name].set()
        await self.tasks.pop(name)
        await settle()

    async def _use(self, name: str, size: int, urgent: bool) -> None:
        async with self.gate.hold(size, urgent=urgent):
            self.inside.append(name)
            self.most = max(self.most, self.gate.held)
            await self.over[name].wait()
            self.inside.remove(name)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def run(body: Callable[[Users], Awaitable[None]]) -> None:
    async def main() -> None:
        users = Users(InFlight(LIMIT))
        await body(users)
        for name in list(users.tasks):
            await users.go(name)
        assert users.gate.held == 0

    asyncio.run(asyncio.wait_for(main(), 10))


@pytest.mark.parametrize(("second", "enters"), [(39, True), (40, True), (41, False)])
def test_one_under_at_and_over_the_limit(second: int, enters: bool) -> None:
    async def body(users: Users) -> None:
        await users.come("a", 60)
        await users.come("b", second)
        assert users.inside == ["a", *(["b"] if enters else [])]
        await users.go("a")
        assert users.inside == ["b"]

    run(body)


def test_what_is_larger_than_the_limit_goes_alone() -> None:
    async def body(users: Users) -> None:
        await users.come("small", 1)
        await users.come("large", 5 * LIMIT)
        await users.come("next", 1)
        assert users.inside == ["small"]
        await users.go("small")
        assert users.inside == ["large"]
        await users.go("large")
        assert users.inside == ["next"]

    run(body)


def test_readers_go_before_what_nobody_waits_for() -> None:
    async def body(users: Users) -> None:
        await users.come("a", LIMIT)
        await users.come("ahead", 10, urgent=False)
        await users.come("reader", 10)
        await users.go("a")
        assert users.inside == ["reader", "ahead"]

    run(body)


def test_what_nobody_waits_for_leaves_half_to_readers() -> None:
    async def body(users: Users) -> None:
        for n in range(5):
            await users.come(f"ahead {n}", 20, urgent=False)
        assert users.inside == ["ahead 0", "ahead 1"]
        await users.come("reader", 60)
        assert users.inside[-1] == "reader"
        assert users.most <= LIMIT
        await users.go("reader")

    run(body)


def test_who_is_cancelled_waiting_or_inside_leaves_nothing() -> None:
    async def body(users: Users) -> None:
        await users.come("a", LIMIT)
        await users.come("b", LIMIT)
        await users.come("c", LIMIT)
        for name in ("b", "a"):
            task = users.tasks.pop(name)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await settle()
        assert users.inside[-1] == "c"
        assert users.gate.held == LIMIT

    run(body)


def test_many_who_are_cancelled_together_leave_nothing() -> None:
    async def body(users: Users) -> None:
        for n in range(10):
            await users.come(str(n), 60, urgent=n % 2 == 0)
        for task in users.tasks.values():
            task.cancel()
        found = await asyncio.gather(*users.tasks.values(), return_exceptions=True)
        users.tasks.clear()
        assert {type(each) for each in found} == {asyncio.CancelledError}
        assert users.gate.held == 0
        await users.come("after", LIMIT)
        assert users.inside[-1] == "after"

    run(body)


def test_who_is_cancelled_at_the_moment_of_its_turn_gives_it_on() -> None:
    async def main() -> None:
        gate = InFlight(LIMIT)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(gate.hold(LIMIT, urgent=True))
            users = Users(gate)
            await users.come("b", LIMIT)
            await users.come("c", LIMIT)
            await stack.aclose()  # b's turn is given, b has not run yet
            users.tasks["b"].cancel()
            await settle()
            assert users.inside == ["c"]
            await users.go("c")
        assert gate.held == 0

    asyncio.run(asyncio.wait_for(main(), 10))


@pytest.mark.parametrize(
    ("memory", "downloads"), [(32 << 20, 4), (64 << 20, 8), ((64 << 20) - 1, 7), (128 << 20, 8)]
)
def test_little_memory_means_fewer_downloads_at_once(memory: int, downloads: int) -> None:
    limits = Limits(memory=memory)
    assert STREAM_BYTES == 4 << 20
    assert limits.whole_downloads == downloads
    assert limits.whole_downloads * STREAM_BYTES <= memory // 2
