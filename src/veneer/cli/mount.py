"""``veneer mount``: the store on a directory, in the foreground.

The mount server is a process of its own; this one only mounts, waits and unmounts. It never looks into the directory while
it is mounted: a read there could wait for the daemon that this command keeps alive.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from veneer.cli.config import Flags
from veneer.cli.options import json_option, quiet_option, settings_flags
from veneer.cli.output import Output
from veneer.model.errors import MachineError, UsageError

_END_SECONDS = 10.0


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
    from veneer.cli.private_daemon import open_client
    from veneer.mount import device

    target = Path(directory).resolve()
    if not target.is_dir():
        raise UsageError("not a directory", where=directory, hint=f"mkdir {directory}")
    settings = load_settings(flags)
    fuse = device.open_fuse()
    with open_client(settings), _server(fuse, settings.cache_dir, settings.view()) as server:
        device.mount_fuse(fuse, str(target))
        os.close(fuse)  # the server has its own: the mount must end with it
        output.note(f"mounted on {target}; Ctrl-C unmounts")
        try:
            status = server.wait()
        except KeyboardInterrupt:
            device.umount(str(target), detach=True)
            status = server.wait(_END_SECONDS)
        if status:
            raise MachineError(f"the mount server ended with status {status}", where=str(target))
    return 0


@contextmanager
def _server(fuse: int, cache_dir: Path, view: dict[str, object]) -> Iterator[subprocess.Popen[bytes]]:
    """The mount server's process; ended with the block. SIGTERM becomes KeyboardInterrupt meanwhile."""
    cache = os.open(cache_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    brought = os.memfd_create("view")
    os.write(brought, json.dumps(view).encode())
    os.lseek(brought, 0, os.SEEK_SET)
    options = {"--fuse-fd": fuse, "--cache-fd": cache, "--view-file": f"/proc/self/fd/{brought}"}
    words = [str(word) for pair in options.items() for word in pair]
    try:
        server = subprocess.Popen(
            [sys.executable, "-m", "veneer.mount", *words],
            stdin=subprocess.DEVNULL,
            pass_fds=(fuse, cache, brought),
            start_new_session=True,
        )
    finally:
        os.close(cache)
        os.close(brought)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield server
    finally:
        signal.signal(signal.SIGTERM, before)
        if server.poll() is None:
            server.terminate()
            server.wait(_END_SECONDS)
