"""What the user sees: text or one JSON document on stdout, notes and errors on stderr.

Rules: with ``--json``, stdout holds exactly one JSON document when the command succeeds and nothing when it fails; errors
are always on stderr, as JSON when asked. Text that came from a source or a daemon passes ``printable``. Colour only on a
terminal, and never with NO_COLOR set or TERM=dumb.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

from veneer.model.errors import UsageError, VeneerError, printable

_UNITS = "KMGTP"


def parse_size(text: str) -> int:
    """Bytes of ``1000``, ``64K``, ``10G``, ``1.5 GiB`` (powers of 1024, as ls -h). UsageError otherwise."""
    body = text.strip().upper()
    for suffix in ("IB", "B"):
        if body.endswith(suffix):
            body = body[: -len(suffix)]
            break
    factor = 1
    if body and body[-1] in _UNITS:
        factor = 1024 ** (_UNITS.index(body[-1]) + 1)
        body = body[:-1]
    number = body.strip()
    if not number.replace(".", "", 1).isascii() or not number.replace(".", "", 1).isdigit():
        raise UsageError(
            f"not a size: {printable(text)!r}", hint="write bytes, or a number with K, M, G or T: 10G"
        )
    return int(float(number) * factor) if "." in number else int(number) * factor


def format_size(size: int) -> str:
    """``1.5 MiB``: powers of 1024, three digits at most."""
    if size < 1024:
        return f"{size} B"
    value = float(size)
    unit = ""
    for unit in _UNITS:
        value /= 1024
        if value < 999.5 or unit == _UNITS[-1]:
            break
    return f"{value:.1f} {unit}iB" if value < 99.95 else f"{value:.0f} {unit}iB"


def format_seconds(seconds: float) -> str:
    """``0.42 s``, ``12.3 s``, ``3 min 5 s``."""
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 119.95:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def number(document: Mapping[str, object], key: str) -> int:
    """An integer of a daemon's answer; 0 when it is not there."""
    value = document.get(key)
    return value if isinstance(value, int) else 0


def count(number: int, singular: str, plural: str = "") -> str:
    """``1 path``, ``3 paths``."""
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), right: Sequence[int] = ()) -> str:
    """Aligned columns, two spaces between; columns whose numbers stand in ``right`` are right-aligned."""
    lines = ([list(header)] if header else []) + [[printable(cell) for cell in row] for row in rows]
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def error_document(error: VeneerError, exit_code: int | None = None) -> dict[str, object]:
    """What ``--json`` prints for an error."""
    return {
        "error": {
            "kind": type(error).__name__,
            "what": printable(error.what),
            "where": printable(error.where),
            "hint": printable(error.hint),
            "exit_code": error.exit_code if exit_code is None else exit_code,
        }
    }


Advance = Callable[[Mapping[str, object]], None]
"""Told each PROGRESS document: paths_done, paths, bytes_done, bytes (any may be missing)."""


@dataclass(slots=True)
class Output:
    """Where a command prints. ``json``, ``quiet``: as the flags said."""

    json: bool = False
    quiet: bool = False
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    stderr: TextIO = field(default_factory=lambda: sys.stderr)
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def result(self, text: str, document: object) -> None:
        """The command's answer, in the form that was asked for. Empty text prints nothing."""
        if self.json:
            self.stdout.write(json.dumps(document, indent=2) + "\n")
        elif text:
            self.stdout.write(text + "\n")
        self.stdout.flush()

    def note(self, text: str) -> None:
        """A line for people, on stderr; silent with --quiet and --json."""
        if not self.quiet and not self.json:
            self.stderr.write(self.colored(f"veneer: {text}", "2") + "\n")
            self.stderr.flush()

    def warning(self, text: str) -> None:
        """Something went wrong and work goes on: a line on stderr, also with --quiet; with --json it is in the document."""
        if not self.json:
            self.stderr.write(f"{self.colored('veneer: warning:', '33')} {printable(text)}\n")
            self.stderr.flush()

    def error(self, error: VeneerError, exit_code: int | None = None) -> None:
        """What, where and hint; ``exit_code``: when it is not the class's own."""
        if self.json:
            self.stderr.write(json.dumps(error_document(error, exit_code)) + "\n")
        else:
            what = error.story()
            hint = f"\n{self.colored('hint:', '36')} {printable(error.hint)}" if error.hint else ""
            self.stderr.write(f"{self.colored('veneer: error:', '1;31')} {what}{hint}\n")
        self.stderr.flush()

    def colored(self, text: str, code: str) -> str:
        """``text`` in an SGR colour, where stderr takes it."""
        return f"\x1b[{code}m{text}\x1b[0m" if self._terminal(self.stderr) and self._color() else text

    def _color(self) -> bool:
        return not self.environ.get("NO_COLOR") and self.environ.get("TERM", "") != "dumb"

    @staticmethod
    def _terminal(stream: TextIO) -> bool:
        return stream.isatty()

    @contextmanager
    def progress(self, title: str) -> Iterator[Advance]:
        """A progress bar on stderr while the block runs, when it is a terminal and nobody asked for silence."""
        if self.quiet or self.json or not self._terminal(self.stderr):
            yield lambda _: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TextColumn("{task.fields[paths]}"),
        )
        console = Console(file=self.stderr, no_color=not self._color(), _environ=self.environ)
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(title, total=None, paths="")

            def advance(document: Mapping[str, object]) -> None:
                done, total = number(document, "bytes_done"), number(document, "bytes")
                paths = f"{number(document, 'paths_done')}/{number(document, 'paths')} paths"
                paths = paths if "paths" in document else ""
                bar.update(task, completed=done, total=total or None, paths=paths)

            yield advance
