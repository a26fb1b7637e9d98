"""Loads what a trace tells ahead of the reads: metadata of all its paths at once, contents in order of first touch.

It is background work: readers go first, its failures are stories, and it takes no more than the cache may hold. Each path
goes through by itself, so that the first contents move while the last narinfos are asked for. A trace of at most
PARALLEL_METADATA paths knows better than a closure bundle what is wanted: neither the bundle nor any other metadata of the closure is
fetched before something else is looked up; listings are asked for together with the narinfos, chunk maps together with the listings.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import ExitStack

from veneer.cache.index import NarState
from veneer.formats import chunk_map
from veneer.formats.trace import Ranges, Trace, TracedPath
from veneer.model.errors import VeneerError
from veneer.model.store_path import StorePath

from .account import Account, Prefetched
from .remembered import RememberedSource
from .resolve import AbsentError
from .store import Store
from .trace_match import nar_ranges, successors
from .views import View

PARALLEL_METADATA = 64
PARALLEL_WHOLE = 4
"""Paths without a listing whose trees come with their NARs."""

Progress = Callable[[dict[str, object]], None]


class Prefetch:
    """One trace for one session; event loop only. ``run`` may be called once.

    ``roots``: what will be run, as far as that is known: what is not of their closure is looked for in it.
    """

    def __init__(
        self, store: Store, view: View, account: Account, trace: Trace, roots: Collection[StorePath] = ()
    ) -> None:
        self._store = store
        self._view = view
        self._account = account
        self._trace = trace
        self._roots = roots
        self._metadata = asyncio.Semaphore(PARALLEL_METADATA)
        self._whole = asyncio.Semaphore(PARALLEL_WHOLE)
        self._size = 0
        self._sources = [source for source in view.chain.sources if isinstance(source, RememberedSource)]
        self._together = len(trace) <= PARALLEL_METADATA
        self.outcome = account.prefetched = Prefetched(len(trace))
        self.failure: VeneerError | OSError | None = None
        """The first."""

    async def run(self, progress: Progress) -> Prefetched:
        """Until everything is here that can be had. VeneerErrors are stories, and counted."""
        total = sum(traced.bytes for traced in self._trace)
        done = size = 0

        async def one(traced: TracedPath, path: StorePath) -> None:
            nonlocal done, size
            await self._one(traced, path)
            account.guided.discard(path)
            done += 1
            size += traced.bytes
            progress({"paths_done": done, "paths": len(self._trace), "bytes_done": size, "bytes": total})

        account = self._account
        stand_ins = await self._stand_ins()
        paths = [stand_ins.get(traced.path, traced.path) for traced in self._trace]
        account.traced.update(paths)
        account.guided.update(paths)
        try:
            with ExitStack() as block:
                if self._together:
                    account.postponed = {} if account.postponed is None else account.postponed
                    for source in self._sources:
                        block.enter_context(source.traced([path.hash_part for path in paths]))
                async with asyncio.TaskGroup() as group:
                    for traced, path in zip(self._trace, paths, strict=True):
                        group.create_task(one(traced, path))
        finally:
            account.guided.difference_update(paths)
        return self.outcome

    async def _stand_ins(self) -> dict[StorePath, StorePath]:
        """Path of the trace -> the one of the roots' closure that stands for it. Where the roots are in the trace, so is their closure."""
        known = [traced.path for traced in self._trace]
        if not set(self._roots) - set(known):
            return {}
        closure: set[StorePath] = set()
        for root in self._roots:
            try:
                closure |= (await self._store.closure(self._view, [root], self._account)).keys()
            except VeneerError as error:
                self._failed(str(root), error)
        changed = [path for path in known if path not in closure]
        return successors(changed, closure, known)

    async def _one(self, traced: TracedPath, path: StorePath) -> None:
        outcome = self.outcome
        try:
            fits = await self._loaded(traced, path)
        except AbsentError:
            outcome.unmatched += 1
        except (VeneerError, OSError) as error:
            outcome.failed += 1
            self._failed(str(path), error)
        else:
            outcome.done += fits
            outcome.skipped += not fits
            outcome.changed += fits and path != traced.path

    async def _loaded(self, traced: TracedPath, path: StorePath) -> bool:
        """Whether it fitted."""
        store, view, account = self._store, self._view, self._account
        async with self._metadata:
            self._expect_listing(path)
            candidate = await store.resolver.best(view, path, account)
            info = candidate.info
            if traced.files and self._together:
                store.expect_parts(candidate, account)
            listed = await store.listed(view, info, account)
        if not listed:  # its tree comes with its NAR, whatever file is wanted of it
            if not self._fits(info.info.nar_size):
                return False
            async with self._whole:
                await store.lookup(view, path, account, root_only=not traced.files)
            return True
        row = await store.lookup(view, path, account)
        if traced.files:
            ranges = await asyncio.to_thread(self._ranges, row.number, traced)
            wanted = sum(size for _, size in ranges)
            self.outcome.bytes += wanted
            if ranges:
                size = wanted if chunk_map.is_announced(info.info) else row.nar_size
                if not self._fits(size):
                    return False
                await store.load(view, path, ranges, account)
                now = store.cache.index.path(row.number)
                is_whole = now is not None and now.nar == NarState.WHOLE
                self._size += (row.nar_size if is_whole else wanted) - size
        return True

    def _expect_listing(self, path: StorePath) -> None:
        """Of the first source, which is the likeliest to have the path, unless its narinfo is here already."""
        if self._together and self._sources and self._sources[0].recall(path.hash_part) is None:
            self._sources[0].expect_listing(path.hash_part, self._account.book_metadata)

    def _ranges(self, number: int, traced: TracedPath) -> Ranges:
        """On a worker thread. FormatError also when the tree was just evicted."""
        return nar_ranges(traced.files, self._store.cache.trees.open(number))

    def _fits(self, size: int) -> bool:
        limit = self._store.cache.max_bytes
        if limit is not None and self._size + size > limit:
            return False
        self._size += size
        return True

    def _failed(self, where: str, error: VeneerError | OSError) -> None:
        self._store.stories.add(f"prefetch {where}", error)
        self.failure = self.failure or error
