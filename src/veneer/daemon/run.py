"""The daemon process: opens the cache, listens on its socket, ends on SIGTERM, SIGINT or with its last client."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.cache import directory
from veneer.cache.cache import Cache
from veneer.cache.database import UnavailableIndexError
from veneer.formats.request_wire import SOCKET_NAME
from veneer.formats.tree_index import nar_file
from veneer.model.errors import CacheError, CacheFullError, DaemonError
from veneer.sources.pace import Paces
from veneer.store.account import Stories
from veneer.store.store import Limits, Notices, Store
from veneer.store.views import ViewConfig

from .admission import Admission, allow_many_files
from .compose import build_store, build_view, open_cache
from .control import Control
from .heap import keep_small
from .listening import DEFAULT_NAME, answers, listen
from .requests import RequestServer
from .sessions import Sessions
from .worker import ANSWER_SECONDS, WorkerSockets

IDLE_SECONDS = 0.2
"""How long a private daemon outlives its last client: enough for a client that reconnects."""
FIRST_CLIENT_SECONDS = 30.0
LOCK_SECONDS = 10.0
"""How long to wait for a daemon that starts, and for one that ends."""
FLUSH_SECONDS = 0.2
SYNC_SECONDS = 30.0
LAST_SYNC_SECONDS = 10.0
"""How long a private daemon without clients may go on making files safe, so that another boot need not read them."""
NEGATIVE_KEPT_SECONDS = 86400.0
"""Answers "there is none" are forgotten after this; whether they are still believed is the view's affair."""
UNAVAILABLE_SECONDS = 60.0
"""How long the index may be out of reach before the daemon ends."""
FLUSH_ROOM = 64 << 20
"""Bytes to make room for when the index could not be written."""


@dataclass(frozen=True, slots=True)
class DaemonSettings:
    """``shared``: other users may connect and read. ``private``: end with the last client."""

    cache_root: Path
    max_bytes: int | None = None
    shared: bool = False
    private: bool = False
    default_view: ViewConfig = field(default_factory=ViewConfig)
    limits: Limits = field(default_factory=Limits)
    ready: Callable[[], None] = lambda: None
    client_fd: int | None = None
    """A connected socket that came with the process: its starter is a client from the first moment."""
    answer_seconds: float = ANSWER_SECONDS
    """How long Nix waits for the answer about one path before it gets an error."""
    nix_sockets: Mapping[str, socket.socket] = field(default_factory=dict)
    """Worker sockets that came with the process, by name: they listen already."""
    control_group: int | None = None
    """Members of this group may control, besides root and the daemon's user."""


def run_daemon(settings: DaemonSettings) -> bool:
    """Serve until told to stop. False: another daemon serves this cache already (``private`` only)."""
    root = settings.cache_root
    # ``run``, which may have started us, has those blocked that end us.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    allow_many_files()
    keep_small()
    directory.prepare(root, shared=settings.shared)
    # One daemon starts at a time: who owns the cache while we start either listens or ends.
    with ExitStack() as starting:
        starting.callback(os.close, directory.lock(root, directory.STARTING, seconds=LOCK_SECONDS))
        if settings.private and answers(root / SOCKET_NAME):
            return False
        cache = open_cache(
            root,
            time.time,
            max_bytes=settings.max_bytes,
            shared=settings.shared,
            lock_seconds=LOCK_SECONDS if settings.private else 0,
        )
        try:
            asyncio.run(_serve(settings, cache, starting.close))
        finally:
            cache.close()
    return True


