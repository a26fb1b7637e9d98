"""Requests that wait for the store daemon, and the one connection to it.

Any thread parks; one thread (``run``) connects, sends, receives, watches time limits, and hands parked requests back to
be answered. What is missing is asked for once, however many requests wait for it: the key is the name, or the path number
for a tree, and its block for content. When the daemon dies everything asked is asked again of the next one.

I4: a parked request is answered exactly once: by the daemon's reply, its time limit, an interrupt, or a quarantine;
    whoever takes it out of ``_parked`` under the lock answers it.
I5: an interrupt is not lost when it overtakes its request: ``interrupt`` remembers targets that it does not find.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from veneer.formats import request_wire
from veneer.formats.fuse_wire import IN_HEADER, LOOKUP, RESENT, ROOT_NODE
from veneer.formats.request_wire import Frame, Kind, Splitter
from veneer.formats.tree_index import TreeIndex
from veneer.model.errors import DaemonError, FormatError, VeneerError

from .content import Contents
from .stories import Stories
from .tally import Tally
from .trees import Trees

MAX_PARKED = 1 << 16
MISS_SECONDS = 300.0
REMEMBERED_INTERRUPTS = 4096
FIRST_PAUSE, LONGEST_PAUSE, WAITED_FOR_PAUSE = 0.02, 2.0, 0.1
"""Seconds between attempts to connect: doubled each time, and no more than the last while requests wait."""
GREETING_SECONDS = 10.0
TOUCHED_SECONDS = 5.0
"""Between words to the daemon about what was read."""
TOUCHED_WHILE_WAITING = 0.1
"""The same while a reader waits: the sooner the daemon knows how the session reads, the less the next one waits."""

Key = tuple[Kind, int | bytes, int]
"""Of a question: its kind, the path's name or number, and which BLOCK of a content."""
BLOCK = 1 << 17
"""Bytes of a NAR, about one read of the kernel: readers of one block wait for one answer."""


@dataclass(slots=True)
class Parked:
    """A request of the kernel, with its bytes, to be handled again."""

    unique: int
    request: bytearray
    since: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)
    """When it began to wait, or the daemon last said that it gets on: what the time limit counts from."""
    asked: dict[Kind, int] = field(default_factory=dict)
    """How often the daemon was asked for this one in particular."""
    key: Key = (Kind.LOOKUP, b"", 0)

    @property
    def is_root_lookup(self) -> bool:
        header = IN_HEADER.unpack_from(self.request)
        return (header[1], header[3]) == (LOOKUP, ROOT_NODE)


@dataclass(slots=True)
class _Ask:
    """A question to the daemon. ``id`` changes with each connection; 0 until it was sent.

    ``waiting``: by their ``unique``, those of ``_parked`` that wait for it. It outlives them once it was sent: the
    daemon is at work on it.
    """

    key: Key
    body: bytes
    waiting: dict[int, Parked]
    id: int = 0


