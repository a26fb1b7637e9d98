"""A small HTTP server that serves a directory and fails as told: per path, and a number of times.

::

    with FaultyServer(directory) as server:
        server.fail("/nar/*", Truncated(after=1000), times=2)     # the first two NAR answers are cut
        server.fail("/*.narinfo", Status(503))                    # for ever, until server.heal()
        assert server.count("/nar/*") == 3

Rules are tried in the order of their making; the first that matches and is not used up applies. Faults at byte
positions count in the body of that answer (not of the file). Threads; safe to program while requests run.
"""

from __future__ import annotations

import contextlib
import fnmatch
import http.server
import re
import socket
import struct
import threading
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Status:
    """Answer with this status and a short body. ``headers`` as in ``Retry-After``."""

    status: int
    headers: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Reset:
    """A TCP reset after ``after`` bytes of the body; ``after=-1``: instead of any answer."""

    after: int = -1


@dataclass(frozen=True, slots=True)
class Truncated:
    """The connection is closed orderly after ``after`` bytes of the body, though more were announced."""

    after: int = 0


@dataclass(frozen=True, slots=True)
class Stall:
    """Silence after ``after`` bytes of the body until ``heal`` or the end; ``after=-1``: before the status line."""

    after: int = -1


@dataclass(frozen=True, slots=True)
class WrongLength:
    """``Content-Length`` is too large by ``by`` (negative: too small), and the body is whole."""

    by: int


@dataclass(frozen=True, slots=True)
class Flipped:
    """All bits of the body's byte ``at`` (negative: from the end) are wrong."""

    at: int


@dataclass(frozen=True, slots=True)
class RangeIgnored:
    """200 and the whole file, whatever range was asked for."""


@dataclass(frozen=True, slots=True)
class WrongRange:
    """206, but of a range that lies ``by`` bytes further on; ``Content-Range`` admits it unless ``hidden``."""

    by: int = 1
    hidden: bool = False


@dataclass(frozen=True, slots=True)
class Body:
    """200 with another body."""

    body: bytes


@dataclass(frozen=True, slots=True)
class Raw:
    """These bytes instead of an answer, then silence until ``heal``; ``hang_up``: then the end of the connection."""

    data: bytes
    hang_up: bool = False


@dataclass(frozen=True, slots=True)
class Drip:
    """A byte every 20 ms until ``heal``, then the rest. ``headers``: of the headers, otherwise of the body."""

    headers: bool = False


@dataclass(frozen=True, slots=True)
class Endless:
    """200 and a body that goes on until the client leaves. ``declared``: its Content-Length; None: chunked."""

    declared: int | None = None
    piece: bytes = b"x" * 65536


@dataclass(frozen=True, slots=True)
class Unsized:
    """The body without any length, ended by the connection's end. ``after``: cut there; None: whole."""

    after: int | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """The body as it is, called ``name`` by Content-Encoding."""

    name: str


Fault = (
    Status
    | Reset
    | Truncated
    | Stall
    | WrongLength
    | Flipped
    | RangeIgnored
    | WrongRange
    | Body
    | Raw
    | Drip
    | Endless
    | Unsized
    | Encoded
)


@dataclass(slots=True)
class _Rule:
    pattern: str
    fault: Fault
    left: int | None


@dataclass(frozen=True, slots=True)
class Seen:
    """A request, with the fault that it met."""

    method: str
    path: str
    range: str
    fault: Fault | None


