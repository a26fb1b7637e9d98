"""``veneer mount``: the store on a directory, in the foreground.

The mount server is a process of its own; this one mounts, keeps /dev/fuse open, waits and unmounts. A mount server that
dies has a successor, which takes the mount over; when this process is killed the server unmounts. A daemon that dies has a
successor, too. This process never looks into the directory while it is mounted: a read there could wait for the daemon that
it keeps alive.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from veneer.cli.config import Flags
from veneer.cli.options import json_option, quiet_option, settings_flags
from veneer.cli.output import Output
from veneer.model.errors import MachineError, UsageError

if TYPE_CHECKING:
    from veneer.cli.private_daemon import WatchedDaemon
    from veneer.mount.succession import Succession

_END_SECONDS = 10.0
_ENDING = (signal.SIGINT, signal.SIGTERM)


@click.command()
@click.argument("directory", metavar="DIR")
@settings_flags(max_size=True)
@quiet_option("Say nothing when all is well.")
@json_option("Errors as JSON.")
@click.pass_obj
def mount(output: Output, flags: Flags, directory: str) -> int:
    """Mount the store on a directory until interrupted.

    Read-only; it lists as empty, and store paths are there when they are named. Needs root, or an own user and mount
    namespace (`unshare -Urm`). Ends on Ctrl-C or SIGTERM, or when the directory is unmounted.

    \b
    Example:
      veneer mount /mnt/store --cache https://cache.example.org
    """
    from veneer.cli.config import load_settings
    from veneer.cli.private_daemon import WatchedDaemon, make_cache_dir
    from veneer.mount import device

    target = Path(directory).resolve()
    if not target.is_dir():
        raise UsageError("not a directory", where=directory, hint=f"mkdir {directory}")
    settings = load_settings(flags)
    fuse = device.open_fuse()
    make_cache_dir(settings.cache_dir)
    with closing(WatchedDaemon(settings, "", output)) as daemon, _interruptible():
        daemon.client.greet()
        # An interrupt between the mount and the try would leave it mounted; a server before the mount has nothing to read.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        device.mount_fuse(fuse, str(target))
        status: int | None = None
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
            with _means(fuse, target, settings.cache_dir, settings.view()) as means:
                status = _serve(means, daemon, output)
        except KeyboardInterrupt:
            pass  # that is how it ends
        finally:
            if status != 0:
                with suppress(MachineError):  # it may be unmounted already
                    device.umount(str(target), detach=True)
        if status:
            raise MachineError(f"the mount server ended with status {status}", where=str(target))
    return 0


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM is KeyboardInterrupt, as SIGINT is."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True, slots=True)
class _Means:
    """What each mount server gets. ``owner``: a pipe that ends with this process."""

    fuse: int
    target: Path
    cache: int
    view: int
    owner: int
    succession: Succession


def _serve(means: _Means, daemon: WatchedDaemon, output: Output) -> int:
    """Start mount servers until one unmounted (0) or the last one cannot have a successor: its status."""
    from veneer.mount.succession import is_connected

    while True:
        with _server(means) as server:
            if means.succession.session is None:  # the first
                output.note(f"mounted on {means.target}; Ctrl-C unmounts")
            status = _wait(server, daemon)
        if not is_connected(means.fuse):
            return 0
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        obstacle = means.succession.obstacle(time.monotonic())
        if obstacle is not None:
            output.warning(f"the mount server ended ({how}): {obstacle}")
            return status or 1
        output.warning(f"the mount server ended ({how}); another took over")


def _wait(server: subprocess.Popen[bytes], daemon: WatchedDaemon) -> int:
    """The server's status; a daemon that dies meanwhile has a successor."""
    pidfd = os.pidfd_open(server.pid)
    try:
        watched = True
        while True:
            ready, _, _ = select.select([pidfd, daemon.fileno()] if watched else [pidfd], [], [])
            if pidfd in ready:
                return server.wait()
            watched = daemon.readable()
    finally:
        os.close(pidfd)


@contextmanager
def _means(fuse: int, target: Path, cache_dir: Path, view: dict[str, object]) -> Iterator[_Means]:
    """For the block; after it the mount's descriptor is closed, and no server knows that we are there."""
    from veneer.mount.succession import Succession

    cache = os.open(cache_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    brought = os.memfd_create("view")
    os.write(brought, json.dumps(view).encode())
    owner, ours = os.pipe2(os.O_CLOEXEC)
    succession = Succession(fuse)
    try:
        yield _Means(fuse, target, cache, brought, owner, succession)
    finally:
        for fd in (fuse, cache, brought, owner, ours):
            os.close(fd)
        succession.close()


@contextmanager
def _server(means: _Means) -> Iterator[subprocess.Popen[bytes]]:
    """A mount server's process; ended with the block."""
    session = means.succession.session
    told = means.succession.writer
    options = {
        "--fuse-fd": means.fuse,
        "--cache-fd": means.cache,
        "--view-file": f"/proc/self/fd/{means.view}",
    }
    options |= {"--owner-fd": means.owner, "--mounted-on": means.target, "--session-fd": told}
    if session is not None:
        options["--session"] = json.dumps(session.to_json())
    words = [str(word) for pair in options.items() for word in pair]
    server = subprocess.Popen(
        [sys.executable, "-m", "veneer.mount", *words],
        stdin=subprocess.DEVNULL,
        pass_fds=(means.fuse, means.cache, means.view, means.owner, told),
        start_new_session=True,
    )
    try:
        yield server
    finally:
        if server.poll() is None:
            server.terminate()
            server.wait(_END_SECONDS)
