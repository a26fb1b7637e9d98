"""The request protocol's server side: one task per connection, one per open request.

Who may do what: everybody who can connect may ask within the daemon's default view; only the daemon's own user and root
may bring a view or send more CONTROL verbs than OPEN_VERBS (SO_PEERCRED decides). Bounds: OPEN_REQUESTS per connection (reading stops above it),
UNSENT bytes towards a client that does not read (the connection is ended above it).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import Callable
from typing import Protocol

import msgspec

from veneer.formats import request_wire as wire
from veneer.formats.request_wire import Frame, Kind
from veneer.model.errors import CacheError, DaemonError, FormatError, VeneerError
from veneer.model.store_path import StorePath
from veneer.store.resolve import AbsentError
from veneer.store.store import Store
from veneer.store.views import ViewConfig

from .sessions import Session, Sessions

OPEN_REQUESTS = 4096
UNSENT = 64 << 20
HELLO_SECONDS = 10.0
SIGN_SECONDS = 5.0
"""Between signs of life for a waiting request; far below any sensible ``--patience``."""
RETIRED_TOLD = 1000
"""Condemned path numbers that a new connection is told of, at most: a mount server may have missed the notice."""
OPEN_VERBS = ("closure", "content", "prefetch", "report", "tree")
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
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._control = control
        self._default_view = default_view
        self._changed = connections_changed
        self._sign_seconds = sign_seconds
        self._open: set[asyncio.Task[None]] = set()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from HELLO to its end."""
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        self._changed(len(self._open))
        try:
            await self._converse(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            pass  # the client left, or never spoke: nothing to tell to anybody
        except VeneerError as error:
            self._store.stories.add("request socket", error)
        finally:
            writer.close()
            self._open.discard(task)
            self._changed(len(self._open))

    async def close(self) -> None:
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = await asyncio.wait_for(_frame(reader), HELLO_SECONDS)

        def send(frame: Frame) -> None:
            if writer.transport.get_write_buffer_size() > UNSENT:
                writer.transport.abort()
            elif not writer.is_closing():
                writer.write(frame.encode())

        try:
            session = self._enter(hello, writer, send)
        except VeneerError as error:
            send(Frame(Kind.FAILED, hello.id, wire.failed_body(error.errno, str(error), error.exit_code)))
            await writer.drain()
            return
        welcome = {"version": wire.VERSION, "generation": self._store.cache.generation.hex()}
        send(Frame(Kind.WELCOME, hello.id, json.dumps(welcome).encode()))
        for number, path in self._store.cache.index.retired(RETIRED_TOLD):  # while it was away, or we were
            send(Frame(Kind.QUARANTINED, 0, wire.quarantined_body(number, path.basename)))
        room = asyncio.Semaphore(OPEN_REQUESTS)
        tasks: set[asyncio.Task[None]] = set()

        def ended(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            room.release()

        try:
            while True:
                frame = await _frame(reader)
                if frame.kind == Kind.TOUCHED:
                    self._store.touched(session.view, wire.touched(frame.body), session.account)
                    continue
                if frame.kind == Kind.CANCEL:
                    continue  # the download stays for others; the answer is ignored by who cancelled
                await room.acquire()
                task = asyncio.create_task(self._answer(session, frame))
                tasks.add(task)
                task.add_done_callback(ended)
                await writer.drain()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._sessions.leave(session)

    def _enter(self, hello: Frame, writer: asyncio.StreamWriter, send: Callable[[Frame], None]) -> Session:
        if hello.kind != Kind.HELLO:
            raise FormatError(f"{hello.kind.name} before HELLO", where="request protocol")
        try:
            data = json.loads(hello.body)
            version, brought = data["version"], data["view"]
        except (ValueError, TypeError, KeyError) as error:
            raise FormatError("HELLO is not what version 1 says", where="request protocol") from error
        if version != wire.VERSION:
            raise DaemonError(
                f"the client speaks version {version} of the request protocol, this daemon {wire.VERSION}",
                hint="use the same version of veneer for both, or stop the daemon",
            )
        pid, uid = _peer(writer)
        owner = uid in (0, os.geteuid())
        if brought is None:
            config = self._default_view
        elif isinstance(brought, dict) and brought.keys() <= {"session"}:
            config = msgspec.structs.replace(self._default_view, session=str(brought.get("session", "")))
        elif owner:
            config = ViewConfig.from_json(brought)
        else:
            raise DaemonError(
                f"user {uid} may not choose sources for the daemon of user {os.geteuid()}",
                hint="leave out --cache and keys to use the daemon's own, or use a cache directory of your own",
            )
        return self._sessions.enter(config, may_control=owner, peer=f"pid {pid}, user {uid}", send=send)

    async def _answer(self, session: Session, frame: Frame) -> None:
        """Answer one request; every failure becomes a FAILED with its story."""
        try:
            if frame.kind == Kind.CONTROL:
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
                    row = await store.lookup(view, path, account)
                except AbsentError:
                    session.remember_absent(path)
                    raise
                return Frame(Kind.FOUND, frame.id, wire.found_body(row.number, row.nar_size))
            case Kind.CONTENT:
                ready = await store.content(view, *wire.content(frame.body), account)
                body = wire.ready_body(
                    ready.number, ready.start, ready.end, whole=ready.whole, inode=ready.inode
                )
                return Frame(Kind.READY, frame.id, body)
            case Kind.TREE:
                number = await store.tree(view, wire.path_number(frame.body), account)
                return Frame(Kind.READY, frame.id, wire.ready_body(number, 0, 0, whole=True))
            case Kind.CONTROL:
                request = json.loads(frame.body)
                if not isinstance(request, dict):
                    raise FormatError("CONTROL is not a JSON object", where="request protocol")
                if not session.may_control and request.get("do") not in OPEN_VERBS:
                    raise DaemonError("only the daemon's own user and root may control it")

                def progress(state: dict[str, object]) -> None:
                    session.send(Frame(Kind.PROGRESS, frame.id, json.dumps(state).encode()))

                result = await self._control(session, request, progress)
                return Frame(Kind.RESULT, frame.id, json.dumps(result).encode())
            case _:
                raise FormatError(f"{frame.kind.name} is not a request", where="request protocol")


async def _frame(reader: asyncio.StreamReader) -> Frame:
    length, kind, request = wire.parse_header(await reader.readexactly(wire.HEADER.size))
    return Frame(kind, request, await reader.readexactly(length))


def _peer(writer: asyncio.StreamWriter) -> tuple[int, int]:
    """(pid, uid) of the other end."""
    sock = writer.get_extra_info("socket")
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid
