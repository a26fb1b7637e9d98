"""``veneer upgrade``: this version of the program takes over what runs.

First the mounts, whose keepers then know which daemon to start; then the daemons, which end and are started again by whoever
needs them. A reader waits meanwhile, for milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import click

from veneer.cli.config import Flags, Settings
from veneer.cli.options import json_option, quiet_option, settings_flags
from veneer.cli.output import Output
from veneer.model.errors import CacheError, DaemonError, UsageError, VeneerError

if TYPE_CHECKING:
    from veneer.environment.running import About
    from veneer.model.program import Program

ANSWER_SECONDS = 60.0
ATTEMPTS = 5
"""When a mount server dies on the way."""
DAEMON_SECONDS = 20.0
"""How long whoever needs a daemon may take to start the new one."""
_PAUSE = 0.05
"""Between two looks for a daemon that another process starts, up to a deadline."""
_USER_VERSION = slice(60, 64)
"""Of an SQLite file: the version of the cache's schema."""

State = Literal["upgraded", "current", "refused", "left", "none"]


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "also_current", is_flag=True, help="Also what is of this version already.")
@settings_flags(sources=False)
@quiet_option("Say nothing when all is well.")
@json_option()
@click.pass_obj
def upgrade(output: Output, flags: Flags, names: tuple[str, ...], also_current: bool) -> int:
    """Have this version of veneer take over what runs.

    Without NAME: all environments, mounts and private daemons of this user. Readers wait for milliseconds and notice nothing. A version that cannot
    serve what runs is refused, and the old one goes on; then the exit status is 1.

    \b
    Examples:
      veneer upgrade
      veneer upgrade dev
    """
    from veneer.cli.config import load_settings
    from veneer.environment import running
    from veneer.model.program import this_program

    settings = load_settings(flags)
    program = this_program()
    found = running.find(settings.environments_dir)
    wanted = [about for about in found if not names or about.name in names]
    for name in names:
        if not any(about.name == name for about in wanted):
            raise UsageError(f"the environment {name} is not up", hint="veneer ls lists them")
    rows = [_take_over(about, program, also_current) for about in wanted]
    caches = {Path(about.cache_root) for about in wanted}
    if not names:
        caches.add(settings.cache_dir)
    daemons = [
        _restart(replace(settings, cache_dir=cache), program, found, also_current) for cache in sorted(caches)
    ]
    daemons = [row for row in daemons if row["state"] != "none"]
    _show(output, program.version, rows, daemons)
    return int(any(row["state"] == "refused" for row in (*rows, *daemons)))


def _take_over(about: About, program: Program, also_current: bool) -> dict[str, Any]:
    from veneer.environment import running

    row = {
        "name": about.name,
        "kind": about.kind,
        "place": about.place,
        "label": about.label,
        "pid": about.pid,
        "before": about.version,
        "version": about.version,
    }
    if about.version == program.version and not also_current:
        return {**row, "state": "current"}
    why = ""
    for _ in range(ATTEMPTS):
        try:
            answer = running.upgrade(about, program, ANSWER_SECONDS)
        except (OSError, ValueError) as error:
            return {**row, "state": "refused", "why": f"it does not answer: {error}"}
        if "version" in answer:
            return {**row, "state": "upgraded", "version": answer["version"]}
        why = str(answer.get("error"))
        if not answer.get("again"):
            break
    return {**row, "state": "refused", "why": why}


