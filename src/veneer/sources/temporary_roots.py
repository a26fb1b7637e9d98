"""Temporary roots in a store of real Nix: its garbage collector leaves alone what a living process has named.

Source: what Nix 2.8, 2.26 and 2.34 do and respect. Two ways, the first that is open to us:

- *our own file*, where we may write to Nix's state directory: ``temproots/<pid>`` holds absolute paths, each ended by a zero
  byte, under a shared ``flock`` for as long as they count; the collector removes files that it can lock. While it runs (it
  holds ``gc.lock``) it reads no files any more, and has to be told over ``gc-socket/socket``: path, newline; its answer is one byte.
- *the nix-daemon's*, elsewhere: AddTempRoot (11) of the worker protocol, on a connection that we keep open.

R1: a path that ``hold`` returned for was safe from then on, so whoever looks whether it exists looks afterwards.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
from pathlib import Path

from veneer.model.errors import SourceError

SECONDS = 10.0
"""How long the collector and the nix-daemon may take to answer."""
_CLIENT, _SERVER = 0x6E697863, 0x6478696F
_VERSION = 0x115
"""1.21 of the worker protocol: the greeting without features, versions and trust."""
_ADD_TEMP_ROOT = 11
_LAST = 0x616C7473
_u64 = struct.Struct("<Q")


class TemporaryRoots:
    """Roots of one store, until ``close``. Any thread."""

    def __init__(self, state_dir: Path) -> None:
        self._state = state_dir
        self._lock = threading.Lock()
        self._held: set[str] = set()
        self._file = -1
        self._daemon: socket.socket | None = None

    def hold(self, path: str) -> None:
        """Keep the collector from ``path`` (absolute). SourceError when there is no way to."""
        with self._lock:
            if path in self._held:
                return
            try:
                if self._daemon is None and os.access(self._state / "temproots", os.W_OK):
                    self._hold_by_file(path)
                else:
                    self._hold_by_daemon(path)
            except OSError as error:
                self._drop_daemon()
                raise SourceError(
                    f"its garbage collector cannot be kept from {path}: {error.strerror or error}",
                    where=str(self._state),
                    hint="run its nix-daemon, or call veneer as the owner of the store",
                ) from error
            self._held.add(path)

    def close(self) -> None:
        with self._lock:
            self._held.clear()
            self._drop_daemon()
            if self._file >= 0:
                file, self._file = self._file, -1
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody else of this process uses it
                    self._place.unlink(missing_ok=True)
                except BlockingIOError:
                    pass
                finally:
                    os.close(file)

    @property
    def _place(self) -> Path:
        return self._state / "temproots" / str(os.getpid())

    def _hold_by_file(self, path: str) -> None:
        if self._file < 0:
            self._file = self._open()
        lock = os.open(self._state / "gc.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                self._tell_collector(path)
            os.write(self._file, os.fsencode(path) + b"\0")
        finally:
            os.close(lock)

    def _open(self) -> int:
        while True:
            file = os.open(self._place, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.ftruncate(file, 0)  # left by a process that had our number
                except BlockingIOError:
                    pass  # another view's, or a collector's look at it
                fcntl.flock(file, fcntl.LOCK_SH)
                if os.fstat(file).st_nlink:  # else a collector removed it before it was locked
                    return file
            except OSError:
                os.close(file)
                raise
            os.close(file)

    def _tell_collector(self, path: str) -> None:
        with socket.socket(socket.AF_UNIX) as collector:
            collector.settimeout(SECONDS)
            try:
                collector.connect(str(self._state / "gc-socket" / "socket"))
            except (FileNotFoundError, ConnectionRefusedError):
                return  # it ends just now
            collector.sendall(os.fsencode(path) + b"\n")
            collector.recv(1)  # nothing: it has ended

    def _hold_by_daemon(self, path: str) -> None:
        if self._daemon is None:
            self._daemon = self._greeted()
        name = os.fsencode(path)
        padding = bytes(-len(name) % 8)
        self._daemon.sendall(_u64.pack(_ADD_TEMP_ROOT) + _u64.pack(len(name)) + name + padding)
        self._expect(self._daemon, _LAST)
        self._expect(self._daemon, 1)

    def _greeted(self) -> socket.socket:
        daemon = socket.socket(socket.AF_UNIX)
        try:
            daemon.settimeout(SECONDS)
            daemon.connect(str(self._state / "daemon-socket" / "socket"))
            daemon.sendall(_u64.pack(_CLIENT))
            self._expect(daemon, _SERVER)
            self._number(daemon)
            daemon.sendall(_u64.pack(_VERSION) + _u64.pack(0) + _u64.pack(0))  # version, affinity, reserve
            self._expect(daemon, _LAST)
        except OSError:
            daemon.close()
            raise
        return daemon

    def _expect(self, daemon: socket.socket, wanted: int) -> None:
        found = self._number(daemon)
        if found != wanted:
            raise OSError(f"the nix-daemon answered {found:#x}, not {wanted:#x}")

    def _number(self, daemon: socket.socket) -> int:
        data = b""
        while len(data) < _u64.size:
            more = daemon.recv(_u64.size - len(data))
            if not more:
                raise OSError("the nix-daemon closed the connection")
            data += more
        number: int = _u64.unpack(data)[0]
        return number

    def _drop_daemon(self) -> None:
        """With the connection its roots go; they are asked for again."""
        if self._daemon is not None:
            self._daemon.close()
            self._daemon = None
            self._held.clear()
