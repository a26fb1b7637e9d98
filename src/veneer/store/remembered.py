"""A source whose narinfo answers are kept in the cache's index: each is asked once, ever.

Positive answers stay for ever (a store path's narinfo may gain signatures, but what it describes cannot change), unless
they turn out to be of no use (``doubt``): a byte was flipped on the way, or the NAR lies elsewhere now.
Negative answers are believed for the view's ``negative_ttl`` seconds. Concurrent questions for one hash part share one
request. Listings are not kept here: they become tree indexes.

A narinfo that announces a bundle (``bundled``) has it fetched at once, unless most of what it refers to is known, or a trace
told what is wanted of it (``traced``). What a bundle says is remembered like an answer. Should it be of no use, the source
itself is asked at once, not after a time.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

from veneer.cache.index import Index
from veneer.formats import bundle
from veneer.formats.cache_info import CacheInfo
from veneer.formats.narinfo import parse_narinfo, write_narinfo
from veneer.model.errors import SourceError
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.tasks import is_cancelled, tell_bugs
from veneer.sources.base import Meter, Source, unmetered
from veneer.sources.opening import Tell, unheard

from .bundled import BundledPath, Bundles
from .expected import Expected

T = TypeVar("T")

PARSED_KEPT = 4096
"""Parsed narinfos held in memory; the rest is in the index."""
BUNDLED_KEPT = 100_000
WAITING_KEPT = 1000


class RememberedSource:
    """``inner`` with a memory. Implements ``sources.base.Source``."""

    def __init__(
        self,
        inner: Source,
        index: Index,
        clock: Callable[[], float],
        *,
        negative_ttl: float,
        store_dir: str,
        tell: Tell = unheard,
    ) -> None:
        """``tell``: failures that stop nothing."""
        self._inner = inner
        self._index = index
        self._clock = clock
        self._ttl = negative_ttl
        self._store_dir = store_dir
        self._parsed: OrderedDict[str, UnverifiedPathInfo] = OrderedDict()
        self._open: dict[str, asyncio.Task[UnverifiedPathInfo | None]] = {}
        self._doubted: dict[str, float] = {}
        """Until when doubted answers are believed; hash part -> clock."""
        self._bundles = Bundles(inner, store_dir, self._take, tell)
        self._bundled: OrderedDict[str, None] = OrderedDict()
        """Whose answers came in a bundle, as far as we remember."""
        self._expected = Expected()
        self._traced: Counter[str] = Counter()
        self._waiting: OrderedDict[str, UnverifiedPathInfo] = OrderedDict()
        """Traced roots, whose bundles are fetched when somebody wants their closures."""
        self._misled: set[str] = set()
        """Whose answers came in a bundle and were of no use."""

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
        if not doubted and hash_part in self._misled:
            return None
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
            info = parse_narinfo(row.body, store_dir=self._store_dir)
            self._want_bundle(info, unmetered)  # who asked before may have been interrupted
            return self._keep(hash_part, info)
        until = row.fetched_at + self._ttl
        return until - self._clock() if self._holds(until) else None

    def doubt(self, hash_part: str) -> None:
        """The path info is not trusted, or there was no NAR where it says: it is believed as long as an absence.

        When it came in a bundle, the source itself has not been asked yet, and is next time.
        """
        if hash_part in self._bundled:
            del self._bundled[hash_part]
            self._misled.add(hash_part)
            self._bundles.drop(hash_part)
            return
        row = self._index.narinfo(self.url, hash_part)
        if row is not None and row.body is not None:
            self._doubted[hash_part] = row.fetched_at + self._ttl

    def is_misled(self, hash_part: str) -> bool:
        """Whether what is known came in a bundle and was of no use: the source itself may say something else."""
        return hash_part in self._misled

    async def bundled(self, hash_part: str) -> None:
        """For those who are in no hurry: wait for the bundle that is to have the path, if one is under way."""
        await self._bundles.arrived(hash_part)

    @contextmanager
    def traced(self, hash_parts: Collection[str]) -> Iterator[None]:
        """All that is wanted now is among these: their bundles are not. Sidecars may be expected until the block ends."""
        self._traced.update(hash_parts)
        try:
            yield
        finally:
            self._traced.subtract(hash_parts)
            self._traced += Counter()  # without those that are at zero
            self._expected.give_up(hash_parts)

    def expect_listing(self, hash_part: str, meter: Meter) -> None:
        """Ask for it now; who calls ``listing`` next gets it. Only in a block of ``traced``."""
        if not self._bundles.has(hash_part, bundle.LISTING):
            self._expected.ask(hash_part, bundle.LISTING, self._inner.listing(hash_part, meter))

    def expect_sidecar(self, hash_part: str, suffix: str, limit: int, meter: Meter) -> None:
        """As ``expect_listing``, for who calls ``sidecar`` next."""
        if not self._bundles.has(hash_part, suffix):
            self._expected.ask(hash_part, suffix, self._inner.sidecar(hash_part, suffix, limit, meter))

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
            task = asyncio.create_task(self._ask(hash_part, meter), name=f"narinfo {hash_part}")
            self._open[hash_part] = task
            task.add_done_callback(lambda done: self._closed(hash_part, done))
        if (under_way := self._bundles.under_way(hash_part)) is not None:
            await asyncio.wait({task, under_way}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and isinstance(known := self.recall(hash_part), UnverifiedPathInfo):
                return known
        return await self._answered(asyncio.shield(task))

    async def listing(self, hash_part: str, meter: Meter = unmetered) -> bytes | None:
        kept = self._bundles.take(hash_part, bundle.LISTING)
        if kept is not None:
            return kept
        expected = self._expected.take(hash_part, bundle.LISTING)
        return await self._answered(expected or self._inner.listing(hash_part, meter))

    def nar(self, info: UnverifiedPathInfo, meter: Meter = unmetered) -> AsyncGenerator[bytes, None]:
        return self._inner.nar(info, meter)

    async def part(self, info: UnverifiedPathInfo, offset: int, size: int, meter: Meter = unmetered) -> bytes:
        return await self._inner.part(info, offset, size, meter)

    async def sidecar(
        self, hash_part: str, suffix: str, limit: int, meter: Meter = unmetered
    ) -> bytes | None:
        kept = self._bundles.take(hash_part, suffix) if suffix == bundle.CHUNKS else None
        if kept is not None and len(kept) <= limit:
            return kept
        expected = self._expected.take(hash_part, suffix)
        return await self._answered(expected or self._inner.sidecar(hash_part, suffix, limit, meter))

    async def close(self) -> None:
        await self._bundles.close()
        await self._expected.close()
        for task in list(self._open.values()):
            task.cancel()
        await asyncio.gather(*self._open.values(), return_exceptions=True)
        await self._inner.close()

    async def _answered(self, answer: Awaitable[T]) -> T:
        """SourceError where the view was closed meanwhile: whoever waits was not cancelled, and may be of another view."""
        try:
            return await answer
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            raise SourceError(
                "given up: nobody is connected any more who uses this source", where=self.url
            ) from None

    async def _ask(self, hash_part: str, meter: Meter) -> UnverifiedPathInfo | None:
        info = await self._inner.path_info(hash_part, meter)
        body = None if info is None else write_narinfo(info)
        self._index.put_narinfo(self.url, hash_part, body, self._clock())
        self._doubted.pop(hash_part, None)
        self._misled.discard(hash_part)
        self._bundled.pop(hash_part, None)
        self._parsed.pop(hash_part, None)
        if info is None:
            return None
        self._want_bundle(info, meter)
        return self._keep(hash_part, info)

    def want_closure(self, hash_part: str, meter: Meter = unmetered) -> None:
        """All that the path refers to will be asked for: now its bundle is of use, though it was traced.

        What it refers to itself may be known from the trace, which says nothing of what comes behind that.
        """
        root = self._waiting.pop(hash_part, None)
        if root is not None:
            self._bundles.begin(root, meter)

    def _want_bundle(self, root: UnverifiedPathInfo, meter: Meter) -> None:
        """Fetch its bundle if there is one and most of what it refers to would have to be asked for."""
        if not bundle.is_announced(root):
            return
        if root.store_path.hash_part in self._traced:
            self._waiting[root.store_path.hash_part] = root
            if len(self._waiting) > WAITING_KEPT:
                self._waiting.popitem(last=False)
            return
        parts = {path.hash_part for path in root.references if path != root.store_path}
        rows = self._index.narinfos(self.url, parts)
        if 2 * sum(row.body is not None for row in rows.values()) < len(parts):
            self._bundles.begin(root, meter)

    def _take(self, paths: list[BundledPath]) -> None:
        """Remember what a bundle says, where the source itself has not said it yet. CacheError."""
        rows = self._index.narinfos(self.url, [path.info.store_path.hash_part for path in paths])
        for path in paths:
            part = path.info.store_path.hash_part
            row = rows.get(part)
            if row is None or row.body is None:
                self._index.put_narinfo(self.url, part, path.narinfo, self._clock())
                self._bundled[part] = None
                self._keep(part, path.info)
            elif not _is_same(self.recall(part, doubted=True), path.info):
                continue  # the bundle is older: its listing and chunk map are of another NAR file
            self._bundles.keep(part, path.beside)
        while len(self._bundled) > BUNDLED_KEPT:
            self._bundled.popitem(last=False)

    def _holds(self, until: float) -> bool:
        return 0 < until - self._clock() <= self._ttl  # more: the clock was set back since

    def _keep(self, hash_part: str, info: UnverifiedPathInfo) -> UnverifiedPathInfo:
        self._parsed[hash_part] = info
        if len(self._parsed) > PARSED_KEPT:
            self._parsed.popitem(last=False)
        return info

    def _closed(self, hash_part: str, task: asyncio.Task[UnverifiedPathInfo | None]) -> None:
        del self._open[hash_part]
        tell_bugs(task)  # other failures are its waiters'; without any, the next question's


def _is_same(known: UnverifiedPathInfo | float | None, info: UnverifiedPathInfo) -> bool:
    """Whether both are of the same NAR file."""
    return isinstance(known, UnverifiedPathInfo) and (known.nar_hash, known.url) == (info.nar_hash, info.url)
