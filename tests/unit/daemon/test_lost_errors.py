"""Failures of tasks that nobody waits for: bugs become stories, what is expected stays quiet, and a private daemon ends."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Coroutine

import pytest

from veneer.daemon.run import _IdleEnd, lost_errors
from veneer.model.errors import SourceError
from veneer.model.tasks import tell_bugs
from veneer.store.account import Stories


def stories_of(body: Callable[[], Awaitable[None]]) -> list[tuple[str, str, str]]:
    """(kind, about, text) of each story."""
    stories = Stories(lambda: 0.0)

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lost_errors(stories))
        await body()

    asyncio.run(asyncio.wait_for(main(), 10))
    gc.collect()
    return [(story.kind, story.path, story.text) for story in stories.rows()]


async def failing(error: BaseException) -> None:
    raise error


async def ended(work: Coroutine[None, None, None]) -> None:
    task = asyncio.create_task(work, name="narinfo of a path")
    task.add_done_callback(tell_bugs)
    await asyncio.wait({task})
    await asyncio.sleep(0)


def test_a_bug_in_a_task_is_a_story_whether_somebody_waits_or_not() -> None:
    (story,) = stories_of(lambda: ended(failing(KeyError("x"))))
    assert story == ("KeyError", "unexpected failure: narinfo of a path", "KeyError: 'x'")


@pytest.mark.parametrize("error", [SourceError("away"), asyncio.CancelledError()])
def test_what_a_source_does_and_cancelling_are_not(error: BaseException) -> None:
    assert stories_of(lambda: ended(failing(error))) == []


def test_a_failure_that_nobody_looked_at_is_a_story() -> None:
    async def body() -> None:
        task = asyncio.create_task(failing(SourceError("away")))
        await asyncio.wait({task})
        del task
        gc.collect()

    assert [story[:2] for story in stories_of(body)] == [
        ("SourceError", "Task exception was never retrieved")
    ]


def test_a_callback_that_fails_is_a_story() -> None:
    async def body() -> None:
        asyncio.get_running_loop().call_soon(int, "no number")
        await asyncio.sleep(0.01)

    (story,) = stories_of(body)
    assert story[0] == "ValueError"
    assert "callback" in story[1]


def test_a_private_daemon_ends_when_its_last_work_fails_in_an_unexpected_way() -> None:
    async def body() -> None:
        stop = asyncio.Event()

        def work(_: Callable[[], bool]) -> Coroutine[None, None, object]:
            return failing(KeyError("sync"))

        idle = _IdleEnd(stop.set, work)
        idle.connections(0)
        await asyncio.wait_for(stop.wait(), 5)
        idle.close()

    stories_of(body)
