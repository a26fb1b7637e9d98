"""The mount server's process: a child of the environment's init that stays in the host's mount namespace.

It never sees the environment's own mounts, so it cannot come to wait for itself (its own modules may lie in the host's
``/nix/store``), and it keeps none of the command's descriptors, directory or terminal.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from veneer.environment import syscalls
from veneer.environment.plan import LOWER_ROOT
from veneer.environment.spec import RunSpec
from veneer.formats.mountinfo import MountInfo, parse_mountinfo
from veneer.model.errors import VeneerError, printable

Report = dict[str, Any]
Serve = Callable[[int, int], Report]
"""Serves (/dev/fuse, the cache directory) until SIGTERM, which is blocked at the start; returns the final report."""
LoadServer = Callable[[], Serve]
"""Called in the new process while the root is being built: the place for imports."""


ABSENCE = signal.SIGUSR1
"""To init: a store path was answered as absent, which the overlay above will not ask again by itself."""


@dataclass(slots=True)
class ServerProcess:
    """``pid``: in our pid namespace. ``go_fd``: closing it after a byte was written lets it serve."""

    pid: int
    go_fd: int

    def go(self) -> None:
        """The file system is mounted: begin."""
        os.write(self.go_fd, b"!")
        os.close(self.go_fd)


def start(load: LoadServer, fuse_fd: int, cache_fd: int, report_fd: int) -> ServerProcess:
    """Fork the mount server. It waits for ``go``; its report goes to ``report_fd`` as JSON before it ends."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _child(load, fuse_fd, cache_fd, report_fd, reader)
    os.close(reader)
    return ServerProcess(pid, writer)


def mount_server(spec: RunSpec, host_store: str | None = None) -> LoadServer:
    """The real one. ``host_store``: the host's own store when it lies beneath ours, without links."""

    def load() -> Serve:
        from veneer.mount.server import MountServer  # here, so that the command's own processes stay small

        def serve(fuse_fd: int, cache_fd: int) -> Report:
            def tell_init(event: str, _fields: dict[str, object]) -> None:
                if event == "absent":
                    os.kill(os.getppid(), ABSENCE)

            server = MountServer(
                fuse_fd,
                cache_fd,
                spec.view,
                miss_seconds=spec.miss_seconds,
                events=tell_init,
                host_store=None if host_store is None else _open_host_store(host_store),
            )

            def stop_on_request() -> None:
                signal.sigwait([signal.SIGTERM])
                server.stop()

            # A thread, not a handler: stop() takes locks that the interrupted code may hold.
            threading.Thread(target=stop_on_request, name="stop", daemon=True).start()
            server.run()
            return dict(server.report())

        return serve

    return load


def _open_host_store(path: str) -> int | None:
    """Its descriptor; None when it cannot be asked."""
    try:
        mounts = parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        device = os.fstat(fd).st_dev
    except OSError:
        return None
    if answers_at_once(mounts, (os.major(device), os.minor(device))):
        return fd
    os.close(fd)
    return None


def answers_at_once(mounts: Sequence[MountInfo], device: tuple[int, int]) -> bool:
    """Not what another process serves, nor a store of ours: its sources may take long, and all our readers would wait."""
    for mount in mounts:
        if (mount.major, mount.minor) == device and (
            mount.fstype.partition(b".")[0] == b"fuse" or LOWER_ROOT.encode() in mount.super_options
        ):
            return False
    return True


def _child(load: LoadServer, fuse_fd: int, cache_fd: int, report_fd: int, go_fd: int) -> NoReturn:
    status = 1
    try:
        syscalls.set_process_name("veneer-mount")
        os.setsid()  # Ctrl-C and Ctrl-Z are for the command
        os.chdir("/")
        syscalls.reset_signal_handlers()
        _keep_only(2, fuse_fd, cache_fd, report_fd, go_fd)
        serve = load()
        if os.read(go_fd, 1):
            os.close(go_fd)
            _write_report(report_fd, serve(fuse_fd, cache_fd))
        status = 0
    except VeneerError as error:
        _write_report(report_fd, {"error": error.story()})
    except BaseException as error:  # noqa: BLE001 - the process ends here, and this is its only voice
        _write_report(report_fd, {"error": printable(f"{type(error).__name__}: {error}")})
    finally:
        os._exit(status)


def _keep_only(*kept: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    for entry in list(Path("/proc/self/fd").iterdir()):
        fd = int(entry.name)
        if fd > 1 and fd not in kept:
            try:
                os.close(fd)
            except OSError as error:
                if error.errno != errno.EBADF:  # the listing's own descriptor
                    raise


def _write_report(fd: int, report: Report) -> None:
    data = json.dumps(report).encode()
    while data:
        data = data[os.write(fd, data) :]
