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
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from veneer.cli.config import Flags, Settings
from veneer.cli.options import json_option, quiet_option, settings_flags
from veneer.cli.output import Output
from veneer.model.errors import MachineError, UsageError

if TYPE_CHECKING:
    from veneer.environment import Companion
    from veneer.environment.running import Answer, Listening
    from veneer.model.program import Program
    from veneer.mount.succession import Succession

_END_SECONDS = 10.0
_LOOK_SECONDS = 1.0
"""Between looks for a server that was killed and cannot end."""
_ENDING = (signal.SIGINT, signal.SIGTERM)


@click.command()
@click.argument("directory", metavar="DIR")
@settings_flags(max_size=True)
@click.option("--prefetch", "ahead", metavar="FILE", help="Load what this trace tells.")
@quiet_option("Say nothing when all is well.")
@json_option("Errors as JSON.")
@click.pass_obj
def mount(output: Output, flags: Flags, directory: str, ahead: str | None) -> int:
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
    session = os.urandom(8).hex()
    with closing(WatchedDaemon(settings, session, output)) as watched, _interruptible():
        watched.client.greet()
        daemon: Companion = watched
        if ahead is not None:
            from veneer.cli.run import prefetching, read_trace

            daemon = prefetching(watched, read_trace(ahead), ())
        # An interrupt between the mount and the try would leave it mounted; a server before the mount has nothing to read.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        device.mount_fuse(fuse, str(target))
        status: int | None = None
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
            with _means(fuse, target, settings, session) as means:
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


@dataclass(slots=True)
class _Means:
    """What each mount server gets. ``owner``: a pipe that ends with this process. ``program``: what servers are.
    ``listening``: where `veneer upgrade` asks."""

    fuse: int
    target: Path
    cache: int
    cache_dir: Path
    view: int
    owner: int
    succession: Succession
    program: Program
    listening: Listening | None
    max_parked: int | None = None


def _serve(means: _Means, daemon: Companion, output: Output) -> int:
    """Start mount servers until one unmounted (0) or the last one cannot have a successor: its status."""
    from veneer.mount.succession import is_connected

    server = _start(means)
    try:
        output.note(f"mounted on {means.target}; Ctrl-C unmounts")
        while True:
            server, status = _wait(means, server, daemon)
            if not is_connected(means.fuse):
                return 0
            how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
            obstacle = means.succession.obstacle(time.monotonic())
            if obstacle is not None:
                output.warning(f"the mount server ended ({how}): {obstacle}")
                return status or 1
            server = _start(means)
            output.warning(f"the mount server ended ({how}); another took over")
    finally:
        _end(server)


def _wait(
    means: _Means, server: subprocess.Popen[bytes], daemon: Companion
) -> tuple[subprocess.Popen[bytes], int]:
    """The server that ended, or was killed and cannot end, and its status. A daemon that dies meanwhile has a successor."""
    from veneer.environment import running, takeover

    pidfd = os.pidfd_open(server.pid)

    def upgrade(program: Program, _: object) -> Answer:
        nonlocal server, pidfd
        answer, server = _upgrade(means, server, pidfd, program)
        os.close(pidfd)
        pidfd = os.pidfd_open(server.pid)
        return answer

    try:
        watched = True
        was_dead = False
        while True:
            waiting = [pidfd, *([daemon.fileno()] if watched else [])]
            if means.listening is not None:
                waiting.append(means.listening.socket.fileno())
            ready, _, _ = select.select(waiting, [], [], _LOOK_SECONDS)
            if pidfd in ready:
                return server, server.wait()
            if not ready:
                dead = takeover.has_ended(server.pid)
                if dead and was_dead:
                    return server, -signal.SIGKILL
                was_dead = dead
                continue
            if watched and daemon.fileno() in ready:
                watched = daemon.readable()
            elif means.listening is not None:
                running.answer_one(means.listening.socket, lambda: _about(means), upgrade, daemon.adopt)
    finally:
        os.close(pidfd)


def _about(means: _Means) -> Answer:
    from veneer.environment import running
    from veneer.mount.succession import FORMATS

    fixed = running.describe("mount", cache_root=means.cache_dir, place=str(means.target))
    return {**fixed, "pid": os.getpid(), "version": means.program.version, "wire": FORMATS["request"]}


