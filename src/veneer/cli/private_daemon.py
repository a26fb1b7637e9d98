"""A private daemon: started by a command when none serves the cache directory; it ends when its last client has left.

Its starter is its first client, by one end of a socket pair: requests can be sent before the daemon is up, its answer to
HELLO says that it is, and the end of its starter, however it came, is the end of the connection.

Its messages go to ``daemon.log`` in the cache directory; when it dies at start, what it said there is the error that the
user sees. Two commands may start one at the same time: the loser of the cache's lock ends with status 0, and its starter
connects to the winner.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from veneer.cli.client import ANSWER_SECONDS, LOG_NAME, Client, connect
from veneer.cli.config import Settings
from veneer.cli.limits import daemon_flags
from veneer.cli.output import Output
from veneer.daemon.listening import DEFAULT_NAME, DIRECTORY, connected, listen
from veneer.model.errors import CacheError, DaemonError, MachineError, VeneerError
from veneer.model.program import Program

START_SECONDS = 20.0
"""How long a command waits for the daemon that it started."""
RESTARTS = 5
RESTART_SECONDS = 60.0
_ATTEMPTS = 3
_LOG_LIMIT = 1 << 20
_TAIL = 4096
_RELAYED = 1 << 16
_PREFIX = "veneer daemon: "


@dataclass(slots=True)
class PrivateDaemon:
    """A daemon that this process started, perhaps not up yet; ``client`` is its first."""

    process: subprocess.Popen[bytes]
    client: Client
    log: Path
    log_start: int

    def end(self) -> DaemonError | None:
        """Leave it, and wait until it has ended: ``failure``. One that does not end is killed: None, and its status tells."""
        self.client.close()
        try:
            self.process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None
        return self.failure()

    def failure(self) -> DaemonError | None:
        """Why it ended, when it ended with an error."""
        status = self.process.poll()
        if not status:
            return None
        said = ""
        with contextlib.suppress(OSError), open(self.log, "rb") as log:  # the cache directory may be gone
            log.seek(self.log_start)
            said = log.read()[-_TAIL:].decode("utf-8", "replace").rpartition(_PREFIX)[2].strip()
        what, _, hint = said.partition("\nhint: ")
        line = what.splitlines()[-1] if what else f"without a word, status {status}"
        return DaemonError(f"the store daemon ended: {line}", where=str(self.log), hint=hint)


class WatchedDaemon:
    """The daemon of a run: one that listened already, or a private one; followed by another when it dies.

    Implements ``environment.Companion``. A private daemon that gave way to a rival, and one that somebody killed, have
    a successor at once; one that ended with an error of its own is reported and has none, nor has the last of
    RESTARTS within RESTART_SECONDS. A program that was adopted and fails gives way to the one before.
    """

    def __init__(self, settings: Settings, session: str, output: Output, *, nix: bool = False) -> None:
        """``nix``: have a socket on which Nix may ask, ``nix_socket``."""
        self._nix = nix
        self._listening: socket.socket | None = None
        self._settings = settings
        self._session = session
        self._output = output
        self._starts: list[float] = []
        self._private: PrivateDaemon | None = None
        self._program: Program | None = None
        self._before: list[Program | None] = []
        """What to go back to, when the adopted program fails."""
        self.client = self._begin()

    def fileno(self) -> int:
        return self.client.fileno()

    def readable(self) -> bool:
        if self.client.absorb():
            return True
        return self._succeed()

    def adopt(self, program: Program) -> None:
        """The next daemon is this program."""
        if program != self._program:
            self._before = [self._program]
            self._program = program

    def close(self) -> None:
        self.client.close()
        if self._listening is not None:
            self._listening.close()
        if self._nix and not self._settings.borrowed:
            self.nix_socket.unlink(missing_ok=True)

    @property
    def nix_socket(self) -> Path:
        """Where Nix asks. It takes connections before the daemon is up, which answers them then."""
        if self._settings.borrowed:
            return self._settings.cache_dir / DEFAULT_NAME
        return self._settings.cache_dir / DIRECTORY / f"{self._session}.sock"

    def _begin(self) -> Client:
        self._starts.append(time.monotonic())
        client = connect(self._settings.cache_dir, self._settings.view(self._session))
        if client is not None:
            self._private = None
            if self._nix and not self._settings.borrowed:
                client.control("nix-socket", {"name": self._session}, seconds=ANSWER_SECONDS)
                self._hand_over()
            return client
        if self._nix and self._listening is None:
            self.nix_socket.parent.mkdir(mode=0o700, exist_ok=True)
            self._listening = listen(self.nix_socket, shared=False)
        self._private = start(self._settings, self._session, self._listening, self._program)
        if self._nix:
            self._private.client.tell("nix-socket", {"name": self._session})
        return self._private.client

    def _hand_over(self) -> None:
        """Whoever connected to our own socket, for a private daemon that gave way, is led to the daemon that has one now.

        Its socket is in the place of ours. Without this they would wait for ever.
        """
        for waiting in self._closed():
            threading.Thread(target=_relay, args=(waiting, self.nix_socket), daemon=True).start()

    def _turn_away(self) -> None:
        """There will be no daemon: Nix gets an error instead of waiting for one for ever."""
        if self._listening is not None:
            self.nix_socket.unlink(missing_ok=True)
        for waiting in self._closed():
            waiting.close()

    def _closed(self) -> Iterator[socket.socket]:
        """Take our own socket's last callers. No more can come, though processes that we forked have it open, too."""
        if self._listening is None:
            return
        with self._listening as listening:
            self._listening = None
            with contextlib.suppress(OSError):  # nobody is left
                listening.shutdown(socket.SHUT_RD)
                while True:
                    yield listening.accept()[0]

    def _succeed(self) -> bool:
        """Whether there is a successor."""
        if self._has_begun_anew():
            return True
        self._turn_away()
        return False

    def _has_begun_anew(self) -> bool:
        self.client.close()
        try:
            if self._private is not None:
                self._private.process.wait(START_SECONDS)
                error = self._private.failure()
                if error is not None and (self._private.process.returncode or 0) > 0:
                    if not self._before:
                        raise error
                    self._program = self._before.pop()
                    self._output.error(error)
                    self._output.warning("the version before goes on as the store daemon")
                elif error is not None:
                    self._output.warning("the store daemon was killed; starting it again")
            recent = [at for at in self._starts if at > time.monotonic() - RESTART_SECONDS]
            if len(recent) > RESTARTS:
                raise DaemonError(
                    f"the store daemon ended {RESTARTS} times in {RESTART_SECONDS:.0f} s; it is not started again",
                    where=str(self._settings.cache_dir / LOG_NAME),
                )
            self.client = self._begin()
        except subprocess.TimeoutExpired:
            self._output.warning("the store daemon closed its connection and does not end")
            return False
        except VeneerError as error:
            self._output.error(error)
            return False
        return True


