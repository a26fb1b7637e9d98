"""Sidecars of one source that are asked for before it is known that somebody wants them: they come with the narinfo, not after it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

from veneer.model.tasks import tell_bugs

_Key = tuple[str, str]


class Expected:
    """Each goes to the first who asks for it; event loop only. Memory: as many as were asked for and are not given up."""

    def __init__(self) -> None:
        self._tasks: dict[_Key, asyncio.Task[bytes | None]] = {}
        self._running: set[asyncio.Task[bytes | None]] = set()
        """Also those that were taken or given up: ``close`` waits for them."""

    def ask(self, hash_part: str, suffix: str, asking: Coroutine[Any, Any, bytes | None]) -> None:
        """``asking`` is done in the background, unless that one is expected already."""
        key = hash_part, suffix
        if key in self._tasks:
            asking.close()
            return
        task = asyncio.create_task(asking, name=f"{suffix} of {hash_part}")
        task.add_done_callback(tell_bugs)  # other failures are its taker's
        task.add_done_callback(self._running.discard)
        self._tasks[key] = task
        self._running.add(task)

    def take(self, hash_part: str, suffix: str) -> asyncio.Task[bytes | None] | None:
        """The caller awaits it, and it is cancelled with him. None: nobody asked."""
        return self._tasks.pop((hash_part, suffix), None)

    def give_up(self, hash_parts: Iterable[str]) -> None:
        """Nobody will take what is left of these."""
        wanted = set(hash_parts)
        for key in [key for key in self._tasks if key[0] in wanted]:
            self._tasks.pop(key).cancel()

    async def close(self) -> None:
        tasks = list(self._running)
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
