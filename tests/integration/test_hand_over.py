"""A mount outlives its servers: readers of every kind go on while mount servers and daemons are killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.support.callers import Caller
from tests.support.storm import (
    Readable,
    kill_at_random,
    kill_daemon,
    kill_server,
    make_readable,
    mounted,
    reading_below,
    reading_in_run,
    server_of_mount,
    server_of_run,
)

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.hand_over]

PATHS = 6
SERVERS, DAEMONS = 8, 2


@pytest.fixture(scope="module")
def readable(open_directory: Path) -> Readable:
    return make_readable(open_directory / "readable", PATHS)


def kill(caller: Caller, server: Callable[[], int], seed: int) -> None:
    random = Random(seed)
    kill_at_random(SERVERS, lambda: kill_server(server), random)
    kill_at_random(DAEMONS, lambda: kill_daemon(caller), random)


def test_readers_in_an_environment_do_not_notice_killed_servers(caller: Caller, readable: Readable) -> None:
    caller.use(readable.cache.url, key=readable.cache.key)
    with reading_in_run(caller, readable) as reading:
        kill(caller, lambda: server_of_run(reading.process.pid), 1)
        said = reading.check(SERVERS + DAEMONS)
    assert said.count("the mount server ended (killed by signal 9); another took over") == SERVERS


def test_readers_of_a_mount_do_not_notice_killed_servers(as_root: Caller, readable: Readable) -> None:
    as_root.use(readable.cache.url, key=readable.cache.key)
    with mounted(as_root) as (mount, target), reading_below(target, as_root, readable) as reading:
        kill(as_root, lambda: server_of_mount(mount.pid), 2)
        reading.check(SERVERS + DAEMONS)


def test_a_mount_whose_servers_die_too_often_ends_and_is_unmounted(
    as_root: Caller, readable: Readable
) -> None:
    as_root.use(readable.cache.url, key=readable.cache.key)
    with mounted(as_root) as (mount, target):
        assert (target / readable.programs[0]).read_bytes()
        while mount.poll() is None:
            kill_server(lambda: server_of_mount(mount.pid), lambda: mount.poll() is not None)
        assert mount.wait(20) != 0
        assert mount.stderr is not None
        assert "more than 25 died within 10 s" in mount.stderr.read()
