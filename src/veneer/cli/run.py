"""``veneer run``: a command with the whole of the binary caches under /nix/store.

The slow half of starting (the daemon: sources, cryptography, the index) goes on in parallel and nobody waits for it
unless something is missing from the cache; this module imports none of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from veneer.cli.client import Client, connect
from veneer.cli.config import Flags, Settings, load_settings
from veneer.cli.enter import has_sources_of, join, shell_or
from veneer.cli.nix import NixFlags, nix_flags, nix_spec, with_host_store
from veneer.cli.options import json_option, named_in, quiet_option, roots_in, settings_flags
from veneer.cli.output import Output
from veneer.cli.private_daemon import WatchedDaemon, make_cache_dir
from veneer.cli.run_report import closing_line, combine, touched, troubles
from veneer.model.errors import VeneerError
from veneer.model.store_path import DEFAULT_STORE_DIR

if TYPE_CHECKING:
    from veneer.environment import Companion, Living
    from veneer.formats.trace import Trace

NAMED_BYTES = 64 << 10
"""Of names of store paths that the daemon is told of: what fits into its socket while it does not read yet."""
FIGURES_SECONDS = 5.0
"""How long the closing figures may take; without them the line says less."""


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND [ARG...]]")
@settings_flags(max_size=True)
@click.option(
    "--name", metavar="ENV", help="Keep what is written to the store, under this name [default: dropped]."
)
@click.option("--report", metavar="FILE", help="Write what was touched and fetched, per store path, as JSON.")
@click.option(
    "--patience",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a read waits for missing content that does not get on before it fails.",
)
@click.option(
    "--trace",
    metavar="FILE",
    help="Write what was read, in order, for --prefetch and `veneer fetch --trace`.",
)
@click.option("--prefetch", "ahead", metavar="FILE", help="Load what this trace tells, beside the command.")
@nix_flags
@quiet_option("No closing line.")
@json_option("The closing figures, and errors, as JSON on stderr; stdout is the command's.")
@click.pass_obj
def run(
    output: Output,
    flags: Flags,
    command: tuple[str, ...],
    name: str | None,
    report: str | None,
    patience: float,
    trace: str | None,
    ahead: str | None,
    nix: NixFlags,
) -> int:
    """Run a command with the whole of your binary caches under /nix/store.

    Every store path of the caches is there at once; bytes are fetched, verified and kept when something reads them.
    Without COMMAND: your shell. Options of veneer stand before COMMAND. Its status is passed on, its death by a signal
    too; 125 is a failure of veneer's own. Commands with one name run in one environment, also at the same time.

    \b
    Examples:
      veneer run --cache https://cache.example.org -- /nix/store/…-hello/bin/hello
      veneer run --name dev
    """
    settings = with_host_store(load_settings(flags), nix)
    words = shell_or(command)
    # A named environment is not begun for a trace that cannot be read; else it is read while the daemon starts.
    brought = None if ahead is None or name is None else read_trace(ahead)
    layer = None
    if name is not None:
        from veneer import environment

        claimed = environment.claim(settings.environments_dir, name)
        if isinstance(claimed, environment.Living):
            return _join(output, settings, claimed, words, report, trace, brought)
        layer = claimed
    session = os.urandom(8).hex()
    make_cache_dir(settings.cache_dir)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(
            contextlib.closing(WatchedDaemon(settings, session, output, nix=nix.wanted))
        )
        # All of this while the daemon starts.
        companion: Companion = daemon
        if ahead is not None:
            companion = prefetching(daemon, brought or read_trace(ahead), words)
        else:
            _announce(daemon.client, words)
        from veneer import environment

        notes = None
        if trace is not None:
            from veneer.cli.recording import recorded

            notes = stack.enter_context(recorded(trace, settings.cache_dir, lambda: daemon.client, output))
        outcome = environment.run(
            environment.RunSpec(
                command=tuple(words),
                cache_root=settings.cache_dir,
                view=settings.view(session),
                environments_root=settings.environments_dir,
                miss_seconds=patience,
                max_parked=settings.limits.get("parked-requests"),
                environ=os.environ,
                cwd=str(Path.cwd()),
                name=name,
                notes=notes,
                nix=nix_spec(nix, daemon, settings.cache_dir, output),
            ),
            warn=output.warning,
            companion=companion,
            layer=layer,
        )
        wants_all = report is not None or output.json
        figures = None
        if wants_all or not output.quiet:
            figures = _figures(daemon.client, outcome.report, output, wants_all=wants_all)
    document = combine(words, outcome.status, time.monotonic() - began, outcome.report, figures)
    if report is not None:
        _write_report(report, document)
    if output.json:
        output.stderr.write(json.dumps(document) + "\n")
    else:
        for line in troubles(outcome.report):
            output.warning(line)
        output.note(closing_line(document))
    return end_as(outcome.status, outcome.signal)


def _announce(client: Client, words: Sequence[str]) -> None:
    """Tell the daemon what the command names, as far as the machine does not have it. Does not wait."""
    named = [name for name in named_in(words) if not os.path.lexists(f"{DEFAULT_STORE_DIR}/{name}")]
    room = NAMED_BYTES
    fitting = [name for name in named if (room := room - len(name) - 4) >= 0]
    if fitting:
        with contextlib.suppress(
            VeneerError
        ):  # it has gone; whoever follows it is asked by the command itself
            client.tell("look-up", {"paths": fitting})


def read_trace(file: str) -> Trace:
    """The trace to prefetch. UsageError, FormatError."""
    from veneer.cli.recording import read  # with what few runs need

    return read(file)


def prefetching(daemon: WatchedDaemon, trace: Trace, words: Sequence[str]) -> Companion:
    """The daemon, which loads what a trace tells from now on. Does not wait."""
    from veneer.cli.recording import Prefetching, request

    return Prefetching(daemon, request(trace, roots_in(words))).begin()


def _join(
    output: Output,
    settings: Settings,
    living: Living,
    words: list[str],
    report: str | None,
    trace: str | None,
    brought: Trace | None,
) -> int:
    """The command in an environment that another one owns, whose figures these are."""
    if not has_sources_of(settings, living):
        output.warning(f"the environment {living.name} is up with other sources or settings: those count")
    if report is not None:
        output.warning(f"no report: the environment {living.name} belongs to another command, which counts")
    if trace is not None:
        output.warning(
            f"no trace: the environment {living.name} belongs to another command; its own has what all of them read"
        )
    with contextlib.ExitStack() as stack:
        if brought is not None:
            from veneer.cli.recording import request

            client = connect(settings.cache_dir, settings.view(os.urandom(8).hex()))
            if client is not None:
                stack.enter_context(client).tell("prefetch", request(brought, roots_in(words)))
        outcome = join(output, settings, living, words, leaves=False)
    return end_as(outcome.status, outcome.signal)


def _figures(
    client: Client, mount: Mapping[str, object], output: Output, *, wants_all: bool
) -> dict[str, object] | None:
    """The daemon's account of this run; None when nothing was touched or it cannot tell.

    ``wants_all``: of the whole closure, however long its paths have to be asked for; the line for people does without.
    """
    names = touched(mount)
    if not names:
        return None
    try:
        closure = {}
        if wants_all:
            with contextlib.suppress(VeneerError):  # of a closure with a hole, what is known counts
                closure = _closure_figures(
                    client.control("closure", {"paths": names}, seconds=FIGURES_SECONDS)
                )
        return {**client.control("report", seconds=FIGURES_SECONDS), **closure}
    except VeneerError as error:
        output.note(f"no figures from the daemon: {error.story()}")
        return None


def _closure_figures(closure: Mapping[str, object]) -> dict[str, object]:
    """As in the daemon's report."""
    rows = closure.get("paths")
    return {
        "closure_paths": len(rows) if isinstance(rows, list) else None,
        "closure_bytes": closure.get("nar_size"),
    }


def _write_report(name: str, document: Mapping[str, object]) -> None:
    try:
        Path(name).write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise VeneerError(f"cannot write the report: {error.strerror}", where=name) from error


def end_as(status: int, number: int) -> int:
    """The status to exit with; for a command that died by a signal, die by it."""
    if not number:
        return status
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the command has dumped already
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    sys.stdout.flush()
    os.kill(os.getpid(), number)
    return status  # a signal that does not end a process
