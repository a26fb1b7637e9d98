"""A store daemon that speaks the request protocol and does as a test says, and a mount served on top of it.

Contents need no NAR framing here: the mount server reads (offset, size), and that is what is laid out.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from veneer.formats import request_wire
from veneer.formats.request_wire import Frame, Kind, Splitter
from veneer.formats.tree_index import encode_tree, nar_file, tree_file
from veneer.model.tree import Directory, Node, RegularFile, Symlink
from veneer.mount import device

GENERATION = b"generation of 16"
HASH_PART = "0123456789abcdfghijklmnpqrsvwxyz"

Spec = bytes | str | Mapping[bytes, "Spec"]
"""A tree in short: bytes are a file's content (executable when they begin with #!), str a link's target."""


def store_name(name: str) -> str:
    return f"{HASH_PART}-{name}"


def tree_of(spec: Spec, offset: int = 96) -> tuple[Node, dict[int, bytes]]:
    """A node, and the content by offset."""
    contents: dict[int, bytes] = {}

    def build(spec: Spec) -> Node:
        nonlocal offset
        if isinstance(spec, bytes):
            offset += 120
            contents[offset] = spec
            node = RegularFile(len(spec), spec.startswith(b"#!"), offset)
            offset += len(spec) + 7 & ~7
            return node
        if isinstance(spec, str):
            return Symlink(os.fsencode(spec))
        return Directory(tuple((name, build(child)) for name, child in sorted(spec.items())))

    return build(spec), contents


class StubDaemon:
    """One daemon over a cache directory, on threads. ``hold`` and ``refuse`` are read at each request."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.numbers: dict[str, int] = {}
        self.sizes: dict[int, int] = {}
        self.contents: dict[int, dict[int, bytes]] = {}
        self.trees: dict[int, bytes] = {}
        self.asked: list[tuple[Kind, bytes]] = []
        self.absent_ms = 60_000
        self.generation = GENERATION
        self.refuse: dict[str | int, tuple[int, str]] = {}
        self.held: set[str | int] = set()
        """Names whose LOOKUP, numbers whose TREE and CONTENT get no answer until ``release``."""
        self.bare: set[str] = set()
        """Names that LOOKUP tells as directories, without their tree."""
        self._waiting: list[tuple[socket.socket, Frame]] = []
        self._lock = threading.RLock()
        self.changed = threading.Condition(self._lock)
        self._listener: socket.socket | None = None
        self._connections: list[socket.socket] = []

    # The store behind it.

    def add(self, name: str, spec: Spec | Node, *, number: int | None = None, whole: bool = False) -> str:
        """Makes a store path known; returns its base name. ``whole``: tree and NAR file are there already."""
        basename = name if len(name) > 33 and name[32] == "-" else store_name(name)
        number = number or 0x4000_0000 + len(self.numbers)
        if isinstance(spec, RegularFile | Symlink | Directory):
            node: Node = spec
            contents: dict[int, bytes] = {}
        else:
            node, contents = tree_of(spec)
        size = max([offset + len(data) for offset, data in contents.items()] or [0]) + 64
        if not contents:
            size = (1 << 63) - 1
        self.numbers[basename] = number
        self.sizes[number] = size
        self.contents[number] = contents
        self.trees[number] = bytes(
            encode_tree(
                node, path_number=number, generation=self.generation, nar_hash=bytes(32), nar_size=size
            )
        )
        if whole:
            self.publish_tree(number)
            self.publish_nar(number)
        return basename

    def publish_tree(self, number: int) -> None:
        self._publish(tree_file(number), self.trees[number])

    def publish_nar(self, number: int, *, part: int | None = None) -> None:
        """The NAR file; ``part``: a growing one with that many bytes."""
        path = self.cache / (nar_file(number) + (".part" if part is not None else ""))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name("incoming")
        with open(temporary, "wb") as out:
            for offset, data in self.contents[number].items():
                os.pwrite(out.fileno(), data, offset)
            out.truncate(self.sizes[number] if part is None else part)
        temporary.replace(path)

    def _publish(self, name: str, data: bytes) -> None:
        path = self.cache / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name("incoming").write_bytes(data)
        path.with_name("incoming").replace(path)

    # The daemon.

    def start(self) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path = self.cache / request_wire.SOCKET_NAME
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        listener.listen()
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def stop(self) -> None:
        """As if killed: connections end in the middle of whatever they were doing."""
        with self._lock:
            if self._listener is not None:
                self._listener.shutdown(socket.SHUT_RDWR)
                self._listener.close()
                self._listener = None
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._connections.clear()
            self._waiting.clear()

    def hold(self, *keys: str | int) -> None:
        self.held.update(keys)

    def release(self) -> None:
        """Answers what was held."""
        with self._lock:
            self.held.clear()
            waiting, self._waiting = self._waiting, []
            for connection, frame in waiting:
                with contextlib.suppress(OSError):  # whoever asked was killed
                    self._reply(connection, frame)

    def sign(self) -> None:
        """Tells who waits for what is held that content is arriving."""
        with self._lock:
            for connection, frame in self._waiting:
                connection.sendall(Frame(Kind.PROGRESS, frame.id, b"{}").encode())

    def wait_for(self, kind: Kind, count: int = 1, seconds: float = 20) -> None:
        """Until ``count`` requests of a kind have come since the start."""
        with self.changed:
            if not self.changed.wait_for(lambda: sum(k is kind for k, _ in self.asked) >= count, seconds):
                raise AssertionError(f"no {count} {kind.name} within {seconds} s: {self.asked[-5:]}")

    def count(self, kind: Kind) -> int:
        with self._lock:
            return sum(k is kind for k, _ in self.asked)

    def notify(self, kind: Kind, body: bytes) -> None:
        with self._lock:
            for connection in self._connections:
                connection.sendall(Frame(kind, 0, body).encode())

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        splitter = Splitter()
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(1 << 16):
                for frame in splitter.feed(data):
                    with self.changed:
                        self.asked.append((frame.kind, frame.body))
                        self._reply(connection, frame)
                        self.changed.notify_all()

    def _reply(self, connection: socket.socket, frame: Frame) -> None:
        reply = self._answer(connection, frame)
        if reply is not None:
            kind, body = reply
            connection.sendall(Frame(kind, frame.id, body).encode())

    def _answer(self, connection: socket.socket, frame: Frame) -> tuple[Kind, bytes] | None:
        if frame.kind is Kind.HELLO:
            self._connections.append(connection)
            return Kind.WELCOME, json.dumps({"version": 1, "generation": self.generation.hex()}).encode()
        key: str | int
        if frame.kind is Kind.LOOKUP:
            key = frame.body.decode()
        elif frame.kind is Kind.TREE:
            key = request_wire.path_number(frame.body)
        elif frame.kind is Kind.CONTENT:
            key = request_wire.content(frame.body)[0]
        else:
            return None
        if key in self.held:
            self._waiting.append((connection, frame))
            return None
        if key in self.refuse:
            return Kind.FAILED, request_wire.failed_body(*self.refuse[key])
        if isinstance(key, str):
            number = self.numbers.get(key)
            if number is None:
                return Kind.ABSENT, request_wire.absent_body(self.absent_ms)
            if key in self.bare:
                return Kind.DIRECTORY, request_wire.found_body(number, self.sizes[number])
            self.publish_tree(number)
            return Kind.FOUND, request_wire.found_body(number, self.sizes[number])
        if frame.kind is Kind.TREE:
            self.publish_tree(key)
            return Kind.READY, request_wire.ready_body(key, 0, 0, whole=True)
        return self.ready(key, *request_wire.content(frame.body)[1:])

    def ready(self, number: int, offset: int, size: int) -> tuple[Kind, bytes]:
        """How CONTENT is answered: here the whole NAR at once."""
        self.publish_nar(number)
        return Kind.READY, request_wire.ready_body(number, 0, self.sizes[number], whole=True)


