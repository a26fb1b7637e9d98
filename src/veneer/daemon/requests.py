"""The request protocol's server side: one task per connection, one per open request.

Who may do what: everybody who can connect may ask within the daemon's default view; only the daemon's own user, root and the
configured group may bring a view or send more CONTROL verbs than OPEN_VERBS (SO_PEERCRED decides). Bounds: OPEN_REQUESTS per
connection (reading stops above it), UNSENT bytes towards a client that does not read (the connection is ended above it),
HELLO_SECONDS and HELLO_BYTES for HELLO, BODY_SECONDS for the rest of a long request; ``daemon.admission`` has those of one user.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from typing import Protocol

import msgspec

from veneer.formats import request_wire as wire
from veneer.formats.request_wire import Frame, Kind
from veneer.model.errors import CacheError, DaemonError, FormatError, LimitError, SourceError, VeneerError
from veneer.model.store_path import StorePath
from veneer.model.tasks import is_cancelled
from veneer.store.resolve import AbsentError
from veneer.store.store import Store
from veneer.store.views import ViewConfig

from .admission import Admission, Credentials, User, credentials
from .sessions import Session, Sessions

OPEN_REQUESTS = 4096
UNSENT = 64 << 20
UNSENT_LITTLE = 1 << 20
"""Up to here nobody counts what the same user leaves unread elsewhere."""
HELLO_SECONDS = 10.0
HELLO_BYTES = 1 << 20
BODY_SECONDS = 60.0
LONG_BODY = 64 << 10
SESSION_NAME = 200
"""Characters of a session's name that count."""
SIGN_SECONDS = 5.0
"""Between signs of life for a waiting request; far below any sensible ``--patience``."""
RETIRED_TOLD = 1000
"""Condemned path numbers that a new connection is told of, at most: a mount server may have missed the notice."""
OPEN_VERBS = ("closure", "content", "look-up", "prefetch", "report", "tree")
"""CONTROL verbs for everybody: no more than a mount server may ask."""

_LAST = 10


class Controller(Protocol):
    """Answers CONTROL: the verb's result, progress through the callback."""

    async def __call__(
        self, session: Session, request: dict[str, object], progress: Callable[[dict[str, object]], None]
    ) -> dict[str, object]: ...


