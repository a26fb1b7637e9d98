"""A bound on the bytes that parts of NARs under way hold in memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class InFlight:
    """At most ``limit`` bytes at a time; one request that is larger by itself goes alone. Event loop only.

    First come, first served, in two classes: while somebody ``urgent`` waits nobody else begins, and who is not urgent
    begins only while no more than half is held.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: dict[bool, deque[tuple[int, asyncio.Future[None]]]] = {True: deque(), False: deque()}
        self.held = 0

    @asynccontextmanager
    async def hold(self, size: int, *, urgent: bool) -> AsyncGenerator[None, None]:
        """Hold ``size`` bytes; waits until there is room for them."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[urgent].append((size, turn))
        self._begin()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it had its turn at the same moment
                self.held -= size
            self._begin()
            raise
        try:
            yield
        finally:
            self.held -= size
            self._begin()

    def _begin(self) -> None:
        """Let in who may, in their order."""
        for urgent, limit in ((True, self._limit), (False, self._limit // 2)):
            waiting = self._waiting[urgent]
            while waiting and (
                waiting[0][1].cancelled() or not self.held or self.held + waiting[0][0] <= limit
            ):
                size, turn = waiting.popleft()
                if turn.cancelled():
                    continue
                self.held += size
                turn.set_result(None)
            if waiting:
                return
