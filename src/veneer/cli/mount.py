"""``veneer mount``: the store on a directory, in the foreground.

The mount server is a process of its own; this one only mounts, waits and unmounts. Whichever of the two is killed, the
other one unmounts. A daemon that dies has a successor. It never looks into the directory while it is mounted: a read
there could wait for the daemon that this command keeps alive.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from veneer.cli.config import Flags
from veneer.cli.options import json_option, quiet_option, settings_flags
from veneer.cli.output import Output
from veneer.model.errors import MachineError, UsageError

if TYPE_CHECKING:
    from veneer.cli.private_daemon import WatchedDaemon

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
            with _server(fuse, target, settings.cache_dir, settings.view()) as server:
                os.close(fuse)  # the server has its own: the mount must end with it
                output.note(f"mounted on {target}; Ctrl-C unmounts")
                status = _wait(server, daemon)
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
def _server(
    fuse: int, target: Path, cache_dir: Path, view: dict[str, object]
) -> Iterator[subprocess.Popen[bytes]]:
    """The mount server's process; ended with the block."""
    cache = os.open(cache_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    brought = os.memfd_create("view")
    os.write(brought, json.dumps(view).encode())
    os.lseek(brought, 0, os.SEEK_SET)
    owner, ours = os.pipe2(os.O_CLOEXEC)
    options = {"--fuse-fd": fuse, "--cache-fd": cache, "--view-file": f"/proc/self/fd/{brought}"}
    options |= {"--owner-fd": owner, "--mounted-on": target}
    words = [str(word) for pair in options.items() for word in pair]
    try:
        server = subprocess.Popen(
            [sys.executable, "-m", "veneer.mount", *words],
            stdin=subprocess.DEVNULL,
            pass_fds=(fuse, cache, brought, owner),
            start_new_session=True,
        )
    finally:
        for fd in (cache, brought, owner):
            os.close(fd)
    try:
        yield server
    finally:
        if server.poll() is None:
            server.terminate()
            server.wait(_END_SECONDS)
        os.close(ours)
