"""The CONTROL verbs. Each takes the request's JSON and gives the result's; see ``docs/reference`` for their fields."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress

import veneer
from veneer.formats.narinfo import parse_narinfo
from veneer.formats.trace import from_rows
from veneer.model.errors import UsageError, VeneerError
from veneer.model.path_info import PathInfo
from veneer.model.store_path import StorePath
from veneer.store.prefetch import PARALLEL_METADATA, Prefetch
from veneer.store.store import Store

from .sessions import Session, Sessions
from .worker import WorkerSockets

Progress = Callable[[dict[str, object]], None]
MOST_NAMED = 1000
"""Paths that are looked up ahead for one command."""
Verb = Callable[[Session, dict[str, object], Progress], Awaitable[dict[str, object]]]


class Control:
    """Implements ``requests.Controller``."""

    def __init__(
        self,
        store: Store,
        sessions: Sessions,
        workers: WorkerSockets,
        clock: Callable[[], float],
        stop: Callable[[], None],
        *,
        private: bool = False,
    ) -> None:
        """``private``: whoever needs this daemon starts another one when it ends."""
        self._private = private
        self._store = store
        self._sessions = sessions
        self._workers = workers
        self._clock = clock
        self._started = clock()
        self._stop = stop
        self._verbs: dict[str, Verb] = {
            "status": self._status,
            "fetch": self._fetch,
            "look-up": self._look_up,
            "prefetch": self._prefetch,
            "closure": self._closure,
            "gc": self._gc,
            "verify": self._verify,
            "pin": self._pin,
            "unpin": self._unpin,
            "pins": self._pins,
            "report": self._report,
            "remembered": self._remembered,
            "tree": self._tree,
            "content": self._content,
            "nix-socket": self._nix_socket,
            "stop": self._end,
        }

    async def __call__(
        self, session: Session, request: dict[str, object], progress: Progress
    ) -> dict[str, object]:
        verb = self._verbs.get(str(request.get("do")))
        if verb is None:
            raise UsageError(
                f"no such control verb: {request.get('do')!r}", hint="use the same version of veneer"
            )
        return await verb(session, request, progress)

    async def _status(
        self, session: Session, request: dict[str, object], progress: Progress
    ) -> dict[str, object]:
        totals = self._store.cache.index.totals()
        return {
            "pid": os.getpid(),
            "version": veneer.__version__,
            "private": self._private,
            "cache": str(self._store.cache.root),
            "generation": self._store.cache.generation.hex(),
            "uptime_seconds": self._clock() - self._started,
            "max_bytes": self._store.cache.max_bytes,
            "totals": {
                "paths": totals.paths,
                "trees": totals.trees,
                "nars": totals.nars,
                "nar_bytes": totals.nar_bytes,
                "tree_bytes": totals.tree_bytes,
                "narinfos": totals.narinfos,
            },
            "busy": len(self._store.busy),
            "downloads": [str(row.store_path) for row in self._store.fetcher.rows],
            "connections": [
                {
                    "peer": s.peer,
                    "open": s.open,
                    "sources": [source.url for source in s.view.chain.sources],
                    "prefetched": None if s.account.prefetched is None else s.account.prefetched.report(),
                }
                for s in self._sessions.connected
            ],
            "stories": [
                {"time": story.time, "kind": story.kind, "path": story.path, "text": story.text}
                for story in self._store.stories.rows()
            ],
        }

    async def _fetch(
        self, session: Session, request: dict[str, object], progress: Progress
    ) -> dict[str, object]:
        """Have whole NARs in the cache (``contents``, the default) or only path info and trees."""
        roots = _paths(request)
        store, view, account = self._store, session.view, session.account
        if request.get("closure", False):
            infos = list((await self._resolved(session, roots, progress)).values())
        else:
            infos = [await store.resolver.path_info(view, path, account) for path in roots]
        contents = bool(request.get("contents", True))
        total = sum(info.info.nar_size for info in infos)
        before = account.wire_bytes
        done = moved = 0

        async def one(info: PathInfo) -> None:
            nonlocal done, moved
            get = store.ahead if contents else store.lookup
            await get(view, info.store_path, account)
            done += 1
            moved += info.info.nar_size
            progress({"paths_done": done, "paths": len(infos), "bytes_done": moved, "bytes": total})

        try:
            async with asyncio.TaskGroup() as group:
                for info in infos:
                    group.create_task(one(info))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return {"paths": len(infos), "nar_bytes": total, "wire_bytes": account.wire_bytes - before}

    async def _look_up(
        self, session: Session, request: dict[str, object], progress: Progress
    ) -> dict[str, object]:
        """Have the metadata of these paths, which a command names, and of their closures: so it is known what may be read."""
        store, view, account = self._store, session.view, session.account
        at_once = asyncio.Semaphore(PARALLEL_METADATA)
        found: list[StorePath] = []

        async def one(path: StorePath) -> None:
            async with at_once:
                with suppress(VeneerError):  # what stops a reader is told to him
                    await store.named(view, path, account)
                    found.append(path)

        async with asyncio.TaskGroup() as group:
            for path in _paths(request)[:MOST_NAMED]:
                group.create_task(one(path))
        if self._store.prefetches:
            with suppress(VeneerError):
                await store.closure(view, found, account)
        return {"found": len(found)}

    async def _prefetch(
        self, session: Session, request: dict[str, object], progress: Progress
    ) -> dict[str, object]:
        """Have what the rows of a trace (``formats.trace``) tell in the cache. ``strict``: the first failure is raised, at the end."""
        rows = request.get("trace")
        if not isinstance(rows, list):
            raise UsageError("no trace given")
        trace = await asyncio.to_thread(from_rows, rows)
        roots = _paths({"paths": request["roots"]}) if request.get("roots") else []
        before = session.account.wire_bytes
        work = Prefetch(self._store, session.view, session.account, trace, roots)
        try:
            await work.run(progress)
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        if work.failure is not None and request.get("strict", False):
            raise work.failure
        return {**work.outcome.report(), "wire_bytes": session.account.wire_bytes - before}

    async def _closure(
        self, session: Session, request: dict[str, object], progress: Progress
    ) -> dict[str, object]:
        """The rows of everything that the paths refer to; with ``alone``, of the paths alone."""
        roots = _paths(request)
        if request.get("alone", False):
            view, account = session.view, session.account
            found = {path: await self._store.resolver.path_info(view, path, account) for path in roots}
        else:
            found = await self._resolved(session, roots, progress)
        return {
            "paths": [
                {
                    "path": info.store_path.basename,
                    "nar_size": info.info.nar_size,
                    "nar_hash": info.info.nar_hash.sri,
                    "file_size": info.info.file_size,
                    "references": [reference.basename for reference in info.info.references],
                    "signed_by": list(info.signed_by),
                    "signatures": list(info.info.signatures),
                    "deriver": info.info.deriver,
                    "ca": info.info.ca,
                }
                for info in found.values()
            ],
            "nar_size": sum(info.info.nar_size for info in found.values()),
        }

    async def _resolved(
        self, session: Session, roots: list[StorePath], progress: Progress
    ) -> dict[StorePath, PathInfo]:
        def told(done: int, known: int) -> None:
            if done % 64 == 0:
                progress({"resolved": done, "known": known})

        return await self._store.closure(session.view, roots, session.account, told)

    async def _gc(
        self, session: Session, request: dict[str, object], progress: Progress
    ) -> dict[str, object]:
        limit = request.get("max_bytes")
        if limit is not None and (not isinstance(limit, int) or limit < 0):
            raise UsageError(f"max_bytes is not a size: {limit!r}")
        gone = self._store.evict(limit, dry_run=bool(request.get("dry_run", False)))
        return {
            "evicted": len(gone),
            "freed": sum(size for _, size in gone),
            "paths": [{"path": path.basename, "bytes": size} for path, size in gone],
        }

    async def _verify(
        self, session: Session, request: dict[str, object], progress: Progress
    ) -> dict[str, object]:
        """Read the whole cache and drop what is not right."""
        from .checking import run_check  # seldom wanted, and every start would wait for it

        drop = not request.get("dry_run", False)
        return await run_check(self._store, self._sessions, self._clock, drop=drop, progress=progress)

    async def _pin(
        self, session: Session, request: dict[str, object], progress: Progress
    ) -> dict[str, object]:
        """Pin the paths' closure under a name: its NARs are not evicted."""
        found = await self._resolved(session, _paths(request), progress)
        self._store.cache.index.pin(_name(request), list(found))
        return {"pinned": len(found), "nar_size": sum(info.info.nar_size for info in found.values())}

    async def _unpin(
        self, session: Session, request: dict[str, object], progress: Progress
    ) -> dict[str, object]:
        name = _name(request)
        known = self._store.cache.index.pins()
        if name not in known:
            raise UsageError(f"no pin is named {name!r}", hint="veneer pin --list")
        self._store.cache.index.unpin(name)
        return {"unpinned": len(known[name])}

    async def _pins(
        self, session: Session, request: dict[str, object], progress: Progress
    ) -> dict[str, object]:
        return {
            "pins": {
                name: [path.basename for path in paths]
                for name, paths in self._store.cache.index.pins().items()
            }
        }

    async def _report(
        self, session: Session, request: dict[str, object], progress: Progress
    ) -> dict[str, object]:
        report = session.account.report()
        if not self._store.knows_closure(session.view, session.account):
            report |= {"closure_paths": None, "closure_bytes": None}
        return report

    async def _remembered(
        self, session: Session, request: dict[str, object], progress: Progress
    ) -> dict[str, object]:
        """What the view's sources said of these paths before: base name -> source -> NarHash. Asks no source."""
        wanted = {path.hash_part: path for path in _paths(request)}
        found: dict[str, dict[str, str]] = {}
        for source in session.view.chain.sources:
            for part, row in self._store.cache.index.narinfos(source.url, wanted).items():
                if row.body is not None:
                    info = parse_narinfo(row.body, store_dir=session.view.store_dir)
                    if info.store_path == wanted[part]:
                        found.setdefault(info.store_path.basename, {})[source.url] = str(info.nar_hash)
        return {"paths": found}

    async def _tree(
        self, session: Session, request: dict[str, object], progress: Progress
    ) -> dict[str, object]:
        row = await self._store.lookup(session.view, _path(request), session.account)
        return {"number": row.number, "nar_size": row.nar_size}

    async def _content(
        self, session: Session, request: dict[str, object], progress: Progress
    ) -> dict[str, object]:
        row = await self._store.whole(session.view, _path(request), session.account)
        return {"number": row.number, "nar_size": row.nar_size}

    async def _nix_socket(
        self, session: Session, request: dict[str, object], progress: Progress
    ) -> dict[str, object]:
        """A socket on which Nix reads this session's view; it lives as long as this connection."""
        return {"path": str(await self._workers.open(session, str(request.get("name"))))}

    async def _end(
        self, session: Session, request: dict[str, object], progress: Progress
    ) -> dict[str, object]:
        asyncio.get_running_loop().call_soon(self._stop)
        return {"stopping": True}


def _paths(request: dict[str, object]) -> list[StorePath]:
    names = request.get("paths")
    if not isinstance(names, list) or not names:
        raise UsageError("no store paths given")
    return [StorePath.parse(str(name)) for name in names]


def _path(request: dict[str, object]) -> StorePath:
    return StorePath.parse(str(request.get("path")))


def _name(request: dict[str, object]) -> str:
    name = request.get("name")
    if not isinstance(name, str) or not name:
        raise UsageError("a pin needs a name")
    return name
