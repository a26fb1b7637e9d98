"""K, the environment's keeper: makes its namespaces, starts its init, and keeps its mount alive.

It holds /dev/fuse open and starts a mount server as soon as init has mounted it. When a server dies, by whatever cause, it
starts another one at once, which goes on with the same session and asks the kernel for what the dead one had read and not
answered; readers wait meanwhile. It gives up where that cannot work (``Succession.obstacle``): then it closes its
descriptor, so that readers fail instead of waiting.

It is the right process for this: its children are in the environment's pid namespace and end with it, it is itself out of
that namespace, so that no process inside can see or kill it, and it never leaves the host's mount namespace.

K1: while it holds /dev/fuse, a server runs, or is about to. When the environment ends, its processes may sleep until their
reads are answered; then a server can neither live nor be started (the kernel lets nobody into a pid namespace that ends),
and the descriptor is closed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from veneer.environment import machine, namespace, serving, syscalls
from veneer.environment.channel import Channel, Kind
from veneer.environment.init import OUR_FAULT, STOP, STOP_SECONDS, InitTask, describe_end, run_init
from veneer.model.errors import VeneerError, printable
from veneer.mount import device
from veneer.mount.succession import Succession

_LOOK_SECONDS = 1.0
"""Between looks for a server that was killed and cannot end."""
_CALM = 0.1
"""Seconds between attempts to fork when there are too many processes."""


@dataclass(frozen=True, slots=True)
class Means:
    """What mount servers need. ``report_fd``: where their figures go."""

    cache_fd: int
    report_fd: int
    load: serving.LoadServer


def keep(task: InitTask, means: Means, parent: int) -> NoReturn:
    """Never returns; ends the process."""
    status = OUR_FAULT
    try:
        syscalls.set_process_name("veneer-keeper")
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
        try:
            namespace.enter(*task.owner, with_user=task.facts.needs_user_namespace)
        except OSError as error:
            raise machine.namespaces_refused(error) from error
        # After the change of credentials, which clears it.
        syscalls.set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(OUR_FAULT)
        # In our user namespace, or the kernel would not let it be mounted there.
        fuse_fd = device.open_fuse()
        alive_reader, alive_writer = os.pipe2(os.O_CLOEXEC)
        go_reader, go_writer = os.pipe2(os.O_CLOEXEC)
        link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        init = os.fork()
        if init == 0:
            for fd in (alive_writer, go_reader, means.cache_fd, means.report_fd):
                os.close(fd)
            link.close()
            run_init(
                replace(task, parent_alive=alive_reader, fuse_fd=fuse_fd, go_fd=go_writer, keeper=theirs)
            )
        for fd in (alive_reader, go_writer):
            os.close(fd)
        theirs.close()
        _Servers(means, fuse_fd, link, task.channel, os.pidfd_open(init)).keep(go_reader)
        os.waitpid(init, 0)
        status = 0
    except VeneerError as error:
        task.channel.send_failure(error)
    except BaseException as error:  # noqa: BLE001 - the process ends here; the supervisor raises it
        task.channel.send_failure(VeneerError(printable(f"{type(error).__name__}: {error}"), where="keeper"))
    finally:
        os._exit(status)


class _Servers:
    """The mount server and its successors, until init ends."""

    def __init__(
        self, means: Means, fuse_fd: int, link: socket.socket, channel: Channel, init_fd: int
    ) -> None:
        self._means = means
        self._fuse_fd = fuse_fd
        self._link = link
        self._channel = channel
        self._init_fd = init_fd
        self._succession = Succession(fuse_fd)
        self._serve: serving.Serve | None = None
        self._since = time.monotonic()
        self._number = 0
        self._pid = 0
        """Of the server that runs, 0: none."""
        self._pidfd = -1
        self._was_dead = False
        self._lingering: dict[int, int] = {}
        """Killed servers that the kernel has not let go: pidfd -> pid."""

    def keep(self, go_fd: int) -> None:
        """Until init ends. ``go_fd``: what the first server waits for."""
        try:
            self._start(self._means.load, go_fd)
        except OSError as error:
            self._give_up(f"it cannot be started: {error.strerror}")
        os.close(go_fd)
        while True:
            ready = self._wait()
            if self._pidfd in ready:
                self._ended(self._reap())
            for fd in self._lingering.keys() & ready:
                os.waitpid(self._lingering.pop(fd), 0)
                os.close(fd)
            if self._link.fileno() in ready:
                self._obey()
            if self._init_fd in ready:
                return
            if not ready:
                self._look()

    def _wait(self) -> set[int]:
        poll = select.poll()
        for fd in (self._init_fd, self._link.fileno(), self._pidfd, *self._lingering):
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        return {fd for fd, _ in poll.poll(1000 * _LOOK_SECONDS if self._pid else None)}

    def _obey(self) -> None:
        word = self._link.recv(1)
        if word == STOP:
            self._stop()
        else:
            self._link.close()  # init is ending

    def _start(self, load: serving.LoadServer, go_fd: int = -1) -> None:
        self._number += 1
        means, succession = self._means, self._succession
        duty = serving.Duty(
            self._fuse_fd, means.cache_fd, means.report_fd, succession.writer, self._number, succession.session, self._since, go_fd
        )  # fmt: skip
        self._pid = serving.start(load, duty)
        self._pidfd = os.pidfd_open(self._pid)
        self._was_dead = False

    def _loaded(self) -> serving.Serve:
        if self._serve is None:
            self._serve = self._means.load()
        return self._serve

    def _reap(self) -> str:
        """How the server ended."""
        _, status = os.waitpid(self._pid, 0)
        os.close(self._pidfd)
        self._pid, self._pidfd = 0, -1
        return describe_end(status)

    def _ended(self, how: str) -> None:
        if self._fuse_fd < 0:
            return  # it was stopped
        obstacle = self._succession.obstacle(time.monotonic())
        while obstacle is None:
            try:
                self._start(self._loaded)
            except BlockingIOError:  # too many processes
                obstacle = self._succession.obstacle(time.monotonic())
                time.sleep(_CALM)
            except OSError as error:
                obstacle = f"another one cannot be started: {error.strerror}"
            else:
                self._tell("warning", f"the mount server ended ({how}); another took over")
                return
        self._give_up(f"{how}; {obstacle}")

    def _give_up(self, why: str) -> None:
        """Let readers fail. It is told unless the environment is ending, which kills the server as well."""
        with contextlib.suppress(OSError):
            self._link.send(why.encode()[:1000])
        self._let_go()
        if self._can_fork():
            self._tell("server-ended", why)

    def _can_fork(self) -> bool:
        try:
            pid = os.fork()
        except OSError:
            return False
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        return True

    def _tell(self, kind: Kind, text: str) -> None:
        with contextlib.suppress(OSError):  # nobody is left to tell, and we are killed in a moment
            self._channel.send(kind, text=printable(text))

    def _stop(self) -> None:
        if self._pid:
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if not poll.poll(1000 * STOP_SECONDS):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._let_go()
        self._link.close()

    def _let_go(self) -> None:
        if self._fuse_fd >= 0:
            os.close(self._fuse_fd)
            self._fuse_fd = -1

    def _look(self) -> None:
        """What can wait until the environment has started: imports, so that a successor begins at once.

        A server that was killed while a notice of its waits for a page stays until that page's READ is answered.

        Only a successor can do that: so it comes before the end of the dead one.
        """
        with contextlib.suppress(Exception):  # the successor will say it
            self._loaded()
        dead = self._pid != 0 and self._fuse_fd >= 0 and _has_ended(self._pid)
        if dead and self._was_dead:
            self._lingering[self._pidfd] = self._pid
            self._pid, self._pidfd = 0, -1
            self._ended("killed")
        self._was_dead = dead


def _has_ended(pid: int) -> bool:
    """Whether the process's main thread is gone. False where /proc does not show it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return "(veneer-mount)" in stat and stat.rpartition(")")[2].split()[0] == "Z"
