"""``veneer mount`` beside its server."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from tests.support.callers import eventually
from veneer.cli import mount

DEAD_BUT_FOR_A_THREAD = """
import ctypes, os, threading
threading.Thread(target=os.read, args=(0, 1)).start()
ctypes.CDLL(None).syscall({"x86_64": 60}.get(os.uname().machine, 93), 0)  # exit(2): of this thread alone
"""


class Daemon:
    """A companion of which nothing is heard."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def fileno(self) -> int:
        return self._end.fileno()


class Means:
    listening = None


def test_a_server_that_was_killed_and_cannot_end_has_a_successor() -> None:
    """Such a server waits for a page whose READ only its successor can answer."""
    ours, theirs = socket.socketpair()
    found: list[Any] = []
    server = subprocess.Popen([sys.executable, "-c", DEAD_BUT_FOR_A_THREAD], stdin=subprocess.PIPE)
    with ours, theirs:
        try:
            eventually(lambda: "State:\tZ" in Path(f"/proc/{server.pid}/status").read_text())
            watching = threading.Thread(
                target=lambda: found.append(mount._wait(Means(), server, Daemon(ours))),  # type: ignore[arg-type]
                daemon=True,
            )
            watching.start()
            watching.join(20)
            assert found == [(server, -signal.SIGKILL)]
            assert server.poll() is None
        finally:
            server.communicate(timeout=20)
            watching.join(20)
