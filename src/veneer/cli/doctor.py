"""``veneer doctor``: what is wrong, why it matters, the exact fix."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from veneer.cli.config import Flags
from veneer.cli.options import json_option, settings_flags, store_path_arguments
from veneer.cli.output import Output, count
from veneer.model.errors import DaemonError, VeneerError, printable

if TYPE_CHECKING:
    from veneer.cli.config import Settings
    from veneer.doctor.finding import Finding, Subject

T = TypeVar("T")
_SECONDS = 8.0
_MARKS = {"ok": ("✔", "32"), "warning": ("!", "33"), "failed": ("✘", "31"), "skipped": ("-", "2")}


@click.command()
@click.argument("paths", metavar="[PATH]...", nargs=-1)
@settings_flags()
@click.option(
    "--source",
    "only",
    metavar="URL",
    multiple=True,
    help="Look at this source instead of the configured ones.",
)
@json_option()
@click.pass_obj
def doctor(output: Output, flags: Flags, paths: tuple[str, ...], only: tuple[str, ...]) -> int:
    """Find what is wrong with the machine, the sources or Nix, and the fix.

    Says of each thing why it matters and how to mend it. Changes nothing. Store paths given as arguments are
    looked for at every source. Exit status 0 when no check failed, else 1.

    \b
    Example:
      veneer doctor --source https://cache.example.org
    """
    from veneer.doctor.checks import examine, worst

    findings = list(examine(_subject(flags, only, paths)))
    document = {"worst": worst(findings), "findings": [asdict(finding) for finding in findings]}
    output.result(render(findings, output), document)
    return 1 if worst(findings) == "failed" else 0


def render(findings: Sequence[Finding], output: Output) -> str:
    """Failures with their fixes first, then warnings, then everything in its group."""
    mark = _marker(output)
    lines = []
    for state in ("failed", "warning"):
        for finding in findings:
            if finding.state == state:
                lines.append(f"{mark(state)} {finding.name}: {printable(finding.what)}")
                lines.append(f"    why: {finding.why}")
                lines += [f"    fix: {printable(finding.fix)}"] if finding.fix else []
    lines += [""] if lines else []
    for group in dict.fromkeys(finding.group for finding in findings):
        lines.append(group)
        shown = [finding for finding in findings if finding.group == group]
        width = max(len(finding.name) for finding in shown)
        lines += (f"  {mark(f.state)} {f.name.ljust(width)}  {printable(f.what)}" for f in shown)
    failed = sum(finding.state == "failed" for finding in findings)
    warned = sum(finding.state == "warning" for finding in findings)
    lines += ["", f"{count(failed, 'failure')}, {count(warned, 'warning')}"]
    return "\n".join(lines)


def _marker(output: Output) -> Callable[[str], str]:
    encoding = (getattr(output.stdout, "encoding", "") or "").lower().replace("-", "")
    terminal = output.stdout.isatty()
    colored = terminal and not output.environ.get("NO_COLOR") and output.environ.get("TERM", "") != "dumb"

    def mark(state: str) -> str:
        sign, code = _MARKS[state]
        if not (terminal and encoding == "utf8"):
            sign = {"failed": "FAILED ", "warning": "warning", "ok": "ok     ", "skipped": "skipped"}[state]
        return f"\x1b[{code}m{sign}\x1b[0m" if colored else sign

    return mark


def _subject(flags: Flags, only: tuple[str, ...], paths: tuple[str, ...]) -> Subject:
    from veneer.cli.config import load_settings, nix_values, source_url
    from veneer.doctor.finding import Subject
    from veneer.model.store_path import StorePath

    settings = load_settings(flags)
    nix, nix_error = {}, ""
    try:
        nix = nix_values(os.environ)
    except VeneerError as error:
        nix_error = error.story()
    lock = threading.Lock()
    return Subject(
        environ=os.environ,
        uid=os.geteuid(),
        cache_dir=settings.cache_dir,
        environments_dir=settings.environments_dir,
        max_bytes=settings.max_bytes,
        sources=tuple(map(source_url, only)) or tuple(source.url for source in settings.sources),
        keys=settings.keys,
        require_signatures=settings.require_signatures,
        netrc=Path(settings.netrc) if settings.netrc else None,
        ca_file=Path(settings.ca_file) if settings.ca_file else None,
        nix=nix,
        nix_error=nix_error,
        status=_once(lambda: _control(settings, "status"), lock),
        memory=lambda names: _memory(settings, names),
        paths=tuple(StorePath.parse(name) for name in store_path_arguments(paths)),
        borrowed=settings.borrowed,
    )


def _once(ask: Callable[[], T], lock: threading.Lock) -> Callable[[], T]:
    """Several checks want the same answer, at the same time."""
    kept = functools.cache(ask)

    def asked() -> T:
        with lock:
            return kept()

    return asked


def _control(settings: Settings, verb: str, **arguments: object) -> dict[str, object] | None:
    """The running daemon's answer; None when none runs."""
    from veneer.cli.client import connect

    client = connect(settings.cache_dir, settings.view())
    if client is None:
        return None
    with client:
        return client.control(verb, arguments, seconds=_SECONDS)


def _memory(settings: Settings, names: list[str]) -> dict[str, dict[str, str]]:
    answer = _control(settings, "remembered", paths=names)
    if answer is None:
        raise DaemonError("no daemon runs")
    found = answer.get("paths")
    return found if isinstance(found, dict) else {}
