"""A mount outlives its servers: readers of every kind go on while mount servers and daemons are killed."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.support.callers import Caller, read_line
from tests.support.storm import (
    READERS,
    Readable,
    kill_at_random,
    kill_daemon,
    kill_server,
    make_readable,
    reading,
    server_of_mount,
    server_of_run,
)

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.hand_over]

PATHS = 6
SERVERS, DAEMONS = 8, 2


@pytest.fixture(scope="module")
def readable(open_directory: Path) -> Readable:
    return make_readable(open_directory / "readable", PATHS)


def use(caller: Caller, readable: Readable) -> None:
    caller.use(f"file://{readable.cache.directory}", key=readable.cache.key)


def check(found: dict[str, Any], kills: int) -> None:
    assert found["errors"] == []
    assert found["wrong"] == []
    assert found["reads"] > kills
    print(f"{kills} kills, {found['reads']} reads, longest {found['longest']:.2f} s")


def test_readers_in_an_environment_do_not_notice_killed_servers(caller: Caller, readable: Readable) -> None:
    use(caller, readable)
    readers = [caller.python, "-c", READERS.read_text(), readable.plan()]
    process = caller.popen(caller.words("run", "--", *readers))
    random = Random(1)
    with reading(process) as result:
        kill_at_random(SERVERS, lambda: kill_server(lambda: server_of_run(process.pid)), random)
        kill_at_random(DAEMONS, lambda: kill_daemon(caller), random)
        found = result()
    check(found, SERVERS + DAEMONS)
    assert found["said"].count("the mount server ended (killed by signal 9); another took over") == SERVERS


def test_readers_of_a_mount_do_not_notice_killed_servers(as_root: Caller, readable: Readable) -> None:
    use(as_root, readable)
    with mounted(as_root) as (mount, target):
        readers = [sys.executable, "-c", READERS.read_text(), readable.plan(str(target))]
        with reading(as_root.popen(readers)) as result:
            random = Random(2)
            kill_at_random(SERVERS, lambda: kill_server(lambda: server_of_mount(mount.pid)), random)
            kill_at_random(DAEMONS, lambda: kill_daemon(as_root), random)
            found = result()
        check(found, SERVERS + DAEMONS)
        mount.send_signal(signal.SIGTERM)
        assert mount.wait(20) == 0
    assert str(target) not in Path("/proc/self/mountinfo").read_text()


def test_a_mount_whose_servers_die_too_often_ends_and_is_unmounted(
    as_root: Caller, readable: Readable
) -> None:
    use(as_root, readable)
    with mounted(as_root) as (mount, target):
        assert (target / readable.programs[0]).read_bytes()
        while mount.poll() is None:
            kill_server(lambda: server_of_mount(mount.pid), lambda: mount.poll() is not None)
        assert mount.wait(20) != 0
        assert mount.stderr is not None
        assert "more than 25 died within 10 s" in mount.stderr.read()
    assert str(target) not in Path("/proc/self/mountinfo").read_text()


@contextlib.contextmanager
def mounted(caller: Caller) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A ``veneer mount`` and where it is."""
    target = caller.home / "mnt"
    target.mkdir()
    mount = caller.popen(caller.words("mount", target), stdin=subprocess.DEVNULL)
    try:
        assert mount.stderr is not None
        assert "mounted on" in read_line(mount.stderr)
        yield mount, target
    finally:
        if mount.poll() is None:
            mount.terminate()
        mount.wait(20)
        for pipe in (mount.stdout, mount.stderr):
            if pipe is not None:
                pipe.close()
