"""The caller's side of an environment: starts it, passes signals on, waits until everything is gone.

```
P  the caller: this module
└ K  "veneer-keeper": made the user and pid namespaces, holds /dev/fuse, replaces M
  ├ M  "veneer-mount", in the pid namespace: answers the kernel
  └ I  "veneer-init", pid 1: built the root
    └ C  the command
```

K dies with P, I with K (parent death signals), everything else with I (its pid namespace), the mounts with the last of them.
P itself stays in the host's namespaces, so that it can remove the writable layer.

Signals. C stays in the caller's process group, so a pipeline with it is one job and the terminal's Ctrl-C and Ctrl-Z
reach it directly. P passes on what a process sent to P alone and leaves out what the kernel sent to the group. A signal that
a process sends to the whole group reaches C twice; P cannot tell, and a lost SIGTERM would be worse.
When C stops itself (a pager on Ctrl-Z), P stops as well, or the caller's shell would never take the terminal back.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from veneer.environment import living, running, serving, syscalls, upper
from veneer.environment.channel import Channel, Message, failure
from veneer.environment.facts import HostFacts, read_facts
from veneer.environment.figures import Figures
from veneer.environment.init import InitTask
from veneer.environment.keeper import Means, keep
from veneer.environment.nix import settings
from veneer.environment.plan import Step, plan
from veneer.environment.spec import RunOutcome, RunSpec
from veneer.model.errors import CacheError, MachineError, UsageError, VeneerError
from veneer.model.program import Program

Warn = Callable[[str], None]

_ENDING = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)
_PASSED_ON = (*_ENDING, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGALRM, signal.SIGCONT)
_STOPS = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
_LEAVE_SECONDS = 10.0
"""How long the kernel may take to end killed processes."""
_CHUNK = 1 << 16


class Companion(Protocol):
    """What the caller wants looked after while it blocks in ``run``: a connection of its own."""

    def fileno(self) -> int:
        """The descriptor to watch now; asked again after each ``readable``."""
        ...

    def readable(self) -> bool:
        """It can be read. False: nothing is to be watched any more. Must not block or raise."""
        ...

    def adopt(self, program: Program) -> None:
        """What it starts from now on is this program. Must not block or raise."""
        ...


def run(
    spec: RunSpec,
    *,
    warn: Warn | None = None,
    companion: Companion | None = None,
    layer: upper.Layer | None = None,
    ready: Callable[[], None] | None = None,
) -> RunOutcome:
    """Run a command in an environment; blocks until it, everything that it left and all who joined have ended.

    The process must have one thread. ``warn`` takes a sentence at once (default: stderr). ``companion`` is looked after meanwhile. ``layer``: the named one, claimed and released
    here; ``ready`` is called when a named environment can be joined. UsageError: the name is in use, the store directory
    cannot be provided. MachineError: what to enable. CacheError: no cache directory. VeneerError: the environment was
    killed.
    """
    voice = warn or warn_on_stderr
    warnings: list[str] = []

    def tell(text: str) -> None:
        warnings.append(text)
        voice(text)

    with (
        standard_descriptors(),
        signals_blocked() as (signals, caller_mask),
        foreground_restored() as restore,
    ):
        cache_fd = -1
        listening = None
        try:
            cache_fd = _open_cache(spec.cache_root)
            layer = layer or _take_layer(spec, tell)
            facts = read_facts(spec.store_dir, os.fspath(layer.directory) if layer else None)
            spec = with_nix(spec, facts)
            steps = plan(facts, spec)
            listening = running.listen(spec.environments_root)
            keeper = _start(spec, facts, steps, cache_fd, caller_mask, layer, listening)
            os.close(cache_fd)
            cache_fd = -1
            outcome = Supervisor(keeper, signals, tell, companion, ready, restore, not spec.command).wait()
            outcome.report["warnings"] = warnings
            return outcome
        finally:
            if cache_fd >= 0:
                os.close(cache_fd)
            if listening is not None:
                listening.remove()
            if layer is not None:
                _release(layer, tell)


def with_nix(spec: RunSpec, facts: HostFacts) -> RunSpec:
    """The command's Nix uses the merged store. UsageError: a nix-daemon needs root."""
    if spec.nix is None:
        return spec
    if spec.nix.mode == "daemon" and facts.needs_user_namespace:
        raise UsageError("a nix-daemon needs root: it builds as other users", hint="use --nix overlay")
    return replace(spec, environ=settings.environ(spec.environ, spec.nix, facts.for_nix))


@dataclass(slots=True)
class Keeper:
    """The started environment, seen from outside. ``pidfd``: of K."""

    pid: int
    pidfd: int
    channel: Channel
    report_fd: int


