"""A source whose narinfo answers are kept in the cache's index: each is asked once, ever.

Positive answers stay for ever (a store path's narinfo may gain signatures, but what it describes cannot change), unless
they turn out to be of no use (``doubt``): a byte was flipped on the way, or the NAR lies elsewhere now.
Negative answers are believed for the view's ``negative_ttl`` seconds. Concurrent questions for one hash part share one
request. Listings are not kept here: they become tree indexes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable

from veneer.cache.index import Index
from veneer.formats.cache_info import CacheInfo
from veneer.formats.narinfo import parse_narinfo, write_narinfo
from veneer.model.path_info import UnverifiedPathInfo
from veneer.sources.base import Meter, Source, unmetered

PARSED_KEPT = 4096
"""Parsed narinfos held in memory; the rest is in the index."""


class RememberedSource:
    """``inner`` with a memory. Implements ``sources.base.Source``."""

    def __init__(
        self, inner: Source, index: Index, clock: Callable[[], float], *, negative_ttl: float, store_dir: str
    ) -> None:
        self._inner = inner
        self._index = index
        self._clock = clock
        self._ttl = negative_ttl
        self._store_dir = store_dir
        self._parsed: OrderedDict[str, UnverifiedPathInfo] = OrderedDict()
        self._open: dict[str, asyncio.Task[UnverifiedPathInfo | None]] = {}
        self._doubted: dict[str, float] = {}
        """Until when doubted answers are believed; hash part -> clock."""

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def priority(self) -> int:
        return self._inner.priority

    def recall(self, hash_part: str, *, doubted: bool = False) -> UnverifiedPathInfo | float | None:
        """What is known without asking: the path info, the seconds its absence is still believed, or None (ask).

        ``doubted``: also an answer that it is time to ask for again.
        """
        if not doubted and (until := self._doubted.get(hash_part)) is not None and not self._holds(until):
            return None
        info = self._parsed.get(hash_part)
        if info is not None:
            self._parsed.move_to_end(hash_part)
            return info
        row = self._index.narinfo(self.url, hash_part)
        if row is None:
            return None
        if row.body is not None:
            return self._keep(hash_part, parse_narinfo(row.body, store_dir=self._store_dir))
        until = row.fetched_at + self._ttl
        return until - self._clock() if self._holds(until) else None

    def doubt(self, hash_part: str) -> None:
        """The path info is not trusted, or there was no NAR where it says: it is believed as long as an absence."""
        row = self._index.narinfo(self.url, hash_part)
        if row is not None and row.body is not None:
            self._doubted[hash_part] = row.fetched_at + self._ttl

    async def nix_cache_info(self) -> CacheInfo:
        return await self._inner.nix_cache_info()

    async def path_info(self, hash_part: str, meter: Meter = unmetered) -> UnverifiedPathInfo | None:
        known = self.recall(hash_part)
        if isinstance(known, UnverifiedPathInfo):
            return known
        if known is not None:
            return None
        task = self._open.get(hash_part)
        if task is None:
            task = asyncio.create_task(self._ask(hash_part, meter))
            self._open[hash_part] = task
            task.add_done_callback(lambda done: self._closed(hash_part, done))
        return await asyncio.shield(task)

    async def listing(self, hash_part: str, meter: Meter = unmetered) -> bytes | None:
        return await self._inner.listing(hash_part, meter)

    def nar(self, info: UnverifiedPathInfo, meter: Meter = unmetered) -> AsyncGenerator[bytes, None]:
        return self._inner.nar(info, meter)

    async def part(self, info: UnverifiedPathInfo, offset: int, size: int, meter: Meter = unmetered) -> bytes:
        return await self._inner.part(info, offset, size, meter)

    async def sidecar(
        self, hash_part: str, suffix: str, limit: int, meter: Meter = unmetered
    ) -> bytes | None:
        return await self._inner.sidecar(hash_part, suffix, limit, meter)

    async def close(self) -> None:
        for task in list(self._open.values()):
            task.cancel()
        await asyncio.gather(*self._open.values(), return_exceptions=True)
        await self._inner.close()

    async def _ask(self, hash_part: str, meter: Meter) -> UnverifiedPathInfo | None:
        info = await self._inner.path_info(hash_part, meter)
        body = None if info is None else write_narinfo(info)
        self._index.put_narinfo(self.url, hash_part, body, self._clock())
        self._doubted.pop(hash_part, None)
        self._parsed.pop(hash_part, None)
        return None if info is None else self._keep(hash_part, info)

    def _holds(self, until: float) -> bool:
        return 0 < until - self._clock() <= self._ttl  # more: the clock was set back since

    def _keep(self, hash_part: str, info: UnverifiedPathInfo) -> UnverifiedPathInfo:
        self._parsed[hash_part] = info
        if len(self._parsed) > PARSED_KEPT:
            self._parsed.popitem(last=False)
        return info

    def _closed(self, hash_part: str, task: asyncio.Task[UnverifiedPathInfo | None]) -> None:
        del self._open[hash_part]
        if not task.cancelled():
            task.exception()  # its waiters have it; without any, the failure is the next question's
