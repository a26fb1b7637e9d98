"""The daemon's store in this process: what it answers, announces and tells."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.support.caches import Clock, open_cache, read_ready
from tests.support.golden import KEY
from tests.support.published_cache import PublishedCache
from tests.support.signed_cache import MadePath, SignedCache
from veneer.cache.cache import Cache
from veneer.cache.index import NarState, PathRow
from veneer.daemon.compose import build_view
from veneer.formats.tree_index import TreeIndex
from veneer.model.store_path import StorePath
from veneer.store.account import Account
from veneer.store.store import Limits, Notices, Store
from veneer.store.views import View, ViewConfig


class Bench:
    """A store, its cache and what it announced."""

    def __init__(self, cache: Cache, clock: Clock) -> None:
        self.cache = cache
        self.clock = clock
        self.dropped: list[int] = []
        self.condemned: list[tuple[int, StorePath]] = []
        self.present: list[StorePath] = []
        self.notices = Notices(
            self.dropped.append,
            lambda number, path: self.condemned.append((number, path)),
            self.present.append,
        )
        self.store = Store(cache, clock, self.notices, Limits(prefetch=False))
        self.account = Account()
        self.views: list[View] = []

    def view(
        self, *urls: str, keys: tuple[str, ...] = (KEY,), verify: str = "strict", ttl: float = 10.0
    ) -> View:
        config = ViewConfig.from_json(
            {
                "sources": [{"url": url, "verify": verify} for url in urls],
                "keys": keys,
                "negative_ttl": ttl,
            }
        )
        view = build_view(config, self.cache, self.clock)
        self.views.append(view)
        return view

    async def opened(
        self, cache: PublishedCache | SignedCache, made: MadePath, query: str = "", verify: str = "strict"
    ) -> tuple[View, PathRow]:
        """A view of ``cache`` in which ``made`` was looked up."""
        view = self.view(cache.url + query, keys=(cache.key,), verify=verify)
        return view, await self.looked_up(view, made)

    async def read(self, view: View, row: PathRow, offset: int, size: int) -> bytes:
        """As a mount server does."""
        ready = await self.store.content(view, row.number, offset, size, self.account)
        return read_ready(self.cache, ready, offset, size)

    async def looked_up(self, view: View, made: MadePath) -> PathRow:
        return await self.store.lookup(view, made.path, self.account)

    def nar(self, number: int) -> bytes:
        return self.cache.nars.path(number).read_bytes()

    def state(self, row: PathRow) -> NarState:
        now = self.cache.index.path(row.number)
        assert now is not None
        return now.nar

    def tree(self, number: int) -> TreeIndex:
        return TreeIndex(self.cache.trees.path(number).read_bytes())

    def stories(self) -> str:
        return "\n".join(f"{story.path}: {story.text}" for story in self.store.stories.rows())

    async def close(self) -> None:
        await self.store.close()
        for view in self.views:
            await view.close()
        self.cache.close()


def run(tmp_path: Path, body: Callable[[Bench], Awaitable[None]]) -> None:
    """``body`` with a store whose cache is in ``tmp_path``. No failure may stay unheard."""
    lost: list[dict[str, object]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))
        clock = Clock()
        bench = Bench(open_cache(tmp_path / "cache", clock), clock)
        try:
            await body(bench)
        finally:
            await bench.close()

    asyncio.run(asyncio.wait_for(main(), 60))
    gc.collect()  # tasks say what nobody heard when they are collected
    assert lost == []


async def settled() -> None:
    """Nothing is under way."""
    names = ("libraries of", "part", "rest of", "digests", "metadata ahead", "tree ", "fetch ")
    while tasks := [task for task in asyncio.all_tasks() if task.get_name().startswith(names)]:
        await asyncio.wait(tasks)


def eager(body: Callable[[Bench], Awaitable[None]]) -> Callable[[Bench], Awaitable[None]]:
    """With prefetching on."""

    async def prefetching(bench: Bench) -> None:
        await bench.store.close()
        bench.store = Store(bench.cache, bench.clock, bench.notices, Limits())
        await body(bench)

    return prefetching
