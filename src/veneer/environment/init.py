"""The environment's first process: pid 1 of its pid namespace. It builds the root, starts the command, reaps.

When it ends, however it does, the kernel kills every process of the namespace and with the last of them all mounts vanish.
It has every signal blocked: the terminal's and the supervisor's go to the command, which gets the caller's mask back.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from veneer.environment import living, machine, namespace, serving, syscalls
from veneer.environment import plan as p
from veneer.environment.apply import Executor, StepError
from veneer.environment.channel import Channel
from veneer.environment.facts import HostFacts
from veneer.environment.nix import inside, settings
from veneer.environment.spec import RunSpec
from veneer.model.errors import MachineError, VeneerError, printable
from veneer.mount import device

NOT_EXECUTABLE = 126
NOT_FOUND = 127
OUR_FAULT = 125
ABSENCE_SECONDS = 10.0
"""How long absence is believed when the view is the daemon's own."""
ABSENCE_MARGIN = 0.2
STOP_SECONDS = 5.0
"""How long the mount server may take to end and report."""
STOP = b"s"
"""To the keeper: end the mount server, and close your end when that is done."""


@dataclass(slots=True)
class InitTask:
    """What is handed down. ``owner``: the caller's user and group. ``layer_may_move``: a refused writable layer may be
    replaced by memory. From the keeper: ``parent_alive``, a pipe that says end-of-file when it is gone; ``fuse_fd``, to be
    mounted; ``go_fd``, where the mount server waits for that; ``keeper``, which takes STOP, and says why there is no
    mount server when there can be none."""

    spec: RunSpec
    facts: HostFacts
    owner: tuple[int, int]
    steps: list[p.Step]
    channel: Channel
    caller_mask: Iterable[int]
    layer_may_move: bool
    parent_alive: int = -1
    fuse_fd: int = -1
    go_fd: int = -1
    keeper: socket.socket | None = None
    users_fd: int = -1
    """The lock that keeps others from joining (U4 of ``upper``), or -1: nobody may."""
    described: Mapping[str, Any] = field(default_factory=dict)
    """What others have to know to join."""

    @property
    def shown_as(self) -> tuple[int, int] | None:
        """User and group of the command's own user namespace; None: it has none."""
        own = self.facts.needs_user_namespace and not self.spec.map_root and self.owner != (0, 0)
        return self.owner if own else None


def run_init(task: InitTask) -> NoReturn:
    """Never returns; ends the process."""
    try:
        syscalls.set_process_name("veneer-init")
        _die_with_parent(task.parent_alive)
        task.channel.send("init", [os.pidfd_open(os.getpid())])
        itself = living.identify() if task.users_fd >= 0 else {}
        _build(task)
        if task.spec.nix is not None:
            inside.prepare(
                task.spec.nix, settings.daemon_environ(task.spec.environ, task.spec.nix, task.facts.for_nix)
            )
        if task.users_fd >= 0:
            _let_others_join(task, itself)
        command = -1
        if task.spec.command:
            command = start_command(task.spec, task.channel, task.shown_as, task.caller_mask)
        threading.Thread(target=_renew_absences, args=(task,), name="absences", daemon=True).start()
        if task.spec.nix is not None:
            threading.Thread(target=_remount_on_request, args=(task,), name="remounts", daemon=True).start()
            if task.facts.store is not None:
                threading.Thread(target=_hold_host_paths, args=(task,), name="roots", daemon=True).start()
        if command < 0:
            _reap()
        ended = describe_status(_wait_for_command(task.channel, command))
        if task.users_fd >= 0:
            _wait_for_others(task, ended)
        _kill_others()
        _stop_server(task)
        task.channel.send("ended", **ended)
    except BrokenPipeError:
        os._exit(OUR_FAULT)  # the supervisor is gone: there is nobody to tell
    except VeneerError as error:
        task.channel.send_failure(error)
    except BaseException as error:  # noqa: BLE001 - the process ends here; the supervisor raises it
        task.channel.send_failure(VeneerError(printable(f"{type(error).__name__}: {error}"), where="init"))
    finally:
        os._exit(0)


