"""The Nix worker protocol on unix sockets: real Nix reads a view as a store (``unix:///path/to.sock``).

Nix cannot say which sources and keys it wants, so a socket belongs to one session: it answers within that session's view, books
on its account, and goes with it. The connections are asyncio protocols without a task each: what is known is answered in the
call that brought the question.

Bounds: CONNECTIONS per socket, of which every user but root and the daemon's own may have CONNECTIONS_OF_USER; who is one too
many is told so in words that Nix shows, and let go. GREETING_SECONDS until a client has introduced itself; MAX_HELD bytes of unfinished requests over
all connections of a socket; one open request per connection, and nothing is read while its client does not take the answers.
After an ERROR that ends a connection, LINGER_SECONDS for the client to read it while what it still sends is thrown away.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import cast

from veneer import __version__
from veneer.formats import worker_wire as wire
from veneer.formats.worker_wire import Event, Request
from veneer.model.errors import DaemonError, FormatError, UsageError, VeneerError, printable
from veneer.model.tasks import is_cancelled
from veneer.store.store import Store
from veneer.store.views import View

from .admission import credentials
from .listening import DEFAULT_NAME, DIRECTORY, answers, listen
from .sessions import Session, Sessions
from .worker_answers import Answers
from .worker_paths import KnownPaths, NoAnswerError

ANSWER_SECONDS = 30.0
CONNECTIONS = 256
CONNECTIONS_OF_USER = 64
GREETING_SECONDS = 10.0
LINGER_SECONDS = 5.0
MAX_HELD = 64 << 20
RECEIVED_AT_ONCE = 64 << 10
VIEWS_KEPT = 4
"""Views without a socket whose path infos stay in memory, so that the next session finds them."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


class WorkerSockets:
    """All sockets of one daemon. Event loop only. ``shared``: other users may connect."""

    def __init__(
        self,
        store: Store,
        sessions: Sessions,
        *,
        shared: bool,
        parallel: int,
        answer_seconds: float = ANSWER_SECONDS,
        inherited: Mapping[str, socket.socket] | None = None,
    ) -> None:
        """``inherited``: sockets by name that listen already, from before we were up; Nix may be waiting there."""
        self._store = store
        self._sessions = sessions
        self._shared = shared
        self._parallel = parallel
        self._seconds = answer_seconds
        self._root = store.cache.root
        self._sockets: dict[Path, WorkerSocket] = {}
        self._known: dict[str, KnownPaths] = {}
        self._inherited: dict[str, socket.socket] = dict(inherited or {})
        self._opening = asyncio.Lock()

    async def open(self, session: Session, name: str) -> Path:
        """The socket ``name`` of this session, until it leaves. UsageError, DaemonError: the name cannot be had."""
        if not _NAME.fullmatch(name):
            raise UsageError(f"not a name for a socket: {name[:100]!r}", hint="letters, digits, . _ and -")
        directory = self._root / DIRECTORY
        directory.mkdir(mode=0o755 if self._shared else 0o700, exist_ok=True)
        return await self._open(session, directory / f"{name}.sock")

    async def open_default(self, session: Session) -> Path:
        """The daemon's own socket, for the default view."""
        return await self._open(session, self._root / DEFAULT_NAME)

    def remove_stale(self) -> None:
        """Remove what a killed daemon left; the cache's lock is ours. One that listens waits for a daemon."""
        for path in (self._root / DEFAULT_NAME, *(self._root / DIRECTORY).glob("*.sock")):
            if not answers(path):
                path.unlink(missing_ok=True)

    async def close(self) -> None:
        for open_ in list(self._sockets.values()):
            open_.close()
        self._sockets.clear()
        for unused in self._inherited.values():
            unused.close()
        while self._known:
            await self._known.popitem()[1].close()

    async def _open(self, session: Session, path: Path) -> Path:
        async with self._opening:
            return await self._open_alone(session, path)

    async def _open_alone(self, session: Session, path: Path) -> Path:
        present = self._sockets.get(path)
        if present is not None:
            if present.session is not session:
                raise DaemonError(f"another session has the socket {path.name}", hint="choose another name")
            return path
        answers = Answers(self._store, await self._known_of(session.view), session.account, self._seconds)
        made = WorkerSocket(self._store, session, answers, path)
        listening = self._inherited.pop(path.stem, None)
        await made.start(listen(path, self._shared) if listening is None else listening)
        if session not in self._sessions.connected:  # it left while we were at it
            made.close()
            return path
        self._sockets[path] = made
        session.on_leave.append(lambda: self._close(path))
        return path

    def _close(self, path: Path) -> None:
        closed = self._sockets.pop(path, None)
        if closed is not None:
            closed.close()

    async def _known_of(self, view: View) -> KnownPaths:
        """What is known of the view; of views without a socket the last few are kept."""
        known = self._known.pop(view.identity, None)
        if known is not None and known.view is not view:
            await known.close()
            known = None
        if known is None:
            known = KnownPaths(self._store.resolver, view, self._sessions.present, parallel=self._parallel)
        self._known[view.identity] = known
        in_use = {open_.session.view.identity for open_ in self._sockets.values()} | {view.identity}
        idle = [identity for identity in self._known if identity not in in_use]
        for identity in idle[: max(0, len(idle) - VIEWS_KEPT)]:
            await self._known.pop(identity).close()
        return known


