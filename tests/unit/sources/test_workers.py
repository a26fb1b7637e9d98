"""Threads for blocking calls: results, failures, cancelling, the end."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tests.support.callers import eventually
from veneer.sources.workers import Workers


def test_results_and_failures_come_back() -> None:
    async def main() -> None:
        workers = Workers(4, "test")
        assert await workers.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await workers.run(divmod, 7, 0)
        results = await asyncio.gather(*(workers.run(pow, n, 2) for n in range(1000)))
        assert results == [n * n for n in range(1000)]
        workers.close()

    asyncio.run(main())


def alive(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def test_threads_without_work_end_and_come_back_when_there_is_some() -> None:
    async def main() -> None:
        workers = Workers(8, "idle test", idle_seconds=0.02)
        for _ in range(3):
            barrier = threading.Barrier(8)
            await asyncio.gather(*(workers.run(barrier.wait, 10) for _ in range(8)))
            await asyncio.to_thread(eventually, lambda: alive("idle test") == 0)
        gate = threading.Event()
        busy = asyncio.create_task(workers.run(gate.wait, 10))
        await asyncio.gather(*(workers.run(pow, n, 2) for n in range(100)))
        await asyncio.to_thread(eventually, lambda: alive("idle test") == 1)
        gate.set()
        assert await busy
        workers.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_work_that_comes_while_threads_end_is_done() -> None:
    async def main() -> None:
        workers = Workers(4, "test", idle_seconds=0.0005)
        for n in range(300):
            assert await workers.run(pow, n, 2) == n * n
            await asyncio.sleep(0.0005)
        workers.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_at_most_so_many_calls_run_at_once() -> None:
    async def main() -> None:
        workers = Workers(3, "test")
        barrier = threading.Barrier(3)
        lock = threading.Lock()
        running = most = 0

        def call() -> None:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            barrier.wait(10)
            with lock:
                running -= 1
            barrier.wait(10)

        await asyncio.gather(*(workers.run(call) for _ in range(9)))
        assert most == 3
        workers.close()

    asyncio.run(main())


def test_a_cancelled_wait_returns_at_once_and_leaves_the_rest_working() -> None:
    async def main() -> None:
        workers = Workers(1, "test")
        gate = threading.Event()
        ran: list[str] = []
        first = asyncio.create_task(workers.run(gate.wait, 10))
        second = asyncio.create_task(workers.run(ran.append, "never"))
        await asyncio.sleep(0)
        for task in (first, second):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        assert first.cancelled() and second.cancelled()
        gate.set()
        assert await workers.run(pow, 2, 3) == 8
        assert ran == []
        workers.close()

    asyncio.run(main())


def test_what_a_cancelled_caller_did_not_take_is_disposed_of() -> None:
    async def main() -> None:
        workers = Workers(1, "test")  # in order: when a later job is done, so are all before
        made: list[int] = []
        taken: list[int] = []
        disposed: list[int] = []

        def make() -> int:
            made.append(len(made))
            return made[-1]

        async def take() -> None:
            taken.append(await workers.run(make, dispose=disposed.append))

        for turns in range(200):
            task = asyncio.create_task(take())
            for _ in range(turns % 5):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await workers.run(pow, 2, 2)
        assert sorted(taken + disposed) == made
        workers.close()

    asyncio.run(main())


def test_a_thread_that_is_stuck_does_not_hold_the_loop_up() -> None:
    gate = threading.Event()

    async def main() -> None:
        workers = Workers(1, "test")
        task = asyncio.create_task(workers.run(gate.wait, 30))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        workers.close()

    asyncio.run(main())  # returns though the thread still waits
    gate.set()


def test_even_a_panic_of_native_code_comes_back() -> None:
    class Panic(BaseException):
        pass

    def call() -> None:
        raise Panic

    async def main() -> None:
        workers = Workers(1, "test")
        with pytest.raises(Panic):
            await workers.run(call)
        assert await workers.run(pow, 2, 2) == 4
        workers.close()

    asyncio.run(main())


def test_threads_end_with_close() -> None:
    async def main() -> None:
        workers = Workers(5, "ends-with-close")
        await asyncio.gather(*(workers.run(pow, 2, 2) for _ in range(20)))
        workers.close()
        with pytest.raises(RuntimeError):
            await workers.run(pow, 2, 2)

    asyncio.run(main())
    for thread in threading.enumerate():
        if thread.name == "ends-with-close":
            thread.join(10)
            assert not thread.is_alive()