def _start(
    spec: RunSpec,
    facts: HostFacts,
    steps: list[Step],
    cache_fd: int,
    caller_mask: set[int],
    layer: upper.Layer | None,
    listening: running.Listening | None,
) -> Keeper:
    channel, theirs = Channel.pair()
    report_fd, report_writer = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    owner = (os.geteuid(), os.getegid())
    users_fd = -1 if layer is None else layer.users_fd
    described = (
        living.describe(spec, owner, in_user_namespace=facts.needs_user_namespace) if users_fd >= 0 else {}
    )
    pid = os.fork()
    if pid == 0:
        channel.close()
        os.close(report_fd)
        task = InitTask(
            spec=spec,
            facts=facts,
            owner=owner,
            steps=steps,
            channel=theirs,
            caller_mask=caller_mask,
            layer_may_move=spec.name is None,
            users_fd=users_fd,
            described=described,
        )
        content = serving.Content(
            spec.view,
            spec.miss_seconds,
            facts.store,
            None if spec.notes is None else str(spec.notes),
            spec.max_parked,
        )
        about = running.describe(
            "environment", cache_root=spec.cache_root, name=spec.name, command=" ".join(spec.command)
        )
        keep(
            task,
            Means(cache_fd, report_writer, content, None if listening is None else listening.socket, about),
            parent,
        )
    theirs.close()
    if listening is not None:
        listening.close()
    os.close(report_writer)
    return Keeper(pid, os.pidfd_open(pid), channel, report_fd)


@dataclass(slots=True)
class Supervisor:
    keeper: Keeper
    signals: int
    warn: Warn
    companion: Companion | None = None
    ready: Callable[[], None] | None = None
    restore: Callable[[], None] | None = None
    """Gives the terminal's foreground back to us."""
    stays: bool = False
    """There is no command: the environment ends when it is ended."""
    lingers: bool = False
    init: int = -1
    command: int = -1
    status: int | None = None
    ended_by: int = 0
    aborted_by: int | None = None
    error: VeneerError | None = None
    server_ended: str = ""
    figures: Figures = field(default_factory=Figures)

    def wait(self) -> RunOutcome:
        try:
            self._loop()
            self._wait_until_gone()
            return self._outcome()
        finally:
            for fd in (self.keeper.pidfd, self.keeper.report_fd, self.init, self.command):
                if fd >= 0:
                    os.close(fd)
            self.keeper.channel.close()

    def _loop(self) -> None:
        """Until K has ended and the channel and the report are read to their ends."""
        poll = select.poll()
        keeper, channel = self.keeper, self.keeper.channel.fileno()
        waiting = {keeper.pidfd, channel, keeper.report_fd}
        for fd in (*waiting, self.signals):
            poll.register(fd, select.POLLIN)
        watched = self._watch_companion(poll)
        while waiting:
            for fd, _ in poll.poll():
                if fd == watched:
                    assert self.companion is not None
                    poll.unregister(watched)
                    watched = self._watch_companion(poll) if self.companion.readable() else -1
                    continue
                if fd == self.signals:
                    self._pass_signals_on()
                    more = True
                elif fd == channel:
                    message = keeper.channel.receive()
                    more = message is not None
                    if message is not None:
                        self._on_message(message)
                elif fd == keeper.report_fd:
                    chunk = os.read(fd, _CHUNK)
                    self.figures.feed(chunk)
                    more = bool(chunk)
                else:
                    more = False  # K has ended
                if not more:
                    poll.unregister(fd)
                    waiting.discard(fd)

    def _watch_companion(self, poll: select.poll) -> int:
        if self.companion is None:
            return -1
        fd = self.companion.fileno()
        poll.register(fd, select.POLLIN)
        return fd

    def _on_message(self, message: Message) -> None:
        fields = message.fields
        match message.kind:
            case "init":
                (self.init,) = message.fds
            case "started":
                (self.command,) = message.fds
            case "stopped":
                self._on_stop(fields["number"])
            case "ready":
                if self.ready is not None:
                    self.ready()
            case "lingers":
                self.lingers = True
                self.status, self.ended_by = fields["status"], fields["signal"]
                if self.restore is not None:
                    self.restore()
                self.warn(
                    "the command has ended, others use the environment: waiting for them (Ctrl-C ends them)"
                )
            case "ended":
                self.status, self.ended_by = fields["status"], fields["signal"]
            case "server-ended":
                self.server_ended = fields["text"]
                self.warn(
                    f"the mount server ended early ({fields['text']}): the store cannot be read any more"
                )
            case "adopt":
                if self.companion is not None:
                    self.companion.adopt(Program.from_json(fields["program"]))
            case "warning":
                self.warn(fields["text"])
            case "failed":
                self.error = failure(message)

    def _pass_signals_on(self) -> None:
        while (info := syscalls.read_signal(self.signals)) is not None:
            self._on_signal(info)

    def _on_signal(self, info: syscalls.SignalInfo) -> None:
        if self.command < 0 or self.lingers:
            if info.number in _ENDING:
                self.aborted_by = None if self.lingers else info.number
                signal.pidfd_send_signal(self.keeper.pidfd, signal.SIGKILL)
        elif info.code <= 0 or info.number == signal.SIGCONT:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # ended, or changed its user
                signal.pidfd_send_signal(self.command, info.number)

    def _on_stop(self, number: int) -> None:
        """The command stopped alone: stop too. Not when the job was stopped as a whole and goes on by now.

        A shell continues a job process by process, so that we may run before the command does: a SIGCONT that waits for us
        is passed on first. SIGTSTP is held meanwhile, or a stop and a continuation of the job could lie between look and act.
        """
        if number not in _STOPS:
            return
        held = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTSTP])
        try:
            self._pass_signals_on()
            if self._is_command_stopped():
                os.kill(os.getpid(), signal.SIGTSTP)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)

    def _is_command_stopped(self) -> bool:
        with contextlib.suppress(OSError):
            pid = _field(Path(f"/proc/self/fdinfo/{self.command}").read_text(), "Pid")
            return _field(Path(f"/proc/{pid}/status").read_text(), "State").startswith("T")
        return False

    def _wait_until_gone(self) -> None:
        """K is a zombie. I ends after every process of its namespace, and it may still be at that."""
        os.waitpid(self.keeper.pid, 0)
        if self.init >= 0 and not select.select([self.init], [], [], _LEAVE_SECONDS)[0]:
            self.warn("processes of the environment could not be ended: they wait for the kernel")

    def _outcome(self) -> RunOutcome:
        if self.aborted_by is not None:
            return RunOutcome(128 + self.aborted_by, {}, self.aborted_by)
        report = self.figures.report()
        if not self.figures.ended:
            self.server_ended = self.server_ended or "its report is cut off"
        if self.error is not None:
            if "error" in report:
                self.error.where = self.error.where or report["error"]
            raise self.error
        if self.status is None and self.stays:
            return RunOutcome(0, report)
        if self.status is None:
            raise VeneerError("the environment was killed", hint="its processes and mounts are gone")
        if self.server_ended:
            report["mount_server_ended"] = self.server_ended
        return RunOutcome(self.status, report, self.ended_by)


