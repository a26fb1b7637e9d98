"""``veneer cache``: look after the cache directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from veneer.cli.config import Flags, Settings
from veneer.cli.options import json_option, quiet_option, settings_flags
from veneer.cli.output import Advance, Output
from veneer.model.errors import CacheError, CacheInUseError

if TYPE_CHECKING:
    from pathlib import Path

FOUND = 1
"""Exit status when something was wrong, dropped or not."""
_ATTEMPTS = 5


@click.group()
def cache() -> None:
    """Check everything in the cache, and drop what is not right.

    \b
    Example:
      veneer cache verify
    """


@cache.command()
@click.option("--dry-run", is_flag=True, help="Only show what is wrong.")
@settings_flags(sources=False)
@quiet_option("No progress bar.")
@json_option()
@click.pass_obj
def verify(output: Output, flags: Flags, dry_run: bool) -> int:
    """Read the whole cache and compare it with what was signed.

    Every NAR is hashed, every tree compared with its digest, the index checked, and files that nothing wants are found.
    What is wrong is dropped and fetched again when it is wanted. A running daemon does it while it serves; without one,
    the cache is held meanwhile and a run that starts has to wait. The status is 0 when all is well and 1 when not.

    \b
    Example:
      veneer cache verify --dry-run
    """
    from veneer.cli.config import load_settings

    settings = load_settings(flags)
    with output.progress("checking") as advance:
        report = _checked(settings, dry_run, advance)
    output.result(_text(report, dry_run), report)
    return FOUND if report.get("found") else 0


def _checked(settings: Settings, dry_run: bool, advance: Advance) -> Mapping[str, object]:
    """The report of the running daemon, or of our own check where none runs."""
    from veneer.cli.client import connect

    for attempt in range(_ATTEMPTS):
        client = connect(settings.cache_dir, settings.view())
        if client is not None:
            with client:
                return client.control("verify", {"dry_run": dry_run}, advance)
        try:
            return _alone(settings.cache_dir, dry_run, advance)
        except CacheInUseError:  # one that starts or ends just now
            if attempt == _ATTEMPTS - 1:
                raise
            from veneer.cache.directory import wait_until_free

            wait_until_free(settings.cache_dir, 1.0)
    raise AssertionError


def _alone(root: Path, dry_run: bool, advance: Advance) -> Mapping[str, object]:
    import time

    from veneer.cache.checking import check_alone
    from veneer.cache.directory import INDEX

    if not (root / INDEX).exists():
        raise CacheError("there is no cache", where=str(root), hint="name it: --cache-dir DIR")

    def progress(done: int, total: int) -> None:
        advance({"bytes_done": done, "bytes": total})

    return check_alone(root, drop=not dry_run, clock=time.time, progress=progress).document()


def _text(report: Mapping[str, object], dry_run: bool) -> str:
    from veneer.cli.output import count, format_size, number, table

    checked, findings = report.get("checked"), report.get("findings")
    assert isinstance(checked, dict) and isinstance(findings, list)
    lines = []
    if findings:
        rows = [
            (str(row["path"] or row["file"]), str(row["kind"]), str(row["fault"]), str(row["reason"]))
            for row in findings
        ]
        lines.append(table(rows))
    more = number(report, "found") - len(findings)
    if more > 0:
        lines.append(f"… and {more} more")
    looked = (
        f"checked {count(number(checked, 'nars'), 'NAR')}, {count(number(checked, 'trees'), 'tree')}"
        f" and {count(number(checked, 'files'), 'file')}, {format_size(number(checked, 'bytes'))}"
    )
    found, dropped = number(report, "found"), number(report, "dropped")
    if not found:
        return f"{looked}: all is well"
    said = f"{looked}: {count(found, 'fault')}"
    if report.get("index") == "damaged":
        ending = (
            "the index was begun anew, and all content is fetched again when it is wanted"
            if dropped
            else "everything would be dropped"
            if dry_run
            else "restart the daemon: it begins a new index"
        )
    elif dry_run:
        ending = "nothing was dropped"
    else:
        ending = f"dropped {dropped}, {format_size(number(report, 'freed'))}; fetched again when wanted"
    return "\n".join((*lines, f"{said}; {ending}"))