def _relay(client: socket.socket, path: Path) -> None:
    """Bytes both ways between ``client`` and the socket at ``path`` until both have ended."""
    with client, contextlib.suppress(OSError), connected(path) as server:
        client.setblocking(True)
        there = threading.Thread(target=_pump, args=(client, server), daemon=True)
        there.start()
        _pump(server, client)
        there.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_RELAYED):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def start(
    settings: Settings,
    session: str = "",
    nix_socket: socket.socket | None = None,
    program: Program | None = None,
) -> PrivateDaemon:
    """Start a private daemon for the settings' cache directory; returns at once.

    ``nix_socket``: listens; what Nix asks there is answered when the session asks for a worker socket of its own name.
    ``program``: another one than this.
    """
    make_cache_dir(settings.cache_dir)
    log = settings.cache_dir / LOG_NAME
    try:
        log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise CacheError(f"cannot write to the cache directory: {error.strerror}", where=str(log)) from error
    ours, theirs = socket.socketpair()
    try:
        size = os.fstat(log_fd).st_size
        if size > _LOG_LIMIT:
            os.ftruncate(log_fd, 0)
            size = 0
        process = subprocess.Popen(
            [
                *daemon_command(settings, client_fd=theirs.fileno(), program=program),
                *([] if nix_socket is None else ["--nix-socket", f"{session}={nix_socket.fileno()}"]),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            pass_fds=(theirs.fileno(), *(() if nix_socket is None else (nix_socket.fileno(),))),
            start_new_session=True,  # Ctrl-C is for the user's command
            cwd="/",
            env=None if program is None else program.environ(os.environ),
        )
    except OSError as error:
        ours.close()
        hint = "a process needs /dev/null: mode 0666, no nodev" if error.filename == os.devnull else ""
        raise MachineError(
            f"the store daemon cannot be started: {error.strerror}",
            where=str(error.filename or ""),
            hint=hint,
        ) from error
    finally:
        os.close(log_fd)
        theirs.close()
    return PrivateDaemon(process, Client(ours, settings.view(session), str(log)), log, size)


def daemon_command(settings: Settings, *, client_fd: int, program: Program | None = None) -> list[str]:
    """The private daemon's command line."""
    limit = [] if settings.max_bytes is None else ["--max-bytes", str(settings.max_bytes)]
    module = [sys.executable, "-m", "veneer.daemon"] if program is None else program.command("veneer.daemon")
    return [
        *module,
        "--cache",
        str(settings.cache_dir),
        *limit,
        *daemon_flags(settings.limits),
        "--exit-when-idle",
        "--client-fd",
        str(client_fd),
    ]


def make_cache_dir(path: Path) -> None:
    """CacheError when it cannot be had."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        hint = "choose another: --cache-dir DIR"
        raise CacheError(
            f"cannot make the cache directory: {error.strerror}", where=str(path), hint=hint
        ) from error


def open_client(settings: Settings, session: str = "") -> Client:
    """A greeted client with the settings' view, of the running daemon or of a private one. DaemonError says why not."""
    error: DaemonError | None = None
    for _ in range(_ATTEMPTS):
        client = connect(settings.cache_dir, settings.view(session))
        if client is not None:
            return client
        daemon = start(settings, session)
        try:
            daemon.client.greet(START_SECONDS)
        except DaemonError as lost:
            # Either it failed and says why, or it gave way to a rival, to which the next attempt connects.
            error = daemon.end() or lost
            if daemon.process.returncode:
                raise error from lost
        else:
            return daemon.client
    raise error or DaemonError("the store daemon is not there", where=str(settings.cache_dir))
