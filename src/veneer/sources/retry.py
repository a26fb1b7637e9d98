"""When a failed question is asked again, and how long to wait before."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from .options import SourceOptions
from .transport import Fault, TransferError


@dataclass(frozen=True, slots=True)
class Retry:
    """The policy of one source: ``options.tries`` tries, exponential backoff, Retry-After honoured up to a limit."""

    options: SourceOptions
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    vary: Callable[[], float] = random.random
    """0 to 1, anew each time."""

    def is_over(self, failure: TransferError, tried: int) -> bool:
        """Whether ``failure`` of try number ``tried`` (from 1) is final."""
        if failure.fault is not Fault.PASSING or tried >= self.options.tries:
            return True
        return (failure.retry_after or 0.0) > self.options.most_backoff_seconds

    def delay(self, failure: TransferError, tried: int) -> float:
        """Seconds between try number ``tried`` and the next one."""
        backoff = min(self.options.backoff_seconds * 2.0 ** (tried - 1), self.options.most_backoff_seconds)
        return max(backoff * (0.5 + self.vary()), failure.retry_after or 0.0)

    async def pause(self, failure: TransferError, tried: int) -> None:
        await self.sleep(self.delay(failure, tried))