class Mounted:
    """A mount served by a subprocess. Kills the server after ``limit`` seconds, so that no test can hang."""

    def __init__(self, directory: Path, *, miss_seconds: float = 30.0, limit: float = 60.0) -> None:
        self.cache = directory / "cache"
        self.cache.mkdir()
        self.root = directory / "mount"
        self.root.mkdir()
        self.daemon = StubDaemon(self.cache)
        self.miss_seconds = miss_seconds
        fd = device.open_fuse()
        try:
            device.mount_fuse(fd, str(self.root))
            self._report: IO[bytes]
            self.process = self._start(fd)
        finally:
            os.close(fd)
        self._watchdog = threading.Timer(limit, self.process.kill)
        self._watchdog.daemon = True
        self._watchdog.start()

    def _start(self, fuse_fd: int) -> subprocess.Popen[bytes]:
        cache_fd = os.open(self.cache, os.O_RDONLY | os.O_DIRECTORY)
        report, report_out = os.pipe()
        try:
            return subprocess.Popen(
                [sys.executable, "-m", "veneer.mount", "--fuse-fd", str(fuse_fd), "--cache-fd", str(cache_fd),
                 "--report-fd", str(report_out), "--miss-seconds", str(self.miss_seconds)],
                pass_fds=(fuse_fd, cache_fd, report_out),
            )  # fmt: skip
        finally:
            self._report = os.fdopen(report, "rb")
            os.close(cache_fd)
            os.close(report_out)

    def path(self, basename: str) -> Path:
        return self.root / basename

    def umount(self) -> None:
        device.umount(str(self.root))

    def report(self) -> dict[str, object]:
        """After the server has ended."""
        report = json.loads(self._report.read())
        assert isinstance(report, dict)
        return report

    def close(self) -> None:
        self._watchdog.cancel()
        with contextlib.suppress(Exception):
            device.umount(str(self.root), detach=True)
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        self._report.close()
        self.daemon.stop()


@contextlib.contextmanager
def mounted(directory: Path, *, miss_seconds: float = 30.0, limit: float = 60.0) -> Iterator[Mounted]:
    mount = Mounted(directory, miss_seconds=miss_seconds, limit=limit)
    try:
        yield mount
    finally:
        mount.close()