def describe_status(status: int) -> dict[str, Any]:
    """The fields of ``ended`` for a wait status."""
    code = os.waitstatus_to_exitcode(status)
    return {"status": code if code >= 0 else 128 - code, "signal": max(0, -code)}


def _let_others_join(task: InitTask, itself: Mapping[str, int]) -> None:
    living.announce(Path(p.ENVIRONMENT), {**task.described, **itself})
    fcntl.flock(task.users_fd, fcntl.LOCK_UN)
    task.channel.send("ready")


def _wait_for_others(task: InitTask, ended: Mapping[str, Any]) -> None:
    """Keep others from joining; those who have go on until they end by themselves."""
    try:
        fcntl.flock(task.users_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        task.channel.send("lingers", **ended)
        threading.Thread(target=_reap, name="reaper", daemon=True).start()
        fcntl.flock(task.users_fd, fcntl.LOCK_EX)


def _reap() -> NoReturn:
    """Reap whatever ends, for ever."""
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        signal.sigwait([signal.SIGCHLD])


def _die_with_parent(parent_alive: int) -> None:
    syscalls.set_parent_death_signal(signal.SIGKILL)
    if select.select([parent_alive], [], [], 0)[0]:  # it died before the call
        os._exit(OUR_FAULT)


def _build(task: InitTask) -> None:
    def serve() -> None:
        os.close(task.fuse_fd)  # the keeper has its own, and says when the mount is to end
        with contextlib.suppress(BrokenPipeError):  # it has ended, and the keeper says why
            os.write(task.go_fd, b"!")
        os.close(task.go_fd)

    executor = Executor(task.fuse_fd, serve, lambda text: task.channel.send("warning", text=text))
    try:
        syscalls.unshare(syscalls.CLONE_NEWNS)
    except OSError as error:
        raise machine.namespaces_refused(error) from error
    try:
        _apply(task, executor)
    except StepError as failure:
        _raise_server_failure(task)
        raise machine.explain(failure, in_user_namespace=task.facts.needs_user_namespace) from failure
    device.raise_read_ahead(p.LOWER_ROOT + task.spec.store_dir)


def _apply(task: InitTask, executor: Executor) -> None:
    try:
        executor.apply(task.steps)
    except StepError as failure:
        on_disk = task.facts.environment is not None
        if not (on_disk and task.layer_may_move and machine.can_layers_be_at_fault(failure)):
            raise
        task.channel.send(
            "warning",
            text=f"the writable layer is kept in memory: {task.facts.environment} cannot hold one "
            f"({failure.error.strerror})",
        )
        executor.apply([*p.memory_layers(), failure.step, *failure.rest])


def _raise_server_failure(task: InitTask) -> None:
    """The mount server's end is the better explanation, when there is one."""
    assert task.keeper is not None
    if select.select([task.keeper], [], [], 0)[0]:
        why = task.keeper.recv(1 << 12).decode(errors="replace")
        raise MachineError(f"the mount server did not start: {why}")


def start_command(
    spec: RunSpec,
    channel: Channel,
    shown_as: tuple[int, int] | None,
    caller_mask: Iterable[int],
    *,
    dies_with_us: bool = False,
) -> int:
    """Fork the command; its pid. ``shown_as``: user and group of a user namespace of its own, None: it gets none."""
    try:
        os.chdir(spec.cwd)
    except OSError as error:
        text = (
            f"the working directory {spec.cwd} cannot be entered ({error.strerror}); the command starts in /"
        )
        channel.send("warning", text=text)
        os.chdir("/")
    us = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become_command(spec, shown_as, caller_mask, us if dies_with_us else 0)
    os.chdir("/")
    channel.send("started", [os.pidfd_open(pid)])
    return pid


def _become_command(
    spec: RunSpec, shown_as: tuple[int, int] | None, caller_mask: Iterable[int], parent: int
) -> NoReturn:
    """``parent``: when it ends, the command is killed; 0: it is not."""
    status = OUR_FAULT
    program = spec.command[0]
    try:
        # In this order: a signal that came in between would run a handler of ours and be lost.
        syscalls.reset_signal_handlers()
        signal.pthread_sigmask(signal.SIG_SETMASK, caller_mask)
        if shown_as is not None:
            _leave_root(*shown_as)
        if parent:
            syscalls.set_parent_death_signal(signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(OUR_FAULT)
        os.execvpe(program, spec.command, spec.environ)
    except OSError as error:
        status, text = _exec_failure(program, os.get_exec_path(spec.environ), error)
        os.write(2, f"veneer: {printable(text)}\n".encode(errors="replace"))
    finally:
        os._exit(status)


def _leave_root(uid: int, gid: int) -> None:
    try:
        namespace.show_as(uid, gid)
    except OSError as error:
        os.write(2, f"veneer: {machine.namespaces_refused(error)}\n".encode())
        os._exit(OUR_FAULT)


def _exec_failure(program: str, path: list[str], error: OSError) -> tuple[int, str]:
    # The error may be that of a directory in PATH which we may not enter.
    if "/" not in program and not any(os.access(Path(directory, program), os.F_OK) for directory in path):
        return NOT_FOUND, f"{program}: command not found"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        if os.path.lexists(program):
            return NOT_EXECUTABLE, f"{program}: its interpreter or loader does not exist"
        return NOT_FOUND, f"{program}: no such file"
    return NOT_EXECUTABLE, f"{program}: {error.strerror}"


def _renew_absences(task: InitTask) -> None:
    """Let names that were absent be asked again once their time is over: the overlay pins them until it is remounted.

    A thread of its own, for ever. Signals that come while it waits become one, and have the next turn.
    """
    seconds = float((task.spec.view or {}).get("negative_ttl", ABSENCE_SECONDS)) + ABSENCE_MARGIN
    pause = threading.Event()
    while True:
        signal.sigwait([serving.ABSENCE])
        pause.wait(seconds)
        try:
            _remount(task.spec.store_dir)
        except OSError as error:
            text = f"store paths that were absent stay so: the overlay cannot be remounted ({error.strerror})"
            task.channel.send("warning", text=text)
            return


def _remount_on_request(task: InitTask) -> None:
    """Do what the remount hook asks for. Each end of a pipe waits for the other, so its return means that it was done.

    A thread of its own, for ever. Nix calls the hook when it has removed from the upper layer what is also below.
    """
    while True:
        with open(p.REMOUNT_ASK, "rb") as asked:
            asked.read()
        try:
            _remount(task.spec.store_dir)
        except OSError as error:
            task.channel.send("warning", text=f"the overlay cannot be remounted ({error.strerror})")
        with open(p.REMOUNT_DONE, "wb"):
            pass


def _hold_host_paths(task: InitTask) -> None:
    try:
        inside.hold_host_paths(Path(p.HOST_STORE))  # the descriptor stays open as long as we live
    except OSError as error:
        text = f"nix-store --gc inside will complain about the host's paths ({error.strerror})"
        task.channel.send("warning", text=text)


def _remount(store_dir: str) -> None:
    """Let the overlay forget what it knows of its layers. OSError."""
    flags = os.statvfs(store_dir).f_flag & (
        syscalls.MS_RDONLY | syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
    )
    syscalls.mount("overlay", store_dir, "overlay", syscalls.MS_REMOUNT | flags)


def _wait_for_command(channel: Channel, command: int) -> int:
    """Reap everything until the command has ended; its wait status."""
    while True:
        pid, status = os.waitpid(-1, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            if pid == command:
                channel.send("stopped", number=os.WSTOPSIG(status))
        elif pid == command:
            return status


def _kill_others() -> None:
    """What the command left running goes before the mount server, so that it does not see a dead store.

    The server's parent, the keeper, is outside: it counts as 0.
    """
    if Path("/proc/self").readlink() != Path(str(os.getpid())):
        return  # the host's process list, in a container: the kernel will do it
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                stat = (entry / "stat").read_text(errors="replace")
                if stat.rpartition(")")[2].split()[1] != "0":
                    os.kill(int(entry.name), signal.SIGKILL)


def _stop_server(task: InitTask) -> None:
    """Wait until it has reported, and does not hold the mount any more."""
    assert task.keeper is not None
    with contextlib.suppress(BrokenPipeError):  # it has given up
        task.keeper.send(STOP)
    while task.keeper.recv(1 << 12):
        pass


def describe_end(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}"