def _upgrade(
    means: _Means, server: subprocess.Popen[bytes], pidfd: int, program: Program
) -> tuple[Answer, subprocess.Popen[bytes]]:
    """T1 of ``takeover``: a server of ``program`` in the place of ``server``. Which one serves then."""
    from veneer.environment import takeover

    hindrance = means.succession.hindrance()
    if hindrance is not None:
        return {"error": hindrance, "again": False}, server
    ready, ready_writer = os.pipe2(os.O_CLOEXEC)
    go, go_writer = os.pipe2(os.O_CLOEXEC)
    said = os.memfd_create("veneer-said", os.MFD_CLOEXEC)
    stderr = os.dup(2)
    try:
        follower = _start(means, program, _Gate(ready_writer, go, stderr, said))
    except OSError as error:
        for fd in (ready, go_writer, said):
            os.close(fd)
        return {"error": f"the new mount server cannot be started: {error.strerror}", "again": False}, server
    finally:
        for fd in (ready_writer, go, stderr):
            os.close(fd)
    heir = takeover.Heir(follower.pid, ready, go_writer, said)
    obstacle = heir.obstacle((pidfd,))
    if obstacle is not None:
        heir.dismiss()
        follower.wait()
        why = (
            f"the new mount server cannot start: {obstacle}"
            if obstacle
            else "the mount server ended meanwhile"
        )
        return {"error": why, "again": not obstacle}, server
    _end(server)
    with suppress(BrokenPipeError):
        heir.go()
    heir.close()
    answered = takeover.answers(str(means.target), heir.pidfd)
    os.close(heir.pidfd)
    if answered:
        means.program = program
        return {"version": program.version}, follower
    follower.kill()
    with suppress(subprocess.TimeoutExpired):  # it may not end before another one answers what it has read
        follower.wait(_END_SECONDS)
    return {"error": "the new mount server did not answer the kernel", "again": False}, _start(means)


@contextmanager
def _means(fuse: int, target: Path, settings: Settings, session: str) -> Iterator[_Means]:
    """For the block; after it the mount's descriptor is closed, and no server knows that we are there."""
    from veneer.environment import running
    from veneer.model.program import this_program
    from veneer.mount.succession import Succession

    cache_dir = settings.cache_dir
    cache = os.open(cache_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    brought = os.memfd_create("view")
    os.write(brought, json.dumps(settings.view(session)).encode())
    owner, ours = os.pipe2(os.O_CLOEXEC)
    succession = Succession(fuse)
    max_parked = settings.limits.get("parked-requests")
    listening = running.listen(settings.environments_dir)
    try:
        yield _Means(
            fuse, target, cache, cache_dir, brought, owner, succession, this_program(), listening, max_parked
        )
    finally:
        for fd in (fuse, cache, brought, owner, ours):
            os.close(fd)
        succession.close()
        if listening is not None:
            listening.close()
            listening.remove()


@dataclass(frozen=True, slots=True)
class _Gate:
    """For a server that is to wait: where it says that it could serve, what lets it, its standard error before and after."""

    ready: int
    go: int
    stderr: int
    said: int


def _start(
    means: _Means, program: Program | None = None, gate: _Gate | None = None
) -> subprocess.Popen[bytes]:
    """A mount server's process. OSError. ``program``: another one than ``means`` says."""
    from veneer.mount.succession import FORMATS

    program = program or means.program
    session = means.succession.session
    told = means.succession.writer
    options = {
        "--fuse-fd": means.fuse,
        "--cache-fd": means.cache,
        "--view-file": f"/proc/self/fd/{means.view}",
    }
    options |= {"--owner-fd": means.owner, "--mounted-on": means.target, "--session-fd": told}
    if means.max_parked is not None:
        options["--max-parked"] = means.max_parked
    passed = [means.fuse, means.cache, means.view, means.owner, told]
    if session is not None:
        options["--session"] = json.dumps(session.to_json())
    if gate is not None:
        options |= {"--formats": json.dumps(FORMATS), "--ready-fd": gate.ready, "--go-fd": gate.go}
        options["--stderr-fd"] = gate.stderr
        passed += [gate.ready, gate.go, gate.stderr]
    return subprocess.Popen(
        program.command("veneer.mount", *(str(word) for pair in options.items() for word in pair)),
        stdin=subprocess.DEVNULL,
        stderr=None if gate is None else gate.said,
        env=program.environ(os.environ),
        pass_fds=passed,
        start_new_session=True,
    )


def _end(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
