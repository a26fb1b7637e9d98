"""Two daemons for one cache directory: who waits for whom, and for how long."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest

from tests.support.callers import eventually
from veneer.cache import directory
from veneer.cache.cache import Cache
from veneer.cli import private_daemon
from veneer.cli.client import Client
from veneer.cli.config import Settings, SourceSetting
from veneer.cli.output import Output
from veneer.cli.private_daemon import WatchedDaemon
from veneer.daemon import run
from veneer.daemon.listening import answers, connected
from veneer.daemon.run import DaemonSettings, run_daemon
from veneer.model.errors import CacheInUseError

HOLDER = """
import sys, time
from pathlib import Path
from veneer.cache.cache import Cache
with Cache.open(Path(sys.argv[1]), clock=time.time):
    print("open", flush=True)
    sys.stdin.read()
"""


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def holder(cache: Path) -> subprocess.Popen[bytes]:
    """A process that holds the cache and does not listen, until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(cache)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"open\n"
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    process.communicate(timeout=20)


def daemon(cache: Path) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A private daemon and its first client's socket."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "veneer.daemon", "--cache", str(cache), "--exit-when-idle"]
    with theirs:
        process = subprocess.Popen(
            [*command, "--client-fd", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
        )
    return process, ours


def test_a_private_daemon_takes_over_from_one_that_ends(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    ending = holder(cache)
    process, client = daemon(cache)
    try:
        eventually(lambda: waiting_child(process.pid))
        end(ending)
        eventually(lambda: answers(cache / "daemon.sock"))
        assert (cache / "lock").read_text() == f"{process.pid}\n"
    finally:
        client.close()
        end(ending)
        assert process.wait(20) == 0


def waiting_child(pid: int) -> bool:
    """Whether the process has a child: the one that waits for the lock."""
    return bool(Path(f"/proc/{pid}/task/{pid}/children").read_text())


def test_of_many_private_daemons_that_start_at_once_one_serves_and_the_others_give_way(
    tmp_path: Path,
) -> None:
    cache = tmp_path / "cache"
    started = [daemon(cache) for _ in range(5)]
    try:
        eventually(lambda: sum(p.poll() is None for p, _ in started) == 1 and answers(cache / "daemon.sock"))
        assert sorted(p.poll() is None for p, _ in started) == [False] * 4 + [True]
        assert [p.returncode for p, _ in started if p.poll() is not None] == [0] * 4
    finally:
        for process, client in started:
            client.close()
            assert process.wait(20) == 0


def test_a_private_daemon_gives_up_after_its_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "LOCK_SECONDS", 0.2)
    cache = tmp_path / "cache"
    busy = holder(cache)
    before = children()
    try:
        began = time.monotonic()
        with pytest.raises(CacheInUseError, match=f"pid {busy.pid}"):
            run_daemon(DaemonSettings(cache, private=True))
        assert 0.2 <= time.monotonic() - began < 5
        assert children() == before
    finally:
        end(busy)


def test_a_daemon_of_its_own_does_not_wait(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    busy = holder(cache)
    try:
        with pytest.raises(CacheInUseError, match=f"pid {busy.pid}"):
            run_daemon(DaemonSettings(cache))
    finally:
        end(busy)


def test_waiting_for_a_free_cache_has_a_limit_and_leaves_it_free(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert directory.wait_until_free(cache, 0.1)  # there is none
    busy = holder(cache)
    before = children()
    try:
        assert not directory.wait_until_free(cache, 0.1)
        assert children() == before
        busy.send_signal(signal.SIGKILL)
        assert directory.wait_until_free(cache, 20)
    finally:
        end(busy)
    with Cache.open(cache, clock=time.time):
        pass


def test_that_limit_holds_for_a_process_that_has_its_timer_s_signal_blocked(tmp_path: Path) -> None:
    """As ``run`` has, while it starts a daemon in the place of one that died."""
    cache = tmp_path / "cache"
    busy = holder(cache)
    waits = (
        "import signal, sys; from pathlib import Path; from veneer.cache.directory import wait_until_free\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n"
        "sys.exit(wait_until_free(Path(sys.argv[1]), 0.1))"
    )
    waiting = subprocess.Popen([sys.executable, "-c", waits, str(cache)])
    try:
        assert waiting.wait(20) == 0
    finally:
        end(busy)  # which ends the other, too
        waiting.wait(20)


def test_a_daemon_can_be_ended_though_its_starter_has_signals_blocked(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        process, client = daemon(cache)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with Client(client, None, "there") as greeted:
        try:
            greeted.greet(20)
            process.terminate()
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait(20)


def test_nix_is_turned_away_when_there_will_be_no_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its socket is one that waits for a daemon, and processes of the environment have it open as well."""
    monkeypatch.setattr(private_daemon, "RESTARTS", 0)
    cache = tmp_path / "cache"
    cache.mkdir()
    sources = (SourceSetting(f"file://{tmp_path}", "strict"),)
    watched = WatchedDaemon(
        Settings(cache, tmp_path / "environments", sources, ()), "session", Output(), nix=True
    )
    try:
        assert watched._listening is not None
        assert watched._private is not None
        with watched._listening.dup():
            watched._private.process.kill()
            with connected(watched.nix_socket) as waiting:
                assert select.select([watched], [], [], 20)[0]
                assert not watched.readable()
                waiting.settimeout(20)
                assert waiting.recv(8) == b""
            with pytest.raises(FileNotFoundError):
                connected(watched.nix_socket)
    finally:
        watched.close()


def test_whether_somebody_listens_is_told_at_once_though_many_wait_for_him(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        assert not answers(path)
        listening.listen(0)
        with connected(path):
            probe = Thread(target=answers, args=(path,), daemon=True)
            probe.start()
            probe.join(20)
            assert not probe.is_alive()
            assert answers(path)


def test_nix_is_answered_though_the_daemon_that_it_waits_for_gave_way(tmp_path: Path) -> None:
    """Two commands start at once, and Nix asks each before it is decided whose daemon serves."""
    cache = tmp_path / "cache"
    cache.mkdir()
    settings = Settings(
        cache, tmp_path / "environments", (SourceSetting(f"file://{tmp_path}", "strict"),), ()
    )
    watched = [WatchedDaemon(settings, f"session{number}", Output(), nix=True) for number in range(2)]
    clients = []
    try:
        clients = [connected(daemon.nix_socket) for daemon in watched]
        for client in clients:
            client.sendall((0x6E697863).to_bytes(8, "little") + (0x126).to_bytes(8, "little"))
        unanswered = {client.fileno(): client for client in clients}
        by_descriptor = {daemon.fileno(): daemon for daemon in watched}
        until = time.monotonic() + 30
        while unanswered and time.monotonic() < until:
            ready, _, _ = select.select([*by_descriptor, *unanswered], [], [], 30)
            for number in set(ready) & set(unanswered):
                assert unanswered.pop(number).recv(8) == (0x6478696F).to_bytes(8, "little")
            for number in set(ready) & set(by_descriptor):
                assert by_descriptor[number].readable()
            by_descriptor = {daemon.fileno(): daemon for daemon in watched}
        assert not unanswered
    finally:
        for client in clients:
            client.close()
        for daemon in watched:
            daemon.close()
        for daemon in watched:  # each may be a client of the other's
            if daemon._private is not None:
                daemon._private.process.wait(20)
