"""LOOKUP of names that the host's own store has."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stub_daemon import StubDaemon, store_name
from tests.unit.mount.test_dispatch import Kernel
from veneer.environment.serving import answers_at_once
from veneer.formats import fuse_wire as wire
from veneer.formats.mountinfo import parse_mountinfo
from veneer.formats.request_wire import Kind

NAME = store_name("of-both")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StubDaemon]:
    (tmp_path / "cache").mkdir()
    daemon = StubDaemon(tmp_path / "cache")
    daemon.add(NAME, {b"f": b"ours"})
    daemon.start()
    yield daemon
    daemon.stop()


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """An empty store directory."""
    (tmp_path / "host").mkdir()
    return tmp_path / "host"


@pytest.fixture
def kernel(daemon: StubDaemon, host: Path) -> Iterator[Kernel]:
    fd = os.open(host, os.O_PATH | os.O_DIRECTORY)
    kernel = Kernel(daemon.cache, miss_seconds=5.0, host_store=fd)
    yield kernel
    kernel.close()
    os.close(fd)


def lookup(kernel: Kernel, name: str) -> int:
    return kernel.ask(wire.LOOKUP, wire.ROOT_NODE, name.encode() + b"\0")[0]


@pytest.mark.parametrize("ending", ["", ".drv", ".lock"])
def test_what_the_host_has_is_absent_and_the_daemon_is_not_asked(
    kernel: Kernel, host: Path, daemon: StubDaemon, ending: str
) -> None:
    (host / (NAME + ending)).symlink_to("/no/such/target")
    assert lookup(kernel, NAME + ending) == errno.ENOENT
    assert daemon.count(Kind.LOOKUP) == 0


def test_each_lookup_looks_anew(kernel: Kernel, host: Path) -> None:
    (host / NAME).mkdir()
    assert lookup(kernel, NAME) == errno.ENOENT
    (host / NAME).rmdir()
    assert lookup(kernel, NAME) == 0


def test_what_was_found_in_a_source_stays(kernel: Kernel, host: Path) -> None:
    assert lookup(kernel, NAME) == 0
    (host / NAME).mkdir()
    assert lookup(kernel, NAME) == 0


def test_what_the_host_has_locked_may_be_half_there(kernel: Kernel, host: Path) -> None:
    (host / NAME).mkdir()
    (host / f"{NAME}.lock").touch()
    assert lookup(kernel, NAME) == 0


@pytest.mark.parametrize(
    ("rest", "at_once"),
    [
        (b"ext4 /dev/sda rw", True),
        (b"overlay overlay rw,lowerdir=/var/lib/docker/l/A,upperdir=/u,workdir=/w", True),
        (b"fuse.veneer veneer ro,user_id=0", False),
        (b"fuse bindfs rw", False),
        (b"overlay overlay rw,lowerdir=/.veneer/lower/nix/store,upperdir=/u,workdir=/w", False),
    ],
)
def test_a_store_that_another_process_serves_is_not_asked(rest: bytes, at_once: bool) -> None:
    mounts = parse_mountinfo(b"1 1 8:1 / / rw - ext4 /dev/root rw\n2 1 0:50 / /nix rw - " + rest + b"\n")
    assert answers_at_once(mounts, (0, 50)) == at_once
    assert answers_at_once(mounts, (8, 1))
