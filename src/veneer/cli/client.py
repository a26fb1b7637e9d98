"""The command line's connection to the store daemon: blocking, one request at a time.

Protocol: ``formats.request_wire``. ``private_daemon`` starts a daemon when none listens.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from veneer.formats import request_wire as wire
from veneer.formats.request_wire import Frame, Kind
from veneer.model.errors import (
    CacheError,
    DaemonError,
    FormatError,
    MachineError,
    NotFoundError,
    SourceError,
    TrustError,
    UsageError,
    VeneerError,
)

LOG_NAME = "daemon.log"
"""Of a private daemon, in the cache directory."""
ANSWER_SECONDS = 10.0
"""How long a daemon that listens may take to answer HELLO."""
_CHUNK = 1 << 16
_UNHEARD = 0xFFFF_FFFF
"""The id of requests whose answers are dropped."""
_BY_EXIT_CODE: dict[int, type[VeneerError]] = {
    kind.exit_code: kind
    for kind in (UsageError, TrustError, SourceError, MachineError, CacheError, DaemonError)
}

Progress = Callable[[Mapping[str, object]], None]


def _no_progress(_: Mapping[str, object]) -> None:
    return None


class LostDaemonError(DaemonError):
    """It was there, and has gone: perhaps only at its end, when the next one takes its place."""


class Client:
    """One connection. Not for concurrent use. Close it, or use it as a context manager."""

    def __init__(self, connection: socket.socket, view: Mapping[str, object] | None, where: str) -> None:
        """Sends HELLO with ``view`` (None: the daemon's own) and does not wait. ``where``: for messages."""
        self._socket = connection
        self._where = where
        self._splitter = wire.Splitter()
        self._frames: list[Frame] = []
        self._last = 1
        self._generation: bytes | None = None
        self._send(Kind.HELLO, json.dumps({"version": wire.VERSION, "view": view}).encode())

    def greet(self, seconds: float = ANSWER_SECONDS) -> bytes:
        """Wait until the daemon answered HELLO; the cache's generation. DaemonError when it does not answer as one."""
        if self._generation is None:
            self._wait_at_most(seconds)
            welcome = self._answer((Kind.WELCOME,), _no_progress)
            self._wait_at_most(None)
            self._generation = bytes.fromhex(str(_document(welcome.body).get("generation", "")))
        return self._generation

    def control(
        self,
        verb: str,
        arguments: Mapping[str, object] | None = None,
        progress: Progress = _no_progress,
        seconds: float | None = None,
    ) -> dict[str, object]:
        """Ask for ``verb``; the RESULT. ``progress`` is told each PROGRESS; ``seconds``: the longest silence.

        NotFoundError, VeneerError: the daemon says FAILED. DaemonError: it is gone or silent; close the client then.
        """
        self.greet()
        self._last += 1
        self._wait_at_most(seconds)
        self._send(Kind.CONTROL, json.dumps({"do": verb, **(arguments or {})}).encode())
        return _document(self._answer((Kind.RESULT,), progress).body)

    def tell(self, verb: str, arguments: Mapping[str, object]) -> None:
        """Ask for ``verb`` without waiting: not even for the daemon to be up. Nobody hears its answer."""
        self._send(Kind.CONTROL, json.dumps({"do": verb, **arguments}).encode(), request=_UNHEARD)

    def fileno(self) -> int:
        return self._socket.fileno()

    def absorb(self) -> bool:
        """Take in what has arrived unasked (notices, the answer to HELLO), without blocking. False: the daemon is gone."""
        try:
            data = self._socket.recv(_CHUNK, socket.MSG_DONTWAIT)
            self._frames += [frame for frame in self._splitter.feed(data) if frame.id not in (0, _UNHEARD)]
        except BlockingIOError:
            return True
        except (OSError, FormatError):
            return False
        return bool(data)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait_at_most(self, seconds: float | None) -> None:
        try:
            self._socket.settimeout(seconds)
        except OSError as error:  # it was closed, for the daemon had gone
            raise self._lost(error) from error

    def _send(self, kind: Kind, body: bytes, request: int | None = None) -> None:
        try:
            self._socket.sendall(Frame(kind, self._last if request is None else request, body).encode())
        except BrokenPipeError:
            pass  # the daemon left; what it said before it did can still be read
        except OSError as error:
            raise self._lost(error) from error

    def _answer(self, kinds: tuple[Kind, ...], progress: Progress) -> Frame:
        try:
            while True:
                frame = self._receive()
                if frame.kind is Kind.FAILED and frame.id == 0:
                    raise failure(frame.body)  # said of the whole connection
                if frame.id != self._last:
                    continue  # a notice, or an answer that nobody waits for any more
                if frame.kind is Kind.PROGRESS:
                    progress(_document(frame.body))
                elif frame.kind is Kind.FAILED:
                    raise failure(frame.body)
                elif frame.kind is Kind.ABSENT:
                    raise NotFoundError("no source has it", hint="veneer status lists the sources asked")
                elif frame.kind in kinds:
                    return frame
                else:
                    raise DaemonError(f"the daemon answered with {frame.kind.name}", where=self._where)
        except OSError as error:
            raise self._lost(error) from error
        except FormatError as error:
            raise DaemonError(f"the daemon broke the protocol: {error.what}", where=self._where) from error

    def _receive(self) -> Frame:
        while not self._frames:
            data = self._socket.recv(_CHUNK)
            if not data:
                raise LostDaemonError("the daemon closed the connection", where=self._where)
            self._frames = self._splitter.feed(data)
        return self._frames.pop(0)

    def _lost(self, error: OSError) -> DaemonError:
        if isinstance(error, TimeoutError):
            return DaemonError("the daemon does not answer", where=self._where)
        return LostDaemonError(f"lost the daemon: {error.strerror or error}", where=self._where)


def failure(body: bytes) -> VeneerError:
    """The error of a FAILED answer: its story may end with a line that begins ``hint:``."""
    number, story = wire.failed(body)
    what, _, hint = story.partition("\nhint: ")
    kind = (
        NotFoundError
        if number == errno.ENOENT
        else _BY_EXIT_CODE.get(wire.failed_exit_code(body), VeneerError)
    )
    return kind(what, hint=hint)


def _document(body: bytes) -> dict[str, object]:
    try:
        document = json.loads(body)
    except ValueError as error:
        raise DaemonError("the daemon broke the protocol: not JSON") from error
    if not isinstance(document, dict):
        raise DaemonError("the daemon broke the protocol: not a JSON object")
    return document


def open_socket(cache_dir: Path) -> socket.socket | None:
    """A connected socket to the daemon of ``cache_dir``; None when none listens. DaemonError when it may not be used."""
    try:
        directory = os.open(cache_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(f"cannot use the cache directory: {error.strerror}", where=str(cache_dir)) from error
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Socket addresses end at 107 bytes; cache directories do not.
        _limit_sending(connection, ANSWER_SECONDS)
        connection.connect(f"/proc/self/fd/{directory}/{wire.SOCKET_NAME}")
        _limit_sending(connection, 0)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        raise DaemonError(
            f"cannot reach the daemon: {error.strerror}", where=str(cache_dir / wire.SOCKET_NAME)
        ) from error
    finally:
        os.close(directory)
    return connection


def _limit_sending(connection: socket.socket, seconds: float) -> None:
    """It also holds for ``connect``, which waits while more clients than a socket's queue holds wait for its daemon; 0: for ever."""
    parts = divmod(round(1e6 * seconds), 1_000_000)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", *parts))


def connect(cache_dir: Path, view: Mapping[str, object] | None) -> Client | None:
    """A greeted client of the running daemon; None when none runs, or it is ending. DaemonError: it does not answer as one."""
    connection = open_socket(cache_dir)
    if connection is None:
        return None
    try:
        client = Client(connection, view, str(cache_dir / wire.SOCKET_NAME))
        client.greet()
    except LostDaemonError:
        connection.close()
        return None
    return client