class FaultyServer:
    """A context manager. ``refuse`` and ``accept`` close and open the port; the port stays the same."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seen: list[Seen] = []
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self._healed = threading.Event()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self.port = 0
        self.accept()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fail(self, pattern: str, fault: Fault, times: int | None = None) -> None:
        """From now on, ``times`` answers (None: all) to paths that match the shell pattern (``*`` matches ``/`` too)."""
        with self._lock:
            self._rules.append(_Rule(pattern, fault, times))

    def heal(self) -> None:
        """Forget all rules; stalled answers go on."""
        with self._lock:
            self._rules.clear()
            self._healed.set()
            self._healed = threading.Event()

    def count(self, pattern: str = "*") -> int:
        """Requests so far whose path matches."""
        with self._lock:
            return sum(fnmatch.fnmatchcase(seen.path, pattern) for seen in self.seen)

    def refuse(self) -> None:
        """New connections are refused. Answers that are under way go on."""
        if self._server is not None:
            assert self._thread is not None
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._server = None

    def accept(self) -> None:
        """The opposite of ``refuse``."""
        if self._server is None:
            self._server = _Server(("127.0.0.1", self.port), self)
            self.port = self._server.server_address[1]
            self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Ends every connection and thread."""
        server = self._server
        self.refuse()
        self.heal()
        if server is not None:
            server.end_connections()

    def met(self, method: str, path: str, range_: str) -> tuple[Fault | None, threading.Event]:
        """Record a request; the fault for it and the event that ends stalls."""
        with self._lock:
            rule = next(
                (r for r in self._rules if r.left != 0 and fnmatch.fnmatchcase(path, r.pattern)), None
            )
            if rule is not None and rule.left is not None:
                rule.left -= 1
            fault = None if rule is None else rule.fault
            self.seen.append(Seen(method, path, range_, fault))
            return fault, self._healed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, address: tuple[str, int], owner: FaultyServer) -> None:
        self.owner = owner
        self._connections: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def end_connections(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):  # it may end by itself at this moment
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may go away at any time; that is no error of the test."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Silent: requests are in ``FaultyServer.seen``."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        asked = self.headers.get("Range", "")
        fault, healed = self.server.owner.met(self.command, path, asked)
        if isinstance(fault, Reset) and fault.after < 0:
            self._reset()
            return
        if isinstance(fault, Stall) and fault.after < 0:
            healed.wait()
        if isinstance(fault, Raw | Endless | Drip | Unsized):
            self.close_connection = True
        if isinstance(fault, Raw):
            self.wfile.write(fault.data)
            if not fault.hang_up:
                healed.wait()
            return
        if isinstance(fault, Endless):
            self._never_end(fault)
            return
        status, headers, body = self._plain_answer(path, asked, fault)
        if isinstance(fault, Flipped) and body:
            at = fault.at % len(body)
            body = body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]
        length = len(body) + (fault.by if isinstance(fault, WrongLength) else 0)
        if fault == Drip(headers=True):
            self._drip(b"HTTP/1.1 200 OK\r\nX-Padding: " + b"x" * 10_000, healed)
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if isinstance(fault, Encoded):
            self.send_header("Content-Encoding", fault.name)
        if not isinstance(fault, Unsized):
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if with_body:
            self._send(body, fault, healed)

    def _plain_answer(
        self, path: str, asked: str, fault: Fault | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        if isinstance(fault, Status):
            return fault.status, fault.headers or {}, f"status {fault.status}, as told\n".encode()
        if isinstance(fault, Body):
            return 200, {}, fault.body
        file = self.server.owner.root / path.lstrip("/")
        if ".." in path.split("/") or not file.is_file():
            return 404, {}, b"no such file\n"
        whole = file.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
        if match is None or isinstance(fault, RangeIgnored):
            return 200, {"Accept-Ranges": "bytes"}, whole
        start = int(match[1])
        end = min(int(match[2] or len(whole) - 1), len(whole) - 1)
        if start > end:
            return 416, {"Content-Range": f"bytes */{len(whole)}"}, b""
        shift = fault.by if isinstance(fault, WrongRange) else 0
        body = whole[start + shift : end + shift + 1]
        admitted = 0 if isinstance(fault, WrongRange) and fault.hidden else shift
        content_range = f"bytes {start + admitted}-{start + admitted + len(body) - 1}/{len(whole)}"
        return 206, {"Content-Range": content_range}, body

    def _send(self, body: bytes, fault: Fault | None, healed: threading.Event) -> None:
        match fault:
            case Truncated(after):
                self.wfile.write(body[:after])
                self.close_connection = True
            case Reset(after):
                self.wfile.write(body[:after])
                self._reset()
            case Stall(after) if after >= 0:
                self.wfile.write(body[:after])
                healed.wait()
                self.wfile.write(body[after:])
            case WrongLength():
                self.wfile.write(body)
                self.close_connection = True
            case Drip():
                self._drip(body, healed)
            case Unsized(after):
                self.wfile.write(body[:after])
            case _:
                self.wfile.write(body)

    def _drip(self, data: bytes, healed: threading.Event) -> None:
        for at in range(len(data)):
            if healed.wait(0.02):
                self.wfile.write(data[at:])
                return
            self.wfile.write(data[at : at + 1])

    def _never_end(self, fault: Endless) -> None:
        piece = fault.piece
        if fault.declared is None:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            piece = b"%x\r\n%s\r\n" % (len(piece), piece)
        else:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % fault.declared)
        while True:  # until the connection is closed at the other end, or by ``end_connections``
            self.wfile.write(piece)

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