class Misses:
    """Parked requests. ``answer`` gets (parked, errno): 0 means handle it again, anything else is its reply.

    ``quarantined`` gets (path number, name, its tree if there still is one), ``renewed`` the names that became void with
    a new cache; both run on the misses thread and must not block.
    """

    def __init__(
        self, cache_dirfd: int, view: dict[str, object] | None, trees: Trees, contents: Contents, stories: Stories,
        tally: Tally, *, seconds: float = MISS_SECONDS, max_parked: int = MAX_PARKED,
    ) -> None:  # fmt: skip
        self._address = f"/proc/self/fd/{cache_dirfd}/{request_wire.SOCKET_NAME}"
        self._view = view
        self._trees = trees
        self._contents = contents
        self._stories = stories
        self._tally = tally
        self._seconds = seconds
        self._max_parked = max_parked
        self.answer: Callable[[Parked, int], None] = _nobody
        self.quarantined: Callable[[int, bytes, TreeIndex | None], None] = _nobody
        self.renewed: Callable[[list[bytes]], None] = _nobody
        self._lock = threading.Lock()
        self._parked: dict[int, Parked] = {}
        self._asks: dict[Key, _Ask] = {}
        self._by_id: dict[int, _Ask] = {}
        self._interrupted: dict[int, None] = {}
        self._outbox = bytearray()
        self._next_id = 1
        self._welcome = False
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._last_failure = "it has not been there yet"

    def __del__(self) -> None:
        os.close(self._wake)

    # From any thread.

    def park(
        self, parked: Parked, kind: Kind, key: int | bytes, what: bytes | int | tuple[int, int, int]
    ) -> bool:
        """Takes a request in; False when its caller was interrupted meanwhile. DaemonError: too many wait already."""
        body = _body(what)  # may fail, for numbers of a damaged tree: before anything is changed
        with self._lock:
            unique = parked.unique & ~RESENT
            if unique in self._interrupted:
                return False
            if max(len(self._parked), len(self._asks)) >= self._max_parked:
                raise DaemonError(f"{self._max_parked} requests wait for the store daemon already")
            if (older := self._parked.get(unique)) is not None:
                self._unpark(older)  # the kernel sent it again
            parked.key = (kind, key, what[1] // BLOCK if isinstance(what, tuple) else 0)
            self._parked[unique] = parked
            ask = self._asks.get(parked.key)
            if ask is not None:
                ask.waiting[unique] = parked
                return True
            parked.asked[kind] = parked.asked.get(kind, 0) + 1
            ask = self._asks[parked.key] = _Ask(parked.key, body, {unique: parked})
            if self._welcome:
                self._send(ask)
        os.eventfd_write(self._wake, 1)
        return True

    def interrupt(self, target: int) -> int | None:
        """The ``unique`` to answer with EINTR, when the request was parked. Otherwise it is remembered."""
        with self._lock:
            parked = self._parked.get(target & ~RESENT)
            if parked is None:
                self._interrupted[target & ~RESENT] = None
                if len(self._interrupted) > REMEMBERED_INTERRUPTS:
                    del self._interrupted[next(iter(self._interrupted))]
                return None
            self._unpark(parked)
            return parked.unique

    def root_lookups(self) -> int:
        """How many LOOKUPs in the mount's root wait (and hold its lock in the kernel)."""
        with self._lock:
            return sum(p.is_root_lookup for p in self._parked.values())

    def waiting(self) -> int:
        with self._lock:
            return len(self._parked)

    @property
    def connected(self) -> bool:
        return self._welcome

    def stop(self) -> None:
        self._stopping = True
        os.eventfd_write(self._wake, 1)

    # The misses thread.

    def run(self) -> None:
        """Serves until ``stop``. What is parked then stays parked: the kernel, or a successor, ends it."""
        pause = FIRST_PAUSE
        while not self._stopping:
            connection = self._connect()
            if connection is not None:
                with connection:
                    try:
                        self._talk(connection)
                    except (OSError, FormatError, DaemonError) as error:
                        self._last_failure = str(error) or type(error).__name__
                if self._welcome:
                    pause = FIRST_PAUSE
            self._disconnected()
            self._expire()
            select.select([self._wake], [], [], min(pause, WAITED_FOR_PAUSE) if self._parked else pause)
            self._drain()
            pause = min(2 * pause, LONGEST_PAUSE)

    def _connect(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        connection.setblocking(False)
        try:
            connection.connect(self._address)
        except OSError as error:
            self._last_failure = f"connecting: {error.strerror}"
            connection.close()
            return None
        return connection

    def _talk(self, connection: socket.socket) -> None:
        """One connection, from HELLO to its end. OSError, FormatError, DaemonError: it ended."""
        import json  # after the first requests can be answered, rather than before

        greeted = time.monotonic()
        hello = json.dumps(
            {"version": request_wire.VERSION, "view": self._view, "directories": True}
        ).encode()
        with self._lock:
            self._outbox[:] = Frame(Kind.HELLO, self._take_id(), hello).encode()
        splitter = Splitter()
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(connection, select.POLLIN)
        told = time.monotonic()
        while not self._stopping:
            with self._lock:
                if self._outbox:
                    with contextlib.suppress(BlockingIOError):
                        del self._outbox[: connection.send(self._outbox)]
                poll.modify(connection, select.POLLIN | (select.POLLOUT if self._outbox else 0))
            poll.poll(1000 * self._tick())
            self._drain()
            with contextlib.suppress(BlockingIOError):
                data = connection.recv(1 << 16)
                if not data:
                    raise DaemonError("the store daemon closed the connection")
                for frame in splitter.feed(data):
                    self._received(frame)
            now = time.monotonic()
            if not self._welcome and now - greeted > GREETING_SECONDS:
                raise DaemonError("the store daemon did not answer HELLO")
            self._expire()
            if self._welcome and now - told > (TOUCHED_WHILE_WAITING if self._parked else TOUCHED_SECONDS):
                told = now
                if rows := self._tally.news():
                    with self._lock:
                        for body in request_wire.touched_bodies(rows):
                            self._outbox += Frame(Kind.TOUCHED, self._take_id(), body).encode()

    def _tick(self) -> float:
        """Seconds until something has to be looked at even when nothing is received."""
        return max(0.01, min(1.0, self._seconds / 8)) if self._parked else TOUCHED_SECONDS

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _send(self, ask: _Ask) -> None:
        """Under the lock."""
        ask.id = self._take_id()
        self._by_id[ask.id] = ask
        self._outbox += Frame(ask.key[0], ask.id, ask.body).encode()

    def _disconnected(self) -> None:
        with self._lock:
            self._welcome = False
            self._by_id.clear()
            self._outbox.clear()
            self._asks = {key: ask for key, ask in self._asks.items() if ask.waiting}
            for ask in self._asks.values():
                ask.id = 0

    def _received(self, frame: Frame) -> None:
        if frame.kind is Kind.WELCOME:
            self._welcomed(frame)
        elif frame.kind is Kind.PRESENT:
            self._trees.absent.drop(frame.body)
        elif frame.kind is Kind.DROPPED:
            self._contents.drop(request_wire.path_number(frame.body))
        elif frame.kind is Kind.QUARANTINED:
            self._quarantine(*request_wire.quarantined(frame.body))
        elif frame.kind is Kind.PROGRESS:
            self._heard(frame.id)
        elif frame.kind is Kind.FAILED and not self._welcome:
            self._refused(*request_wire.failed(frame.body))
        elif frame.kind in (Kind.FOUND, Kind.DIRECTORY, Kind.ABSENT, Kind.FAILED, Kind.READY):
            self._replied(frame)
        else:
            raise FormatError(f"unexpected {frame.kind.name}", where="request protocol")

    def _welcomed(self, frame: Frame) -> None:
        import json

        try:
            generation = bytes.fromhex(json.loads(frame.body)["generation"])
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError("WELCOME cannot be read", where="request protocol") from error
        # Notices may have been missed since the last connection: ask again rather than trust what is open.
        self._trees.absent.clear()
        self._contents.clear()
        if void := self._trees.change_generation(generation):
            self.renewed(void)
        with self._lock:
            self._welcome = True
            for ask in self._asks.values():
                self._send(ask)

    def _refused(self, code: int, story: str) -> None:
        """The daemon does not take us (our view, another version): nothing will come of waiting."""
        for parked in self._take(lambda _: True):
            self._fail(parked, code, f"the store daemon refused this mount: {story}")
        raise DaemonError(f"refused: {story}")

    def _heard(self, request: int) -> None:
        with self._lock:
            ask = self._by_id.get(request)
            for parked in ask.waiting.values() if ask is not None else ():
                parked.heard = time.monotonic()

    def _replied(self, frame: Frame) -> None:
        with self._lock:
            ask = self._by_id.pop(frame.id, None)
            if ask is None:
                return
            del self._asks[ask.key]
            waiting = list(ask.waiting.values())
            for parked in waiting:
                del self._parked[parked.unique & ~RESENT]
        try:
            code, story = self._outcome(*ask.key[:2], frame)
        except (OSError, FormatError) as error:  # I4: they are in nobody else's hands
            for parked in waiting:
                self._fail(parked, errno.EIO, f"the store daemon's answer is of no use: {error}")
            if isinstance(error, FormatError):
                raise
            return
        if story is not None:
            for parked in waiting:
                self._fail(parked, code, story)
            return
        for parked in waiting:
            self._answered(parked)
            self.answer(parked, code)

    def _outcome(self, kind: Kind, key: int | bytes, frame: Frame) -> tuple[int, str | None]:
        """(errno, story of a failure) that an answer means, once what it tells is noted. FormatError, OSError."""
        if frame.kind is Kind.FAILED:
            code, told = request_wire.failed(frame.body)
            story = told.partition("\nhint: ")[0]
            if not 0 < code < 4096 or (code == errno.ENOENT and kind is not Kind.LOOKUP):
                code = errno.EIO
            return code, story
        if frame.kind in (Kind.FOUND, Kind.DIRECTORY) and isinstance(key, bytes):
            number, _ = request_wire.found(frame.body)
            if not 0 < number < 1 << 32:
                raise FormatError(f"path number {number}", where="request protocol")
            if frame.kind is Kind.DIRECTORY:
                self._trees.directories.put(number, True)
            self._trees.numbers.put(key, number)
        elif frame.kind is Kind.ABSENT and isinstance(key, bytes):
            seconds = request_wire.absent(frame.body) / 1000
            self._trees.absent.put(key, seconds)
            self._stories.event("absent", seconds=seconds)
            return errno.ENOENT, None
        elif frame.kind is Kind.READY and kind is not Kind.LOOKUP:
            if kind is Kind.CONTENT:
                number, start, end, whole, inode = request_wire.ready(frame.body)
                self._contents.ready(number, start, end, whole=whole, inode=inode)
        else:
            raise FormatError(f"{frame.kind.name} as a reply to {kind.name}", where="request protocol")
        return 0, None

    def _quarantine(self, number: int, name: str) -> None:
        index = None
        try:
            index = self._trees.forget(number, name.encode("ascii", "replace"))
        except (OSError, VeneerError) as error:
            self._stories.tell_error(error, f"{name}: files to forget")
        self._contents.drop(number)
        for parked in self._take(lambda p: p.key[1] == number):
            self._fail(parked, errno.EIO, f"{name} was quarantined: its content is not what was signed")
        self.quarantined(number, name.encode("ascii", "replace"), index)
        self._stories.event("condemned", path=name)

    def _expire(self) -> None:
        if not self._parked:
            return
        limit = time.monotonic() - self._seconds
        for parked in self._take(lambda p: p.heard <= limit):
            if self._welcome:
                why = f"the store daemon did not get on with it for {self._seconds:g} s"
            else:
                why = f"no store daemon within {self._seconds:g} s ({self._last_failure})"
            self._fail(parked, errno.EIO, why)

    def _take(self, which: Callable[[Parked], bool]) -> list[Parked]:
        with self._lock:
            taken = [p for p in self._parked.values() if which(p)]
            for parked in taken:
                self._unpark(parked)
        return taken

    def _unpark(self, parked: Parked) -> None:
        """Under the lock."""
        unique = parked.unique & ~RESENT
        del self._parked[unique]
        ask = self._asks[parked.key]
        del ask.waiting[unique]
        if not ask.waiting and not ask.id:
            del self._asks[ask.key]

    def _fail(self, parked: Parked, code: int, story: str) -> None:
        kind, key, _ = parked.key
        about = key.decode("ascii", "replace") if isinstance(key, bytes) else self._tally.name(key)
        self._stories.tell(code, f"{kind.name} {about}", story)
        self._answered(parked)
        self.answer(parked, code)

    def _answered(self, parked: Parked) -> None:
        key = parked.key[1]
        number = self._trees.numbers.get(key) if isinstance(key, bytes) else key
        if number is not None:
            self._tally.waited(number, time.monotonic() - parked.since)


def _body(what: bytes | int | tuple[int, int, int]) -> bytes:
    if isinstance(what, bytes):
        return what
    if isinstance(what, int):
        return request_wire.path_number_body(what)
    return request_wire.content_body(*what)


def _nobody(*_: object) -> None:
    """Before ``MountServer`` has put its own in."""
