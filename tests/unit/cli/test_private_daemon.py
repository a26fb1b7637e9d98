"""A daemon that a command started and does not get on with: it is left, waited for, and told of."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from veneer.cli import private_daemon
from veneer.cli.client import Client
from veneer.cli.private_daemon import PrivateDaemon
from veneer.model.errors import DaemonError


def started(log: Path, program: str) -> PrivateDaemon:
    """A process whose standard input is the connection."""
    ours, theirs = socket.socketpair()
    with theirs, open(log, "wb") as said:
        process = subprocess.Popen([sys.executable, "-c", program], stdin=theirs.fileno(), stderr=said)
    return PrivateDaemon(process, Client(ours, None, str(log)), log, 0)


def test_one_that_ends_with_its_last_client_is_no_failure(tmp_path: Path) -> None:
    daemon = started(tmp_path / "log", "import sys; sys.stdin.buffer.read()")
    assert daemon.end() is None
    assert daemon.process.returncode == 0


def test_one_that_fails_says_why(tmp_path: Path) -> None:
    daemon = started(tmp_path / "log", "import sys; sys.exit('veneer daemon: the disk is gone')")
    error = daemon.end()
    assert isinstance(error, DaemonError)
    assert error.what == "the store daemon ended: the disk is gone"


def test_one_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_daemon, "START_SECONDS", 0.1)
    daemon = started(tmp_path / "log", "import signal; signal.pause()")
    assert daemon.end() is None
    assert daemon.process.returncode == -signal.SIGKILL