class WorkerSocket:
    """One listening socket and its connections."""

    def __init__(self, store: Store, session: Session, answers: Answers, path: Path) -> None:
        self.store = store
        self.session = session
        self.answers = answers
        self.path = path
        self.connections: set[_Connection] = set()
        self.incoming = memoryview(bytearray(RECEIVED_AT_ONCE))
        """Where each connection's bytes arrive, and are taken from before the next one's."""
        self._server: asyncio.Server | None = None

    async def start(self, sock: socket.socket) -> None:
        """Serve on ``sock``, which listens."""
        self._server = await asyncio.get_running_loop().create_unix_server(
            lambda: _Connection(self), sock=sock
        )

    def close(self) -> None:
        """End the socket and what is connected."""
        if self._server is not None:
            self._server.close()
            with suppress(FileNotFoundError):
                self.path.unlink()
        for connection in list(self.connections):
            connection.abort()

    def refusal(self, uid: int) -> DaemonError | None:
        """Why a connection of this user cannot be taken, if so."""
        there = [connection.uid for connection in self.connections]
        mine = there.count(uid)
        if len(there) < CONNECTIONS and (uid in (0, os.geteuid()) or mine < CONNECTIONS_OF_USER):
            return None
        return DaemonError(
            f"too many connections: {len(there)}, and {mine} of them of user {uid}", where=self.path.name
        )

    @property
    def held(self) -> int:
        return sum(connection.decoder.held for connection in self.connections)