async def _serve(settings: DaemonSettings, cache: Cache, listening: Callable[[], None]) -> None:
    """``listening``: told once clients may connect."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    paces = Paces()
    sessions = Sessions(
        lambda config: build_view(
            config,
            cache,
            time.time,
            lambda about, error: store.stories.add(about, error),
            paces=paces,
            parallel_requests=settings.limits.parallel_requests,
        ),
        lambda: store.owners,
    )
    notices = Notices(sessions.dropped, sessions.condemned, sessions.present)
    store = build_store(cache, time.time, notices, settings.limits)
    loop.set_exception_handler(lost_errors(store.stories))
    workers = WorkerSockets(
        store,
        sessions,
        shared=settings.shared,
        parallel=settings.limits.parallel_requests if settings.limits.prefetch else 0,
        answer_seconds=settings.answer_seconds,
        inherited=settings.nix_sockets,
    )
    control = Control(store, sessions, workers, time.time, stop.set, private=settings.private)

    def end() -> None:
        requests.refuse()  # at once: a client that was greeted would take what comes then for a failure
        stop.set()

    idle = _IdleEnd(end, lambda go_on: _sync(cache, go_on)) if settings.private else None
    requests = RequestServer(
        store,
        sessions,
        control,
        settings.default_view,
        idle.connections if idle else lambda _: None,
        admission=Admission(settings.control_group),
    )
    workers.remove_stale()
    if settings.default_view.sources:
        own = sessions.enter(settings.default_view, may_control=False, peer=DEFAULT_NAME, send=lambda _: None)
        await workers.open_default(own)
    sock = listen(cache.root / SOCKET_NAME, settings.shared)
    listening()
    server = await asyncio.start_unix_server(requests.connected, sock=sock)
    flushing = asyncio.create_task(_flush(cache, store, notices.dropped, stay=settings.private))
    if settings.client_fd is not None:
        streams = await asyncio.open_unix_connection(sock=socket.socket(fileno=settings.client_fd))
        starter = asyncio.create_task(requests.connected(*streams))  # noqa: F841, RUF006 - held here
    settings.ready()
    try:
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({stopping, flushing}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if flushing.done():
            flushing.result()
    finally:
        if idle is not None:
            idle.close()
        flushing.cancel()
        server.close()
        await requests.close()
        await workers.close()
        await store.close()
        await sessions.close()
        with suppress(FileNotFoundError):
            (cache.root / SOCKET_NAME).unlink()


def lost_errors(stories: Stories) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """The loop's exception handler: what no code expects reaches users as a story, besides the log with its traceback."""

    def tell(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)
        error = context.get("exception")
        message = str(context.get("message") or "unexpected failure")
        stories.add(message, error if isinstance(error, Exception) else DaemonError(message))

    return tell


async def _flush(cache: Cache, store: Store, dropped: Callable[[int], None], *, stay: bool) -> None:
    """Commit what the index gathered and, now and then, make files safe from power loss; for ever.

    A full disk loses remembered answers, never what is served: room is made and the next turn tries again. So it is with an
    index that another program holds, or whose disk fails, for UNAVAILABLE_SECONDS. Any other failure ends the daemon with its error.
    ``stay``: but not that the directory was deleted: clients have files of it open, and can have errors for the rest.
    """
    turn = 0
    unavailable_since: float | None = None
    while True:
        await asyncio.sleep(FLUSH_SECONDS)
        turn += 1
        try:
            cache.index.flush()
            if turn % round(SYNC_SECONDS / FLUSH_SECONDS) == 0:
                cache.index.forget_negative(time.time() - NEGATIVE_KEPT_SECONDS)
                for number in await _sync(cache):
                    what = "dropped: the disk failed to take it"
                    store.stories.add(nar_file(number), CacheError(what, where=str(cache.root)))
                    dropped(number)
        except CacheFullError as error:
            store.stories.add(str(cache.root), error)
            store.make_room(FLUSH_ROOM)
        except UnavailableIndexError as error:
            if unavailable_since is None:
                unavailable_since = time.monotonic()
                store.stories.add(str(cache.root), error)
            if time.monotonic() - unavailable_since > UNAVAILABLE_SECONDS:
                raise
        except CacheError as error:
            if not stay or cache.is_in_place():
                raise
            store.stories.add(str(cache.root), error)
        else:
            unavailable_since = None


async def _sync(cache: Cache, go_on: Callable[[], bool] = lambda: True) -> list[int]:
    """The numbers of the NARs that were lost in it."""
    batch = cache.begin_sync()
    return cache.end_sync(await asyncio.to_thread(batch.run, go_on))


class _IdleEnd:
    """Ends a private daemon some time after its last client left, or when none ever came.

    ``last``: what is done before, for as long as it is told to go on. The daemon listens meanwhile: a client that comes
    is served at once, and the end is put off until that one leaves.
    """

    def __init__(
        self, stop: Callable[[], None], last: Callable[[Callable[[], bool]], Coroutine[None, None, object]]
    ) -> None:
        self._stop = stop
        self._last = last
        self._clients = 0
        self._closed = False
        self._ending: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(FIRST_CLIENT_SECONDS, stop)

    def connections(self, count: int) -> None:
        self._clients = count
        self._timer.cancel()
        if count == 0:
            self._timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._begin)

    def close(self) -> None:
        self._closed = True
        self._timer.cancel()

    def _begin(self) -> None:
        if self._ending is None or self._ending.done():
            self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        deadline = time.monotonic() + LAST_SYNC_SECONDS

        def go_on() -> bool:  # any thread
            return not (self._clients or self._closed) and time.monotonic() < deadline

        try:
            with suppress(CacheError):  # what is not safe stays listed, and the next start looks after it
                await self._last(go_on)
        finally:  # also after a bug: nobody else would end us
            if not self._clients:
                self._stop()
