"""What is fetched before somebody asks: the metadata that is looked up next, and the content that ``access`` allows.

Everything here is in the background and its failures are stories: whoever reads asks for himself and gets his own error.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine, Iterable
from typing import Any, Protocol

from veneer.model.path_info import PathInfo
from veneer.model.store_path import StorePath

from . import access
from .account import Account, Stories
from .views import View

LISTINGS = 64
"""Listings of a looked-up path's direct references that are fetched, at most."""
METADATA_TASKS = 8
DOWNLOADS = 4
"""At a time for one session, of what nobody has asked for yet."""


class Doer(Protocol):
    """The store's own ways to have things."""

    def want_closure(self, view: View, path: StorePath, account: Account) -> None:
        """All that the path refers to is asked for next."""
        ...

    async def closure(
        self, view: View, roots: Iterable[StorePath], account: Account
    ) -> dict[StorePath, PathInfo]: ...

    async def listed(self, view: View, info: PathInfo, account: Account) -> object:
        """Publish the path's tree if a listing tells it."""
        ...

    async def ahead(self, view: View, path: StorePath, account: Account) -> bool:
        """Have the whole NAR in the cache, in a place that readers can spare. False: it was there."""
        ...


class Ahead:
    """One per store; event loop only."""

    def __init__(self, doer: Doer, stories: Stories) -> None:
        self._doer = doer
        self._stories = stories
        self._metadata: dict[tuple[str, StorePath], asyncio.Task[None]] = {}
        self._content: dict[Account, asyncio.Task[None]] = {}
        self._metadata_tasks = asyncio.Semaphore(METADATA_TASKS)

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        return [*self._metadata.values(), *self._content.values()]

    def looked_up(self, view: View, info: PathInfo, account: Account) -> None:
        """The closure's narinfos and the direct references' listings are asked for next.

        Of a path in the session's trace only when something is looked up that is not: until then, the trace has all.
        """
        if account.postponed is not None:
            if info.store_path in account.traced:
                account.postponed[info.store_path] = info
                return
            postponed, account.postponed = account.postponed, None
            for traced in postponed.values():
                self.looked_up(view, traced, account)
        key = (view.identity, info.store_path)
        if key not in self._metadata and info.info.references:
            self._metadata[key] = self._begin(
                self._fetch_metadata(view, info, account), f"metadata ahead of {info.store_path}"
            )
            self._metadata[key].add_done_callback(lambda _: self._metadata.pop(key, None))

    def is_complete(self, view: View, account: Account) -> bool:
        """Whether all of the session's closures was asked for, and the answers are here."""
        return account.postponed is None and all(identity != view.identity for identity, _ in self._metadata)

    def wanted(self, view: View, account: Account, limit: int | None) -> None:
        """The session's evidence has changed. ``limit``: the cache's, in bytes."""
        if account in self._content or account.postponed is not None:
            return
        if access.allowance(account.evidence) < account.ahead_wants:
            return
        if limit is not None and account.closure_bytes > limit:
            return  # it would push out what is read, and be fetched again, for ever
        self._content[account] = self._begin(self._fetch_content(view, account), "content ahead")
        self._content[account].add_done_callback(lambda _: self._content.pop(account, None))

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            failure = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
            if isinstance(failure, Exception):
                self._stories.add(task.get_name(), failure)

    async def _fetch_metadata(self, view: View, info: PathInfo, account: Account) -> None:
        references = [r for r in info.info.references if r != info.store_path and r not in account.closure]
        if not references:
            return
        async with self._metadata_tasks:
            self._doer.want_closure(view, info.store_path, account)
            found = await self._doer.closure(view, references, account)
        if len(references) > LISTINGS:
            return
        for reference in references:
            async with self._metadata_tasks:
                await self._doer.listed(view, found[reference], account)

    async def _fetch_content(self, view: View, account: Account) -> None:
        """Paths of the session's closures that it did not ask for, DOWNLOADS at a time, while the allowance lasts."""
        left = [path for path in reversed(account.closure) if path not in account.ahead]
        account.ahead_wants = sys.maxsize

        async def fetch() -> None:
            while left:
                path = left.pop()
                size = account.closure[path]
                if path in account.asked:
                    continue
                if account.ahead_bytes + size > access.allowance(account.evidence):
                    account.ahead_wants = min(account.ahead_wants, account.ahead_bytes + size)
                    continue
                account.ahead[path] = None
                account.ahead_bytes += size
                if not await self._doer.ahead(view, path, account):
                    account.ahead_bytes -= size

        async with asyncio.TaskGroup() as group:
            for _ in range(DOWNLOADS):
                group.create_task(fetch())