def _open_cache(root: Path) -> int:
    try:
        return os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CacheError(
            f"the cache directory cannot be opened: {error.strerror}", where=os.fspath(root)
        ) from error


def _take_layer(spec: RunSpec, warn: Warn) -> upper.Layer | None:
    """None: keep it in memory."""
    root = spec.environments_root
    try:
        for left in upper.sweep(root):
            warn(f"a leftover could not be removed: {left}")
        if spec.name is None:
            return upper.take_temporary(root)
    except OSError as error:
        if spec.name is None:
            warn(f"the writable layer is kept in memory: {error.strerror} ({error.filename or root})")
            return None
    assert spec.name is not None
    return upper.take_named(root, spec.name)


def _release(layer: upper.Layer, warn: Warn) -> None:
    try:
        layer.release()
    except OSError as error:
        warn(f"the temporary layer {layer.directory} could not be removed: {error.strerror}")


@contextlib.contextmanager
def standard_descriptors() -> Iterator[None]:
    """Keep 0, 1, 2 from being taken by descriptors of ours when the caller closed them; exec closes them again."""
    opened: list[int] = []
    try:
        try:
            while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
                opened.append(fd)
        except OSError as error:
            hint = "it is a character device with mode 0666, on a file system without nodev"
            raise MachineError(
                f"{os.devnull} cannot be opened: {error.strerror}", where=os.devnull, hint=hint
            ) from error
        os.close(fd)
        yield
    finally:
        for fd in opened:
            os.close(fd)


@contextlib.contextmanager
def signals_blocked() -> Iterator[tuple[int, set[int]]]:
    """A descriptor that gives the signals to pass on, and the caller's mask."""
    mask = {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)}
    fd = -1
    try:
        fd = syscalls.signalfd(_PASSED_ON)
        yield fd, mask
    finally:
        if fd >= 0:
            os.close(fd)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def foreground_restored() -> Iterator[Callable[[], None]]:
    """A shell run as the command takes the terminal's foreground and cannot give it back: our group is unknown inside.

    Gives a function that takes it back before the end.
    """
    terminal = next((fd for fd in (0, 1, 2) if _foreground(fd) == os.getpgrp()), None)

    def restore() -> None:
        if terminal is not None and _foreground(terminal) not in (None, os.getpgrp()):
            old = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
            with contextlib.suppress(OSError):  # the terminal is gone
                os.tcsetpgrp(terminal, os.getpgrp())
            signal.pthread_sigmask(signal.SIG_SETMASK, old)

    try:
        yield restore
    finally:
        restore()


def _foreground(fd: int) -> int | None:
    try:
        return os.tcgetpgrp(fd)
    except OSError:
        return None


def _field(text: str, name: str) -> str:
    return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(f"{name}:"))


def warn_on_stderr(text: str) -> None:
    print(f"veneer: warning: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the default voice
