"""The mount server's process: a child of the keeper that stays in the host's mount namespace.

It never sees the environment's own mounts, so it cannot come to wait for itself (its own modules may lie in the host's
``/nix/store``), and it keeps none of the command's descriptors, directory or terminal.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from veneer.environment import figures, syscalls
from veneer.environment.plan import LOWER_ROOT
from veneer.formats.mountinfo import MountInfo, parse_mountinfo
from veneer.model.errors import VeneerError, printable
from veneer.mount import succession
from veneer.mount.session import Session

if TYPE_CHECKING:
    from veneer.mount.recording import Recording

Report = dict[str, Any]

ABSENCE = signal.SIGUSR1
"""To init: a store path was answered as absent, or has become another one, which the overlay above will not ask again by
itself."""
WORD_SECONDS = 1.0
WORD_SHARE = 100
"""Pause between two words about what was read: at least the seconds, and this many times what a word costs."""
_INIT = 1
"""Pid of the environment's init, as the server sees it."""


@dataclass(frozen=True, slots=True)
class Duty:
    """What one mount server gets: /dev/fuse, the cache directory, where its figures go, where it tells its session.

    ``go_fd``: a pipe; serve once there is a byte in it, end at its end; -1: serve. ``number``: 1 for the first; ``session``: what a successor goes on with; ``since``: when the first began (monotonic).
    """

    fuse_fd: int
    cache_fd: int
    report_fd: int
    session_fd: int
    number: int
    session: Session | None
    since: float
    go_fd: int = -1


@dataclass(frozen=True, slots=True)
class Content:
    """What is served. ``view``, ``miss_seconds``, ``notes``, ``max_parked``: as in RunSpec. ``host_store``: the host's own store when it lies beneath ours, without links."""

    view: dict[str, Any] | None
    miss_seconds: float
    host_store: str | None
    notes: str | None = None
    max_parked: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Content:
        return cls(
            fields["view"],
            fields["miss_seconds"],
            fields["host_store"],
            fields.get("notes"),
            fields.get("max_parked"),
        )


Serve = Callable[[Duty], Report]
"""Serves until SIGTERM, which is blocked at the start; returns the final report."""


def start(serve: Serve, duty: Duty) -> int:
    """Fork a mount server; its pid. OSError. Its report goes to ``report_fd`` (``figures``)."""
    pid = os.fork()
    if pid == 0:
        become_server(serve, duty)
    return pid


def mount_server(content: Content) -> Serve:
    """The real one, with all that it needs to import."""
    from veneer.mount.misses import MAX_PARKED
    from veneer.mount.server import MountServer  # here, so that the command's own processes stay small

    def serve(duty: Duty) -> Report:
        def tell_init(event: str, _fields: dict[str, object]) -> None:
            if event in ("absent", "condemned"):
                os.kill(_INIT, ABSENCE)

        server = MountServer(
            duty.fuse_fd,
            duty.cache_fd,
            content.view,
            miss_seconds=content.miss_seconds,
            max_parked=content.max_parked or MAX_PARKED,
            events=tell_init,
            session=duty.session,
            agreed=functools.partial(succession.tell, duty.session_fd),
            since=duty.since,
            host_store=None if content.host_store is None else _open_host_store(content.host_store),
            recording=None if content.notes is None else _open_notes(content.notes),
        )

        def stop_on_request() -> None:
            signal.sigwait([signal.SIGTERM])
            server.stop()

        over = threading.Event()

        def speak() -> None:
            words = figures.Words(duty.number)
            pause = WORD_SECONDS
            while not over.wait(pause):
                began = time.thread_time()
                _write(duty.report_fd, words.news(dict(server.report())))
                pause = max(WORD_SECONDS, WORD_SHARE * (time.thread_time() - began))

        # A thread, not a handler: stop() takes locks that the interrupted code may hold.
        threading.Thread(target=stop_on_request, name="stop", daemon=True).start()
        speaker = threading.Thread(target=speak, name="words", daemon=True)
        speaker.start()
        try:
            server.run()
        finally:
            over.set()
            speaker.join()
        return dict(server.report())

    return serve


def _open_notes(path: str) -> Recording | None:
    """None when whoever wants a trace has gone."""
    from veneer.mount.recording import Recording

    try:
        return Recording(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC))
    except OSError:
        return None


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


def become_server(serve: Serve, duty: Duty) -> NoReturn:
    """Be a mount server, and nothing else, until the end of the process."""
    status = 1
    try:
        syscalls.set_process_name("veneer-mount")
        os.setsid()  # Ctrl-C and Ctrl-Z are for the command
        os.chdir("/")
        syscalls.reset_signal_handlers()
        _keep_only(2, duty.fuse_fd, duty.cache_fd, duty.report_fd, duty.session_fd, duty.go_fd)
        if duty.go_fd < 0 or os.read(duty.go_fd, 1):
            _write(duty.report_fd, figures.last_word(duty.number, serve(duty)))
        status = 0
    except VeneerError as error:
        tell_failure(duty.report_fd, duty.number, error.story())
    except BaseException as error:  # noqa: BLE001 - the process ends here, and this is its only voice
        tell_failure(duty.report_fd, duty.number, f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


def tell_failure(report_fd: int, number: int, story: str) -> None:
    _write(report_fd, figures.last_word(number, {"error": printable(story)}))


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


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
