"""Paths that are held stay, whatever a real garbage collector does; when they are let go, they go."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.callers import eventually
from tests.support.nix import RealNix
from veneer.model.errors import SourceError
from veneer.sources.temporary_roots import TemporaryRoots

pytestmark = pytest.mark.nix
GATES = ("_NIX_TEST_GC_SYNC", "_NIX_TEST_GC_SYNC_2")
"""Variables by which Nix's own tests hold its collector: it reads the file to its end before it deletes anything."""


@pytest.fixture
def nix(each_nix: Callable[[], RealNix]) -> RealNix:
    return each_nix()


def add(nix: RealNix, text: str) -> str:
    """A store path that nothing holds."""
    file = nix.home / f"{text}.txt"
    file.write_text(text)
    return nix.run("nix-store", "--add", file).strip()


def state(nix: RealNix) -> Path:
    return nix.store / "nix/var/nix"


def is_there(nix: RealNix, path: str) -> bool:
    return nix.unpacked(path).exists()


def test_what_is_held_survives_the_collector_and_goes_when_let_go(nix: RealNix) -> None:
    held, other = add(nix, "held"), add(nix, "other")
    roots = TemporaryRoots(state(nix))
    with contextlib.closing(roots):
        roots.hold(held)
        nix.run("nix-store", "--gc")
        assert (is_there(nix, held), is_there(nix, other)) == (True, False)
    nix.run("nix-store", "--gc")
    assert not is_there(nix, held)
    assert list((state(nix) / "temproots").iterdir()) == []


def test_two_views_of_one_process_hold_for_themselves(nix: RealNix) -> None:
    first, second = add(nix, "first"), add(nix, "second")
    one, two = TemporaryRoots(state(nix)), TemporaryRoots(state(nix))
    with contextlib.closing(two):
        with contextlib.closing(one):
            one.hold(first)
            two.hold(second)
        nix.run("nix-store", "--gc")
        assert is_there(nix, second)
    nix.run("nix-store", "--gc")
    assert not is_there(nix, second)


def test_a_collector_that_runs_already_is_told(nix: RealNix) -> None:
    """It has read the roots before; without being told it would delete the path."""
    path, other = add(nix, "late"), add(nix, "other")
    roots = TemporaryRoots(state(nix))
    with contextlib.closing(roots), collecting(nix):
        roots.hold(path)
    assert (is_there(nix, path), is_there(nix, other)) == (True, False)


@contextlib.contextmanager
def collecting(nix: RealNix) -> Iterator[None]:
    """A collector that has read all roots and waits with the deletion until the end of the block."""
    gate = nix.home / "gate"
    os.mkfifo(gate)
    process = subprocess.Popen(
        [nix.programs / "nix-store", "--gc"],
        env=nix.environment | dict.fromkeys(GATES, str(gate)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def opened() -> int:
        """A descriptor, once the collector reads from the gate; -1 before."""
        assert process.poll() is None, "the collector did not wait"
        try:
            return os.open(gate, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return -1

    try:
        descriptor = eventually(lambda: max(opened(), 0))
        try:
            yield
        finally:
            os.close(descriptor)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def daemon(nix: RealNix) -> Iterator[RealNix]:
    """A nix-daemon of the store."""
    socket = state(nix) / "daemon-socket" / "socket"
    process = subprocess.Popen(
        [nix.programs / "nix-daemon"],
        env=nix.environment | {"NIX_STATE_DIR": str(state(nix))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(socket.exists)
        yield nix
    finally:
        process.terminate()
        process.wait(20)


def test_a_nix_daemon_holds_for_who_may_not_write(daemon: RealNix, monkeypatch: pytest.MonkeyPatch) -> None:
    path = add(daemon, "held")
    monkeypatch.setattr("os.access", lambda *_: False)
    roots = TemporaryRoots(state(daemon))
    with contextlib.closing(roots):
        roots.hold(path)
        daemon.run("nix-store", "--gc")
        assert is_there(daemon, path)

    def is_collected() -> bool:
        daemon.run("nix-store", "--gc")  # its worker ends a moment after the connection
        return not is_there(daemon, path)

    eventually(is_collected)


def test_without_any_way_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(SourceError, match="garbage collector"):
        TemporaryRoots(tmp_path).hold("/nix/store/x")