class RequestServer:
    """Serves connections until closed."""

    def __init__(
        self,
        store: Store,
        sessions: Sessions,
        control: Controller,
        default_view: ViewConfig,
        connections_changed: Callable[[int], None],
        sign_seconds: float = SIGN_SECONDS,
        admission: Admission | None = None,
    ) -> None:
        self._admission = admission or Admission()
        self._store = store
        self._sessions = sessions
        self._control = control
        self._default_view = default_view
        self._changed = connections_changed
        self._sign_seconds = sign_seconds
        self._open: set[asyncio.Task[None]] = set()
        self._closing = False

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from HELLO to its end."""
        if self._closing:  # it came with the last ones: nobody would end it
            writer.close()
            return
        who = credentials(writer.get_extra_info("socket"))
        try:
            user = self._admission.enter(who.uid)
        except DaemonError as refusal:
            self._store.stories.add("request socket", refusal)
            writer.write(_refusal(refusal).encode())
            writer.close()
            return
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        self._changed(len(self._open))
        user.unread[writer] = writer.transport.get_write_buffer_size
        try:
            await self._converse(reader, writer, who, user)
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            pass  # the client left, or never spoke: nothing to tell to anybody
        except asyncio.CancelledError:
            if not self._closing:
                raise
            # asyncio's streams (before Python 3.12) take a cancelled connection for a bug, and say so in the log
        except VeneerError as error:
            self._store.stories.add("request socket", error)
            if not writer.is_closing():
                writer.write(_refusal(error).encode())
        finally:
            writer.close()
            del user.unread[writer]
            self._admission.leave(user)
            self._open.discard(task)
            self._changed(len(self._open))

    def refuse(self) -> None:
        """From now on nobody is greeted any more: who comes finds no daemon, and starts one."""
        self._closing = True

    async def close(self) -> None:
        self._closing = True
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, who: Credentials, user: User
    ) -> None:
        async with asyncio.timeout(HELLO_SECONDS):
            hello = await _hello(reader)

        def send(frame: Frame) -> None:
            unsent = writer.transport.get_write_buffer_size()
            if unsent > UNSENT or (unsent > UNSENT_LITTLE and user.reads_too_little()):
                writer.transport.abort()
            elif not writer.is_closing():
                writer.write(frame.encode())

        try:
            session = self._enter(hello, who, send)
        except VeneerError as error:
            send(Frame(Kind.FAILED, hello.id, wire.failed_body(error.errno, str(error), error.exit_code)))
            await writer.drain()
            return
        welcome = {"version": wire.VERSION, "generation": self._store.cache.generation.hex()}
        send(Frame(Kind.WELCOME, hello.id, json.dumps(welcome).encode()))
        for number, path in self._store.cache.index.retired(RETIRED_TOLD):  # while it was away, or we were
            send(Frame(Kind.QUARANTINED, 0, wire.quarantined_body(number, path.basename)))
        room = asyncio.Semaphore(OPEN_REQUESTS)
        tasks: dict[asyncio.Task[None], int] = {}

        def ended(task: asyncio.Task[None]) -> None:
            user.let_go(tasks.pop(task))
            session.open = len(tasks)
            room.release()
            if not user.own:
                user.room.release()

        try:
            while True:
                frame = await _frame(reader, user)
                size = len(frame.body)
                if frame.kind == Kind.TOUCHED:
                    user.let_go(size)
                    rows = wire.touched(frame.body)
                    for row in rows:
                        _known_number(row[0])
                    self._store.touched(session.view, rows, session.account)
                    continue
                if frame.kind == Kind.CANCEL:
                    user.let_go(size)
                    continue  # the download stays for others; the answer is ignored by who cancelled
                try:
                    await room.acquire()
                    if not user.own:
                        await user.room.acquire()
                except BaseException:
                    user.let_go(size)
                    raise
                task = asyncio.create_task(self._answer(session, user, frame))
                tasks[task] = size
                session.open = len(tasks)
                task.add_done_callback(ended)
                await writer.drain()
        finally:
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._sessions.leave(session)

    def _enter(self, hello: Frame, who: Credentials, send: Callable[[Frame], None]) -> Session:
        if hello.kind != Kind.HELLO:
            raise FormatError(f"{hello.kind.name} before HELLO", where="request protocol")
        try:
            data = json.loads(hello.body)
            version, brought = data["version"], data["view"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise FormatError("HELLO is not what version 1 says", where="request protocol") from error
        if version != wire.VERSION:
            raise DaemonError(
                f"the client speaks version {version} of the request protocol, this daemon {wire.VERSION}",
                hint="use the same version of veneer for both, or stop the daemon",
            )
        owner = self._admission.may_control(who)
        if brought is None:
            config = self._default_view
        elif isinstance(brought, dict) and brought.keys() <= {"session"}:
            config = msgspec.structs.replace(
                self._default_view, session=str(brought.get("session", ""))[:SESSION_NAME]
            )
        elif owner:
            config = ViewConfig.from_json(brought)
        else:
            raise DaemonError(
                f"user {who.uid} may not choose sources for the daemon of user {os.geteuid()}",
                hint="leave out --cache and keys to use the daemon's own, or use a cache directory of your own",
            )
        session = self._sessions.enter(
            config, may_control=owner, peer=f"pid {who.pid}, user {who.uid}", send=send
        )
        session.takes_directories = data.get("directories") is True
        return session

    async def _answer(self, session: Session, user: User, frame: Frame) -> None:
        """Answer one request; every failure becomes a FAILED with its story."""
        try:
            if frame.kind == Kind.CONTROL and user.own:
                reply = await self._reply(session, frame)
            elif frame.kind == Kind.CONTROL:
                async with user.controls:
                    reply = await self._reply(session, frame)
            else:
                reply = await self._with_signs(session, frame)
        except AbsentError as absent:
            session.send(Frame(Kind.ABSENT, frame.id, wire.absent_body(int(absent.seconds * 1000))))
            return
        except VeneerError as error:
            if isinstance(error, CacheError):  # sources' failures were told where they happened
                self._tell(frame, error)
            session.send(
                Frame(Kind.FAILED, frame.id, wire.failed_body(error.errno, str(error), error.exit_code))
            )
            return
        except Exception as error:  # noqa: BLE001 - a bug must reach the reader as EIO and the user as a story
            story = self._store.stories.add(frame.kind.name, error)
            session.send(Frame(Kind.FAILED, frame.id, wire.failed_body(VeneerError.errno, story.text)))
            return
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            given_up = SourceError(
                "given up: what it waited for was ended with another session", hint="try again"
            )
            self._store.stories.add(frame.kind.name, given_up)
            body = wire.failed_body(given_up.errno, str(given_up), given_up.exit_code)
            session.send(Frame(Kind.FAILED, frame.id, body))
            return
        session.send(reply)

    def _tell(self, frame: Frame, error: CacheError) -> None:
        """A story, unless one of the last few is this one."""
        if error.story() not in {story.text for story in self._store.stories.rows()[-_LAST:]}:
            about = frame.body.decode("ascii", "replace") if frame.kind is Kind.LOOKUP else frame.kind.name
            self._store.stories.add(about, error)

    async def _with_signs(self, session: Session, frame: Frame) -> Frame:
        """The reply; meanwhile a PROGRESS every SIGN_SECONDS in which content arrived, so that nobody gives up on a big NAR."""
        replying = asyncio.create_task(self._reply(session, frame))
        moved = self._store.moved
        try:
            while not (await asyncio.wait({replying}, timeout=self._sign_seconds))[0]:
                if self._store.moved != moved:
                    moved = self._store.moved
                    session.send(Frame(Kind.PROGRESS, frame.id, json.dumps({"moved": moved}).encode()))
        except asyncio.CancelledError:
            replying.cancel()
            await asyncio.wait({replying})
            raise
        return replying.result()

    async def _reply(self, session: Session, frame: Frame) -> Frame:
        store, view, account = self._store, session.view, session.account
        match frame.kind:
            case Kind.LOOKUP:
                path = StorePath.parse(frame.body.decode("ascii", "replace"))
                try:
                    row = await store.lookup(view, path, account, root_only=session.takes_directories)
                except AbsentError:
                    session.remember_absent(path)
                    raise
                kind = Kind.DIRECTORY if store.is_bare(row) else Kind.FOUND
                return Frame(kind, frame.id, wire.found_body(row.number, row.nar_size))
            case Kind.CONTENT:
                number, offset, size = wire.content(frame.body)
                ready = await store.content(view, _known_number(number), offset, size, account)
                body = wire.ready_body(
                    ready.number, ready.start, ready.end, whole=ready.whole, inode=ready.inode
                )
                return Frame(Kind.READY, frame.id, body)
            case Kind.TREE:
                number = await store.tree(view, _known_number(wire.path_number(frame.body)), account)
                return Frame(Kind.READY, frame.id, wire.ready_body(number, 0, 0, whole=True))
            case Kind.CONTROL:
                try:
                    request = json.loads(frame.body)
                except (ValueError, RecursionError) as error:
                    raise FormatError("CONTROL is not JSON", where="request protocol") from error
                if not isinstance(request, dict):
                    raise FormatError("CONTROL is not a JSON object", where="request protocol")
                if not session.may_control and request.get("do") not in OPEN_VERBS:
                    raise DaemonError("only the daemon's own user, root and its group may control it")

                def progress(state: dict[str, object]) -> None:
                    session.send(Frame(Kind.PROGRESS, frame.id, json.dumps(state).encode()))

                result = await self._control(session, request, progress)
                return Frame(Kind.RESULT, frame.id, json.dumps(result).encode())
            case _:
                raise FormatError(f"{frame.kind.name} is not a request", where="request protocol")


async def _hello(reader: asyncio.StreamReader) -> Frame:
    """The first frame; its sender is nobody yet, so it may not be long."""
    length, kind, request = wire.parse_header(await reader.readexactly(wire.HEADER.size))
    if length > HELLO_BYTES:
        raise LimitError(f"a first message of {length} bytes", where="request protocol")
    return Frame(kind, request, await reader.readexactly(length))


async def _frame(reader: asyncio.StreamReader, user: User) -> Frame:
    """The next frame; its body counts as held by ``user`` until somebody lets go of it. LimitError: there is no room for it."""
    length, kind, request = wire.parse_header(await reader.readexactly(wire.HEADER.size))
    user.hold(length)
    try:
        if length <= LONG_BODY:
            return Frame(kind, request, await reader.readexactly(length))
        async with asyncio.timeout(BODY_SECONDS):
            return Frame(kind, request, await reader.readexactly(length))
    except BaseException:
        user.let_go(length)
        raise


def _known_number(number: int) -> int:
    """``number``, which may be any 64 bits, as one that a path could have; the index cannot even be asked for others."""
    if not 0 < number < 1 << 32:
        raise FormatError(f"no path has the number {number}", where="request protocol")
    return number


def _refusal(error: VeneerError) -> Frame:
    """Said of the whole connection, which ends."""
    return Frame(Kind.FAILED, 0, wire.failed_body(error.errno, str(error), error.exit_code))