def _restart(
    settings: Settings, program: Program, found: Iterable[About], also_current: bool
) -> dict[str, Any]:
    """The daemon of one cache directory: it ends, and those who need it start the new one."""
    from veneer.formats import request_wire

    row: dict[str, Any] = {"cache": str(settings.cache_dir)}
    try:
        status = _daemon(settings)
        if status is None:
            return {**row, "state": "none"}
        before = status.get("version")
        row |= {"pid": status["pid"], "before": before, "version": before}
        users = [about for about in found if Path(about.cache_root) == settings.cache_dir]
        if before == program.version and not also_current:
            _announce(users, program)
            return {**row, "state": "current"}
        if not status.get("private"):
            why = "it is not a private one: restart it as it was started, readers wait meanwhile"
            return {**row, "state": "left", "why": why}
        old = [about.label for about in users if about.wire != request_wire.VERSION]
        if old:
            return {
                **row,
                "state": "refused",
                "why": f"its protocol is another one than that of {', '.join(old)}",
            }
        _prove(settings)
        _announce(users, program)
        return {**row, **_end_and_wait(settings, status, program)}
    except VeneerError as error:
        return {**row, "state": "refused", "why": error.story()}


def _announce(users: Iterable[About], program: Program) -> None:
    from veneer.environment import running

    for about in users:
        with suppress(OSError, ValueError):  # it has just ended
            running.adopt(about, program)


def _daemon(settings: Settings) -> dict[str, Any] | None:
    """The status of the daemon that runs; None when none does."""
    from veneer.cli.client import connect

    client = connect(settings.cache_dir, None)
    if client is None:
        return None
    with client:
        return client.control("status", seconds=ANSWER_SECONDS)


def _prove(settings: Settings) -> None:
    """This program's daemon starts, and understands the cache. VeneerError says why not."""
    from veneer.cache.migrations import SCHEMA_VERSION
    from veneer.cli.private_daemon import START_SECONDS, start

    schema = _schema(settings.cache_dir)
    if schema > SCHEMA_VERSION:
        raise CacheError(
            f"the cache has schema {schema}, this version knows {SCHEMA_VERSION}",
            where=str(settings.cache_dir),
        )
    with TemporaryDirectory(prefix="veneer-") as empty:
        daemon = start(replace(settings, cache_dir=Path(empty) / "cache"))
        try:
            daemon.client.greet(START_SECONDS)
        except DaemonError as lost:
            raise daemon.end() or lost from lost
        failure = daemon.end()
        if daemon.process.returncode:
            raise failure or DaemonError("the store daemon does not end after its last client has left")


def _schema(cache_dir: Path) -> int:
    """0 when it cannot be told."""
    from veneer.cache.directory import INDEX

    try:
        with open(cache_dir / INDEX, "rb") as file:
            return int.from_bytes(file.read(100)[_USER_VERSION], "big")
    except OSError:
        return 0


def _end_and_wait(settings: Settings, status: dict[str, Any], program: Program) -> dict[str, Any]:
    from veneer.cli.client import connect

    client = connect(settings.cache_dir, None)
    if client is not None:
        with client:
            client.control("stop", seconds=ANSWER_SECONDS)
    needed = len(status.get("connections", ())) > 1  # one was ours
    deadline = time.monotonic() + (DAEMON_SECONDS if needed else 0)
    while time.monotonic() < deadline:
        try:
            now = _daemon(settings)
        except DaemonError:  # it is ending
            now = None
        if now is not None and now["pid"] != status["pid"]:
            done = now.get("version") == program.version
            return {
                "state": "upgraded" if done else "refused",
                "version": now.get("version"),
                "pid": now["pid"],
                **({} if done else {"why": "it was started again by a process of the version before"}),
            }
        time.sleep(_PAUSE)
    return {"state": "upgraded", "version": None}  # nobody needs one now


def _show(output: Output, version: str, rows: list[dict[str, Any]], daemons: list[dict[str, Any]]) -> None:
    if output.json:
        output.result("", {"version": version, "running": rows, "daemons": daemons})
        return
    for row in (*rows, *daemons):
        label = row.get("label") or f"daemon of {row['cache']}"
        if row["state"] == "upgraded":
            output.note(
                f"{label}: {row['before'] or 'an older version'} -> {row['version'] or 'ended; nobody needs it'}"
            )
        elif row["state"] == "current":
            output.note(f"{label}: is of version {row['version']} already")
        else:
            output.warning(f"{label}: goes on as version {row['before']}: {row['why']}")
    if not rows and not daemons:
        output.note("nothing runs")
