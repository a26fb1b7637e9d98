"""``veneer up``: an environment in the background.

A process of its own session holds it, as ``run`` would: it starts the daemon, has the mounts made, and waits. It runs no
command. Its messages go to ``log`` beside the writable layer; those of its start come here.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from veneer.cli.config import Flags, Settings
from veneer.cli.nix import NixFlags, nix_flags, nix_spec, with_host_store
from veneer.cli.options import json_option, quiet_option, settings_flags
from veneer.cli.output import Output
from veneer.model.errors import UsageError, VeneerError, printable

if TYPE_CHECKING:
    from veneer.environment import Living
    from veneer.environment.channel import Channel
    from veneer.formats.trace import Trace

LOG = "log"


@click.command()
@click.argument("name", metavar="NAME")
@settings_flags(max_size=True)
@click.option(
    "--patience",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a read waits for missing content that does not get on before it fails.",
)
@click.option("--trace", metavar="FILE", help="Write what was read, in order, when the environment ends.")
@click.option("--prefetch", "ahead", metavar="FILE", help="Load what this trace tells.")
@nix_flags
@quiet_option("Say nothing when all is well.")
@json_option("Errors as JSON.")
@click.pass_obj
def up(
    output: Output,
    flags: Flags,
    name: str,
    patience: float,
    trace: str | None,
    ahead: str | None,
    nix: NixFlags,
) -> int:
    """Start an environment that stays until `veneer down`.

    Returns when it can be entered. Later `veneer enter NAME` and `veneer run --name NAME` run commands in it, as many at a
    time as you like. What an earlier environment of this name kept is there again.

    \b
    Example:
      veneer up dev --cache https://cache.example.org
    """
    from veneer import environment
    from veneer.cli.config import load_settings
    from veneer.cli.run import read_trace
    from veneer.environment.channel import Channel, failure

    brought = None if ahead is None else read_trace(ahead)
    trace = None if trace is None else str(Path(trace).absolute())
    settings = with_host_store(load_settings(flags), nix)
    living = environment.attach(settings.environments_dir, name)
    if living is not None:
        return _is_up_already(output, settings, living)
    channel, theirs = Channel.pair()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        channel.close()
        _leave_session(_Held(settings, name, patience, nix, trace, brought), theirs, output)
    theirs.close()
    os.waitpid(pid, 0)
    while (message := channel.receive()) is not None:
        if message.kind == "warning":
            output.warning(message.fields["text"])
        elif message.kind == "failed":
            raise failure(message)
        else:
            output.note(f"{name} is up; veneer enter {name}, and veneer down {name} to end it")
            return 0
    log = settings.environments_dir / name / LOG
    raise VeneerError("the environment ended before it was up", where=str(log))


def _is_up_already(output: Output, settings: Settings, living: Living) -> int:
    from veneer.cli.enter import has_sources_of

    same = has_sources_of(settings, living)
    living.close()
    if not same:
        raise UsageError(
            f"{living.name} is up already, with other sources or settings",
            hint=f"veneer down --keep {living.name} ends it and keeps what was written",
        )
    output.note(f"{living.name} is up already; veneer enter {living.name}")
    return 0


@dataclass(frozen=True, slots=True)
class _Held:
    """What is to be held. ``trace``: where to write one; ``brought``: the one to prefetch."""

    settings: Settings
    name: str
    patience: float
    nix: NixFlags
    trace: str | None
    brought: Trace | None


def _leave_session(held: _Held, channel: Channel, output: Output) -> NoReturn:
    """The fork: its own child, in a new session, holds the environment."""
    try:
        os.setsid()
        if os.fork() == 0:
            _hold(held, channel, output)
    except VeneerError as error:
        channel.send_failure(error)
    except BaseException as error:  # noqa: BLE001 - the process ends here; its starter raises it
        with contextlib.suppress(OSError):
            channel.send_failure(VeneerError(printable(f"{type(error).__name__}: {error}"), where="up"))
        output.warning(f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)


def _hold(held: _Held, channel: Channel, output: Output) -> None:
    from veneer import environment
    from veneer.cli.private_daemon import WatchedDaemon, make_cache_dir
    from veneer.cli.run import prefetching

    settings, name, nix = held.settings, held.name, held.nix
    claimed = environment.claim(settings.environments_dir, name)
    if isinstance(claimed, environment.Living):
        raise UsageError(f"{name} was brought up by somebody else meanwhile", hint=f"veneer enter {name}")
    _redirect(claimed.directory / LOG)
    started = False

    def tell(text: str) -> None:
        if started:
            output.warning(text)
        else:
            channel.send("warning", text=text)

    def ready() -> None:
        nonlocal started
        channel.send("ready")
        channel.close()
        started = True

    make_cache_dir(settings.cache_dir)
    session = os.urandom(8).hex()
    try:
        with contextlib.ExitStack() as stack:
            daemon = WatchedDaemon(settings, session, output, nix=nix.wanted)
            stack.callback(daemon.close)
            notes = None
            if held.trace is not None:
                from veneer.cli.recording import recorded

                notes = stack.enter_context(
                    recorded(held.trace, settings.cache_dir, lambda: daemon.client, output)
                )
            environment.run(
                environment.RunSpec(
                    command=(),
                    cache_root=settings.cache_dir,
                    view=settings.view(session),
                    environments_root=settings.environments_dir,
                    miss_seconds=held.patience,
                    max_parked=settings.limits.get("parked-requests"),
                    environ=os.environ,
                    cwd="/",
                    name=name,
                    notes=notes,
                    nix=nix_spec(nix, daemon, settings.cache_dir, output),
                ),
                warn=tell,
                companion=daemon if held.brought is None else prefetching(daemon, held.brought, ()),
                layer=claimed,
                ready=ready,
            )
    except VeneerError as error:
        if not started:
            raise
        output.error(error)


def _redirect(log: Path) -> None:
    """Standard streams to the log, and no directory of the caller's kept busy."""
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDONLY)
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    os.dup2(null, 0)
    os.dup2(written, 1)
    os.dup2(written, 2)
    for fd in (null, written):
        if fd > 2:
            os.close(fd)
