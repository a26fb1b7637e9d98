"""A further command in a living environment.

```
J  the caller: this module's ``join``
└ K  "veneer-keeper": entered the environment's user and mount namespaces, waits for S
  └ S  "veneer-joined": inside the environment's pid namespace; starts the command, reaps what it leaves
    └ C  the command
```

K dies with J. S notices K's end and kills C and everything that C left: it adopts all orphans below it. S and C die with the
environment. J itself enters nothing: it stays able to use the host, and talks to S as the supervisor does to init.

K and S alone hold the lock that keeps the environment up, so that it is free exactly when no process of ours is inside.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from veneer.environment import supervise, syscalls
from veneer.environment.channel import Channel
from veneer.environment.facts import read_facts
from veneer.environment.init import OUR_FAULT, describe_status, start_command
from veneer.environment.living import Living, Owner
from veneer.environment.spec import NixSpec, RunOutcome, RunSpec
from veneer.model.errors import MachineError, VeneerError, printable

_NAMESPACES = syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNS


@dataclass(frozen=True, slots=True)
class _Task:
    """``leaves``: what the command leaves running goes on."""

    spec: RunSpec
    living: Living
    channel: Channel
    caller_mask: Iterable[int]
    leaves: bool


def join(
    living: Living, spec: RunSpec, *, leaves: bool = False, warn: supervise.Warn | None = None
) -> RunOutcome:
    """Run the spec's command in a living environment; blocks until it has ended. Closes ``living``.

    What it left running is killed, or with ``leaves`` goes on until the environment ends. Of the spec only command, variables
    and working directory count. The process must have one thread. MachineError: the kernel refuses to let us in.
    VeneerError: the environment was killed.
    """
    voice = warn or supervise.warn_on_stderr
    warnings: list[str] = []

    def tell(text: str) -> None:
        warnings.append(text)
        voice(text)

    with (
        supervise.standard_descriptors(),
        supervise.signals_blocked() as (signals, caller_mask),
        supervise.foreground_restored(),
    ):
        try:
            keeper = _start(living, _as_inside(spec, living.owner), caller_mask, leaves)
        finally:
            living.close()
        outcome = supervise.Supervisor(keeper, signals, tell).wait()
        outcome.report["warnings"] = warnings
        return outcome


def _as_inside(spec: RunSpec, owner: Owner) -> RunSpec:
    """With the environment's store, and its Nix."""
    nix = None if owner.nix_socket is None else NixSpec(Path(owner.nix_socket), owner.nix_mode)
    inside = replace(spec, store_dir=owner.store_dir, map_root=owner.map_root, nix=nix)
    return inside if nix is None else supervise.with_nix(inside, read_facts(owner.store_dir, None))


def _start(living: Living, spec: RunSpec, caller_mask: set[int], leaves: bool) -> supervise.Keeper:
    channel, theirs = Channel.pair()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        channel.close()
        _keep(_Task(spec, living, theirs, caller_mask, leaves), parent)
    theirs.close()
    no_report = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    return supervise.Keeper(pid, os.pidfd_open(pid), channel, no_report)


def _keep(task: _Task, parent: int) -> NoReturn:
    """K: into the namespaces, then nothing but waiting for S."""
    status = OUR_FAULT
    try:
        syscalls.set_process_name("veneer-keeper")
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
        _enter(task.living)
        # After the change of credentials, which clears it.
        syscalls.set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(OUR_FAULT)
        alive_reader, alive_writer = os.pipe2(os.O_CLOEXEC)
        child = os.fork()
        if child == 0:
            os.close(alive_writer)
            _stand_in(task, alive_reader)
        os.close(alive_reader)
        task.channel.close()
        os.waitpid(child, 0)
        status = 0
    except VeneerError as error:
        task.channel.send_failure(error)
    except BaseException as error:  # noqa: BLE001 - the process ends here; the supervisor raises it
        task.channel.send_failure(VeneerError(printable(f"{type(error).__name__}: {error}"), where="keeper"))
    finally:
        os._exit(status)


def _enter(living: Living) -> None:
    """The environment's namespaces, its root, and its root user where it has a user namespace."""
    owner = living.owner
    namespaces = _NAMESPACES
    if not owner.in_user_namespace:
        namespaces &= ~syscalls.CLONE_NEWUSER
    try:
        # The root of init, which in a container without pivot_root is not that of its mount namespace.
        root = os.open(f"/proc/{owner.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        by_root = os.geteuid() == 0 != owner.uid
        if by_root:
            os.setgroups([])
        syscalls.setns(living.init_fd, namespaces)
        if owner.in_user_namespace:
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
        if by_root:
            syscalls.own_proc_files()
        os.fchdir(root)
        os.chroot(".")
        os.close(root)
    except (ProcessLookupError, FileNotFoundError):
        raise VeneerError("the environment ended before it could be entered", hint="try again") from None
    except OSError as error:
        raise MachineError(
            f"cannot enter the environment {living.name}: {error.strerror}",
            where=str(living.directory),
            hint="enter it from where it was started: the same container, and with the same rights",
        ) from error


def _stand_in(task: _Task, keeper_alive: int) -> NoReturn:
    """S: the command's parent."""
    command = 0
    try:
        syscalls.set_process_name("veneer-joined")
        syscalls.adopt_orphans()
        owner = task.living.owner
        own = owner.in_user_namespace and not owner.map_root and owner.uid != 0
        shown_as = (owner.uid, owner.gid) if own else None
        children = syscalls.signalfd([signal.SIGCHLD])
        command = start_command(task.spec, task.channel, shown_as, task.caller_mask, dies_with_us=True)
        status = _wait_for_command(task.channel, command, children, keeper_alive)
        if status is None or not task.leaves:
            _end_descendants(command)
        if status is not None:
            task.channel.send("ended", **describe_status(status))
    except BrokenPipeError:
        _end_descendants(command)  # nobody is left to tell
    except BaseException as error:  # noqa: BLE001 - the process ends here; the supervisor raises it
        with contextlib.suppress(OSError):
            story = printable(f"{type(error).__name__}: {error}")
            task.channel.send_failure(VeneerError(story, where="joined"))
        _end_descendants(command)
    finally:
        os._exit(0)


def _wait_for_command(channel: Channel, command: int, children: int, keeper_alive: int) -> int | None:
    """Its wait status; None when K has ended before it."""
    while True:
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG | os.WUNTRACED))[0]:
                if found[0] == command and os.WIFSTOPPED(found[1]):
                    channel.send("stopped", number=os.WSTOPSIG(found[1]))
                elif found[0] == command:
                    return found[1]
        ready = select.select([children, keeper_alive], [], [])[0]
        if keeper_alive in ready:
            return None
        while syscalls.read_signal(children) is not None:
            pass


def _end_descendants(command: int) -> None:
    """Kill our children, and those who become ours by that, until there are none."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for child in _children(command):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            os.waitpid(-1, 0)


def _children(command: int) -> list[int]:
    """Of ours; only ``command`` where /proc is not of our pid namespace (a container's)."""
    me = str(os.getpid())
    if Path("/proc/self").readlink().name != me:
        return [command] if command else []
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                stat = (entry / "stat").read_text(errors="replace")
                if stat.rpartition(")")[2].split()[1] == me:
                    found.append(int(entry.name))
    return found