class _Connection(asyncio.BufferedProtocol):
    """One client. Events wait in a queue while a request is being answered or the client does not read."""

    def __init__(self, socket: WorkerSocket) -> None:
        self.decoder = wire.RequestDecoder()
        self._socket = socket
        self._answers = socket.answers
        self._events: deque[Event] = deque()
        self._task: asyncio.Task[None] | None = None
        self._version = wire.VERSION
        self._greeted = False
        self._ending = False
        self._may_write = True
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.uid = credentials(transport.get_extra_info("socket")).uid
        if (refusal := self._socket.refusal(self.uid)) is not None:
            self._ending = True
            self._socket.store.stories.add("nix", refusal)
            self._transport.write(f"veneer: {refusal.what}\n".encode())
            self._transport.close()
            return
        self._socket.connections.add(self)
        self._wait_at_most(GREETING_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._socket.connections.discard(self)
        self._ending = True
        self._events.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._may_write = False

    def resume_writing(self) -> None:
        self._may_write = True
        self._advance()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._socket.incoming

    def buffer_updated(self, nbytes: int) -> None:
        if self._ending:
            return
        data = bytes(self._socket.incoming[:nbytes])
        alone = self._may_write and self._task is None and not self._events and self.decoder.between_requests
        if alone and (reply := self._answers.repeated(data)) is not None:
            self._transport.write(reply)
            return
        self._events += self.decoder.feed(data)
        if self.decoder.held > MAX_HELD // CONNECTIONS and self._socket.held > MAX_HELD:
            self._end("the daemon holds too many unfinished requests; try again")
            return
        self._advance()

    def abort(self) -> None:
        self._transport.abort()

    def _wait_at_most(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._transport.abort)

    def _advance(self) -> None:
        """Handle events in order as far as it can be done now."""
        while self._events and self._task is None and self._may_write and not self._ending:
            self._handle(self._events.popleft())
        if self._events:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _handle(self, event: Event) -> None:
        write = self._transport.write
        match event:
            case wire.Request():
                self._answer(event)
            case wire.Hello():
                write(wire.server_hello())
            case wire.Features():
                write(wire.features())
            case wire.Greeted(version):
                self._version = version
                self._greeted = True
                if self._timer is not None:
                    self._timer.cancel()
                write(wire.greeting(self._version, f"veneer {__version__}", trusted=False))
            case wire.Refused(number):
                name = wire.REFUSED_NAMES.get(number, "operation")
                self._end(f"this store can only be read: {name} ({number}) is refused")
            case wire.TooOld(version):
                self._version = version
                self._end(
                    f"Nix speaks version {version >> 8}.{version & 0xFF} of the worker protocol;"
                    f" this store needs {wire.OLDEST >> 8}.{wire.OLDEST & 0xFF} (Nix 2.3) or newer"
                )
            case wire.Malformed(error):
                if self._greeted:
                    self._end(_words(error))
                else:
                    self._transport.close()

    def _answer(self, request: Request) -> None:
        try:
            values = self._answers.at_once(request)
        except FormatError as error:
            self._fail(error)
            return
        if values is not None:
            self._transport.write(wire.reply(values))
        else:
            self._task = asyncio.create_task(self._answer_later(request))

    async def _answer_later(self, request: Request) -> None:
        try:
            if request.operation is wire.NAR_FROM_PATH:
                await self._send_nar(request)
            else:
                values = await self._answers.later(request, self._version)
                self._transport.write(wire.reply(values))
        except VeneerError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - a bug must reach Nix as a failure and the user as a story
            story = self._socket.store.stories.add(request.operation.name, error)
            self._end(f"the store daemon failed: {story.text}")
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            self._end("given up: what it waited for was ended with another session; try again")
        finally:
            self._task = None
        self._advance()

    async def _send_nar(self, request: Request) -> None:
        """Errors before the first byte are raised; after it the connection ends, which is how the protocol says it."""
        file, size = await self._answers.nar(request)
        try:
            self._transport.write(wire.reply(()))
            sent = await asyncio.get_running_loop().sendfile(self._transport, file, 0, size)
            if sent != size:
                raise OSError(f"NAR file ended after {sent} of {size} bytes")
        except ConnectionError:
            self._transport.abort()  # the client left; nobody to tell
        except (OSError, RuntimeError) as error:
            self._socket.store.stories.add(request.operation.name, error)
            self._transport.abort()
        finally:
            file.close()

    def _fail(self, error: VeneerError) -> None:
        """ERROR; the connection goes on."""
        if isinstance(error, NoAnswerError):  # everything else is a story of who met it
            self._socket.store.stories.add("nix", error)
        self._transport.write(wire.error_reply(self._version, _words(error)))

    def _end(self, message: str) -> None:
        """ERROR; the client has some time to read it before the connection ends."""
        if self._task is not None and self._task is not asyncio.current_task():
            self._transport.abort()  # an answer is on its way, nothing may be said in between
            return
        self._ending = True
        self._events.clear()
        self._transport.write(wire.error_reply(self._version, message))
        self._transport.resume_reading()
        self._wait_at_most(LINGER_SECONDS)


def _words(error: VeneerError) -> str:
    """What Nix prints as it is: nothing in it may drive a terminal."""
    return "\n".join(map(printable, str(error).split("\n")))
