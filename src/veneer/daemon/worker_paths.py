"""What the worker protocol knows of a view: path infos already trusted, and the closures that are being asked for.

Nix asks about a closure one path at a time, three times each. So the first question about a path starts the resolution of
everything that it refers to, in parallel and in the background; a later question about one of those waits for the answer
that is under way instead of asking again. A path that no source has, or that nobody vouches for, fails its own questions
only: the rest of the closure goes on.

Invariants: W1: only path infos that the view's policy accepted are kept. W2: at most one resolution per path is under way.
W3: "there is none" and failures are not kept here; how long they hold is the sources' affair.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from veneer.model.errors import SourceError
from veneer.model.path_info import PathInfo
from veneer.model.store_path import StorePath
from veneer.model.tasks import tell_bugs
from veneer.store.account import Account
from veneer.store.resolve import AbsentError, Resolver
from veneer.store.views import View

from .worker_replies import Replies

KEPT = 32_768
"""Path infos in memory, about 2 KiB each; the least used half is forgotten when there are more."""
AHEAD = 65_536
"""Paths that one question may have resolved ahead: what keeps a walk of an endless cache finite."""
LOCAL_AHEAD = 4
"""Paths looked at ahead per turn of the event loop: those that need no network must not hold up the questions."""


class NoAnswerError(SourceError):
    """No source has answered in time."""


class KnownPaths:
    """Trusted path infos of one view. Event loop only.

    ``trusted`` is told each path that was found. ``parallel``: questions open at once before nothing more is asked ahead;
    0 asks nothing ahead.
    """

    def __init__(
        self,
        resolver: Resolver,
        view: View,
        trusted: Callable[[StorePath], None],
        *,
        parallel: int,
        kept: int = KEPT,
    ) -> None:
        self.view = view
        self.replies = Replies(view.store_dir)
        self._resolver = resolver
        self._trusted = trusted
        self._parallel = parallel
        self._half = kept // 2
        self._young: dict[StorePath, PathInfo] = {}
        self._old: dict[StorePath, PathInfo] = {}
        self._asking: dict[StorePath, asyncio.Task[PathInfo]] = {}
        self._waiting: dict[StorePath, Account] = {}
        self._ahead = 0
        self._pumping = False
        self._referrers: dict[StorePath, list[StorePath]] | None = None

    async def close(self) -> None:
        """End everything under way."""
        self._waiting.clear()
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def known(self, path: StorePath) -> PathInfo | None:
        """The path info if it can be told without asking."""
        info = self._young.get(path)
        if info is None and (info := self._old.get(path)) is not None:
            self._keep(path, info)
        return info

    async def info(self, path: StorePath, account: Account, seconds: float) -> PathInfo | None:
        """The path info; None when every source answered that it has none.

        NoAnswerError after ``seconds`` without an answer, which goes on being waited for in the background. TrustError,
        SourceError, FormatError: what the resolver says.
        """
        info = self.known(path)
        if info is not None:
            return info
        self._ahead = AHEAD
        task = self._asking.get(path)
        if task is None:
            self._waiting.pop(path, None)
            task = self._start(path, account)
        try:
            return await _bounded(task, str(path), seconds)
        except AbsentError:
            return None

    async def by_hash_part(self, hash_part: str, account: Account, seconds: float) -> StorePath | None:
        """The trusted path with this hash part; None and errors as ``info`` has them."""
        task = asyncio.create_task(
            self._resolver.by_hash_part(self.view, hash_part, account), name=f"a path {hash_part}-..."
        )
        task.add_done_callback(tell_bugs)  # it may fail at the moment of its cancelling
        try:
            found = await _bounded(task, f"a path {hash_part}-...", seconds)
        finally:
            task.cancel()
        return None if found is None else found.store_path

    def ask_ahead(self, paths: Iterable[StorePath], account: Account) -> None:
        """Have the paths resolved in the background, as if somebody referred to them."""
        self._ahead = AHEAD
        self._queue(paths, account)

    def referrers(self, path: StorePath) -> list[StorePath]:
        """The known paths that refer to ``path``."""
        if self._referrers is None:
            self._referrers = {}
            for info in self._all():
                for reference in info.info.references:
                    self._referrers.setdefault(reference, []).append(info.store_path)
        return self._referrers.get(path, [])

    def __len__(self) -> int:
        return sum(1 for _ in self._all())

    def _all(self) -> Iterator[PathInfo]:
        yield from self._young.values()
        yield from (info for path, info in self._old.items() if path not in self._young)

    def _keep(self, path: StorePath, info: PathInfo) -> None:
        if len(self._young) >= self._half:
            self._old, self._young = self._young, {}
            self._referrers = None
        self._young[path] = info

    def _queue(self, paths: Iterable[StorePath], account: Account) -> None:
        if not self._parallel:
            return
        for path in paths:
            if path not in self._young and path not in self._asking and path not in self._old:
                self._waiting.setdefault(path, account)
        self._pump()

    def _pump(self) -> None:
        """Start what waits, a few per turn of the event loop."""
        if self._waiting and not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump_some)

    def _pump_some(self) -> None:
        self._pumping = False
        for _ in range(LOCAL_AHEAD):
            if not self._waiting or len(self._asking) >= self._parallel:
                return
            if not self._ahead:
                self._waiting.clear()
                return
            self._ahead -= 1
            path = next(iter(self._waiting))
            account = self._waiting.pop(path)
            info = self._resolver.remembered(self.view, path)
            if info is None:
                self._start(path, account, ahead=True)
            else:
                self._found(path, info)
                self._queue(info.info.references, account)
        self._pump()

    def _start(self, path: StorePath, account: Account, *, ahead: bool = False) -> asyncio.Task[PathInfo]:
        task = asyncio.create_task(self._resolve(path, account, ahead), name=f"path info {path}")
        self._asking[path] = task  # W2
        task.add_done_callback(tell_bugs)
        return task

    def _found(self, path: StorePath, info: PathInfo) -> None:
        self._keep(path, info)  # W1
        self._referrers = None
        if not self.replies.full:  # else those that are asked again are worth more
            self.replies.keep(info)
        self._trusted(path)

    async def _resolve(self, path: StorePath, account: Account, ahead: bool) -> PathInfo:
        try:
            if ahead:
                await self._resolver.bundled(self.view, path)
            info = await self._resolver.path_info(self.view, path, account)
            self._found(path, info)
        finally:
            del self._asking[path]
            self._pump()
        self._queue(info.info.references, account)
        return info


_Answer = TypeVar("_Answer")


async def _bounded(task: asyncio.Task[_Answer], what: str, seconds: float) -> _Answer:
    """The task's result; it goes on when we stop waiting."""
    done, _ = await asyncio.wait({task}, timeout=seconds)
    if not done:
        raise NoAnswerError(
            f"no source has told within {seconds:g} s whether it has {what}",
            hint="try again; veneer status shows what the sources do",
        )
    if task.cancelled():
        raise SourceError(f"the question about {what} was given up because the daemon ends")
    return task.result()
