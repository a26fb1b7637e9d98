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
K2: it has loaded all that a server is before the first one serves, and every one is a fork of it: the program's files may be
replaced, or go, at any time.

Whoever may speak to it (``running``) can have another version of the program take over (``takeover``): first a mount server of that
version, then the keeper itself becomes that program, and stays the same process with the same children.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from veneer.environment import machine, namespace, running, serving, syscalls, takeover
from veneer.environment.channel import Channel, Kind
from veneer.environment.init import OUR_FAULT, STOP, STOP_SECONDS, InitTask, describe_end, run_init
from veneer.environment.plan import LOWER_ROOT
from veneer.environment.takeover import Handover, Heir
from veneer.formats import request_wire
from veneer.model.errors import VeneerError, printable
from veneer.model.program import Program, this_program
from veneer.mount import device
from veneer.mount.succession import Succession

_LOOK_SECONDS = 1.0
"""Between looks for a server that was killed and cannot end."""
_CALM = 0.1
"""Seconds between attempts to fork when there are too many processes."""


@dataclass(frozen=True, slots=True)
class Means:
    """What mount servers need. ``report_fd``: where their figures go. ``listening``: where callers come, who are told ``about``."""

    cache_fd: int
    report_fd: int
    content: serving.Content
    listening: socket.socket | None
    about: Mapping[str, Any]


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
            if means.listening is not None:
                means.listening.close()
            run_init(
                replace(task, parent_alive=alive_reader, fuse_fd=fuse_fd, go_fd=go_writer, keeper=theirs)
            )
        for fd in (alive_reader, go_writer):
            os.close(fd)
        theirs.close()
        mounted_on = f"/proc/{init}/root{LOWER_ROOT}{task.spec.store_dir}"
        servers = Servers(means, mounted_on, fuse_fd, link, task.channel, init, os.pidfd_open(init))
        servers.begin(go_reader)
        servers.watch()
        status = 0
    except VeneerError as error:
        task.channel.send_failure(error)
    except BaseException as error:  # noqa: BLE001 - the process ends here; the supervisor raises it
        task.channel.send_failure(VeneerError(printable(f"{type(error).__name__}: {error}"), where="keeper"))
    finally:
        os._exit(status)


def resumed(handover: Handover) -> Servers:
    """What a keeper of another version left to this process, which it was; or leaves, when this is only an attempt (``takeover``)."""
    syscalls.set_process_name("veneer-keeper")
    syscalls.set_parent_death_signal(signal.SIGKILL)
    fds = handover.fds
    listening = socket.socket(fileno=fds["listening"])
    listening.setblocking(False)
    means = Means(fds["cache"], fds["report"], handover.content, listening, handover.about)
    servers = Servers(
        means, handover.mounted_on, fds["fuse"], socket.socket(fileno=fds["link"]), Channel(socket.socket(fileno=fds["channel"])),
        handover.pids["init"], fds["init"], Succession(fds["fuse"], inherited=(fds["told"], fds["session"], handover.session)),
    )  # fmt: skip
    servers.inherit(handover)
    return servers


def go_on(servers: Servers, caller_fd: int) -> NoReturn:
    """After ``resumed``: the end of the upgrade that ``caller_fd`` asked for. Never returns; ends the process."""
    status = OUR_FAULT
    try:
        with socket.socket(fileno=caller_fd) as caller:
            running.reply(caller, {"version": this_program().version})
        servers.watch()
        status = 0
    except BaseException as error:  # noqa: BLE001 - the process ends here; the supervisor raises it
        servers.channel.send_failure(
            VeneerError(printable(f"{type(error).__name__}: {error}"), where="keeper")
        )
    finally:
        os._exit(status)


