"""How fast one source may be asked: bytes and requests per second, each a bucket that fills evenly and holds one second's worth.

Who has to wait does so in turns of PIECE bytes, first come, first served. So a reader among n transfers of the source has at
least one part in n of its rate, however much is being prefetched.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from weakref import WeakValueDictionary

from .options import SourceConfig

PIECE = 64 << 10


class Pace:
    """Of one source, shared by all views that name it with the same limits. Event loop only. None: without limit."""

    def __init__(
        self,
        bytes_per_second: float | None = None,
        requests_per_second: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        def bucket(rate: float | None) -> _Bucket | None:
            return None if rate is None else _Bucket(rate, clock, sleep)

        self._bytes = bucket(bytes_per_second)
        self._requests = bucket(requests_per_second)

    async def request(self) -> None:
        """Wait until one more question may be asked."""
        if self._requests is not None:
            await self._requests.take(1)

    async def received(self, size: int) -> None:
        """``size`` bytes of a body came; wait until more may. Who does not ask for more stops the sender."""
        if self._bytes is None:
            return
        for start in range(0, size, PIECE):
            await self._bytes.take(min(PIECE, size - start))

    def spent(self, size: int) -> None:
        """``size`` bytes came at once, and whoever asked need not wait: those that come next do."""
        if self._bytes is not None:
            self._bytes.spend(size)


class _Bucket:
    def __init__(
        self, rate: float, clock: Callable[[], float], sleep: Callable[[float], Awaitable[object]]
    ) -> None:
        self._rate = rate
        self._most = max(rate, 1.0)
        self._clock = clock
        self._sleep = sleep
        self._there = self._most
        self._at = clock()
        self._turn = asyncio.Lock()  # its waiters are served in their order

    async def take(self, amount: float) -> None:
        async with self._turn:
            self.spend(amount)
            if self._there < 0:
                await self._sleep(-self._there / self._rate)

    def spend(self, amount: float) -> None:
        now = self._clock()
        self._there = min(self._most, self._there + (now - self._at) * self._rate) - amount
        self._at = now


class Paces:
    """The paces of one daemon's sources."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[tuple[str, int | None, float | None], Pace] = WeakValueDictionary()

    def of(self, config: SourceConfig) -> Pace:
        """The same for everybody who names the source with these limits."""
        key = (config.url, config.bytes_per_second, config.requests_per_second)
        pace = self._known.get(key)
        if pace is None:
            pace = self._known[key] = Pace(config.bytes_per_second, config.requests_per_second)
        return pace