class Servers:
    """The mount server and its successors, until init ends."""

    def __init__(
        self,
        means: Means,
        mounted_on: str,
        fuse_fd: int,
        link: socket.socket,
        channel: Channel,
        init: int,
        init_fd: int,
        succession: Succession | None = None,
    ) -> None:
        self._means = means
        self._mounted_on = mounted_on
        self._fuse_fd = fuse_fd
        self._init = init
        self._serve = serving.mount_server(means.content)
        self._program = this_program()
        self._link = link
        self.channel = channel
        self._init_fd = init_fd
        self._succession = succession or Succession(fuse_fd)
        self._since = time.monotonic()
        self._number = 0
        self._pid = 0
        """Of the server that runs, 0: none."""
        self._pidfd = -1
        self._was_dead = False
        self._lingering: dict[int, int] = {}
        """Killed servers that the kernel has not let go: pidfd -> pid."""

    def begin(self, go_fd: int) -> None:
        """``go_fd``: what the first server waits for."""
        try:
            self._start(go_fd)
        except OSError as error:
            self._give_up(f"it cannot be started: {error.strerror}")
        os.close(go_fd)

    def inherit(self, handover: Handover) -> None:
        """Instead of ``begin``."""
        self._since, self._number = handover.since, handover.number
        self._pid, self._pidfd = handover.pids["server"], handover.fds["server"]
        self._lingering = dict(handover.lingering)

    def watch(self) -> None:
        """Until init has ended."""
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
                os.waitpid(self._init, 0)
                return
            if self._means.listening is not None and self._means.listening.fileno() in ready:
                running.answer_one(self._means.listening, self._about, self._upgrade, self._adopt)
            if not ready:
                self._look()

    def _wait(self) -> set[int]:
        poll = select.poll()
        listening = -1 if self._means.listening is None else self._means.listening.fileno()
        for fd in (self._init_fd, self._link.fileno(), self._pidfd, listening, *self._lingering):
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        return {fd for fd, _ in poll.poll(1000 * _LOOK_SECONDS if self._pid else None)}

    def _obey(self) -> None:
        word = self._link.recv(1)
        if word == STOP:
            self._stop()
        else:
            self._link.close()  # init is ending

    def _start(self, go_fd: int = -1) -> None:
        self._number += 1
        means, succession = self._means, self._succession
        duty = serving.Duty(
            self._fuse_fd, means.cache_fd, means.report_fd, succession.writer, self._number, succession.session, self._since, go_fd
        )  # fmt: skip
        self._pid = serving.start(self._serve, duty)
        self._pidfd = os.pidfd_open(self._pid)
        self._was_dead = False

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
                self._start()
            except BlockingIOError:  # too many processes
                obstacle = self._succession.obstacle(time.monotonic())
                time.sleep(_CALM)
            except OSError as error:
                obstacle = f"another one cannot be started: {error.strerror}"
            else:
                self._tell("warning", text=f"the mount server ended ({how}); another took over")
                return
        self._give_up(f"{how}; {obstacle}")

    def _give_up(self, why: str) -> None:
        """Let readers fail. It is told unless the environment is ending, which kills the server as well."""
        with contextlib.suppress(OSError):
            self._link.send(why.encode()[:1000])
        self._let_go()
        if self._can_fork():
            self._tell("server-ended", text=why)

    def _can_fork(self) -> bool:
        try:
            pid = os.fork()
        except OSError:
            return False
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        return True

    def _tell(self, kind: Kind, **fields: Any) -> None:
        if "text" in fields:
            fields["text"] = printable(fields["text"])
        with contextlib.suppress(OSError):  # nobody is left to tell, and we are killed in a moment
            self.channel.send(kind, **fields)

    def _stop(self) -> None:
        if self._pid:
            self._end_server()
        self._let_go()
        self._link.close()

    def _end_server(self) -> None:
        """It is asked to, then killed; it may have to be waited for yet."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
        if not _ends(self._pidfd, STOP_SECONDS):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _about(self) -> running.Answer:
        version = {"version": self._program.version, "wire": request_wire.VERSION}
        return {**self._means.about, **version, "pid": os.getpid()}

    def _adopt(self, program: Program) -> None:
        self._tell("adopt", program=program.to_json())

    def _upgrade(self, program: Program, caller: socket.socket) -> running.Answer:
        """T1, T2 of ``takeover``. Returns only when this program goes on: why."""
        serving_still = self._pid and self._fuse_fd >= 0 and self._link.fileno() >= 0
        hindrance = self._succession.hindrance() if serving_still else "it is ending"
        if hindrance is not None:
            return _refused(hindrance)
        keeper = self._prepared(program, "keeper", self._for_keeper(caller))
        if not isinstance(keeper, Heir):
            return keeper
        keeper.dismiss()
        heir = self._prepared(program, "mount server", self._for_server())
        if not isinstance(heir, Heir):
            return heir
        self._end_server()
        if _ends(self._pidfd, _LOOK_SECONDS):
            self._reap()
        else:
            self._lingering[self._pidfd] = self._pid
        self._number += 1
        self._pid, self._pidfd, self._was_dead = heir.pid, heir.pidfd, False
        with contextlib.suppress(BrokenPipeError):
            heir.go()
        heir.close()
        if not takeover.answers(self._mounted_on, self._pidfd):
            self._take_back()
            return _refused("the new mount server did not answer the kernel")
        return self._become(program, caller)

    def _prepared(self, program: Program, what: str, fds: Mapping[str, int]) -> Heir | running.Answer:
        """The new program in a process of its own, which could be ``what`` ("keeper", "mount server"); or why it cannot."""
        try:
            heir = self._heir(program, what, fds)
        except OSError as error:
            return _refused(f"the new {what} cannot be started: {error.strerror}")
        obstacle = heir.obstacle((self._pidfd, self._init_fd, self._link.fileno()))
        if obstacle is None:
            return heir
        heir.dismiss()
        if not obstacle:
            return _refused("the mount server ended meanwhile", again=True)
        return _refused(f"the new {what} cannot start: {obstacle}")

    def _heir(self, program: Program, what: str, given: Mapping[str, int]) -> Heir:
        ready_reader, ready = os.pipe2(os.O_CLOEXEC)
        go, go_writer = os.pipe2(os.O_CLOEXEC)
        said = os.memfd_create("veneer-said", os.MFD_CLOEXEC)
        fds = {**given, "ready": ready, "go": go}
        try:
            pid = os.fork()
            if pid == 0:
                try:
                    fds["stderr"] = os.dup(2)
                    os.dup2(said, 2)
                    handover = self._handover(self._number + 1, fds)
                    role = "attempt" if what == "keeper" else "server"
                    takeover.become(program, role, handover, [*fds.values(), *self._lingering])
                except BaseException as error:  # noqa: BLE001 - the process ends here
                    os.write(2, takeover.refusal(error).encode())
                finally:
                    os._exit(OUR_FAULT)
        except OSError:
            for fd in (ready_reader, go_writer, said):
                os.close(fd)
            raise
        finally:
            os.close(ready)
            os.close(go)
        return Heir(pid, ready_reader, go_writer, said)

    def _handover(self, number: int, fds: Mapping[str, int]) -> Handover:
        session = self._succession.session
        assert session is not None
        pids = {"init": self._init, "server": self._pid}
        return Handover(
            self._means.content, session, number, self._since, self._means.about, self._mounted_on,
            fds, pids, self._lingering,
        )  # fmt: skip

    def _for_server(self) -> dict[str, int]:
        means = self._means
        return {
            "fuse": self._fuse_fd, "cache": means.cache_fd, "report": means.report_fd, "session": self._succession.writer,
        }  # fmt: skip

    def _for_keeper(self, caller: socket.socket) -> dict[str, int]:
        assert self._means.listening is not None
        return {
            **self._for_server(), "told": self._succession.reader, "link": self._link.fileno(),
            "channel": self.channel.fileno(), "init": self._init_fd, "server": self._pidfd,
            "listening": self._means.listening.fileno(), "caller": caller.fileno(),
        }  # fmt: skip

    def _take_back(self) -> None:
        """A server of this program, in the place of one that does not serve."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        if _ends(self._pidfd, _LOOK_SECONDS):
            self._reap()
        else:
            self._lingering[self._pidfd] = self._pid
            self._pid, self._pidfd = 0, -1
        self._ended("a new version did not serve")

    def _become(self, program: Program, caller: socket.socket) -> running.Answer:
        """Returns only when that failed."""
        fds = self._for_keeper(caller)
        try:
            takeover.become(
                program, "keeper", self._handover(self._number, fds), [*fds.values(), *self._lingering]
            )
        except OSError as error:
            return _refused(f"its mount server took over, its keeper cannot: {error.strerror}")

    def _let_go(self) -> None:
        if self._fuse_fd >= 0:
            os.close(self._fuse_fd)
            self._fuse_fd = -1

    def _look(self) -> None:
        """A server that was killed while a notice of its waits for a page stays until that page's READ is answered.

        Only a successor can do that: so it comes before the end of the dead one.
        """
        dead = self._pid != 0 and self._fuse_fd >= 0 and takeover.has_ended(self._pid, "veneer-mount")
        if dead and self._was_dead:
            self._lingering[self._pidfd] = self._pid
            self._pid, self._pidfd = 0, -1
            self._ended("killed")
        self._was_dead = dead


def _refused(why: str, *, again: bool = False) -> running.Answer:
    return {"error": why, "again": again}


def _ends(pidfd: int, seconds: float) -> bool:
    """Whether the process ends within ``seconds``."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(1000 * seconds))
