"""Tables of measurements, as Markdown to paste into docs/benchmarks.md: medians, and ratios to a baseline of the same run."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path


class Table:
    """Rows are kinds of work, columns are ways of doing it; the first column is the baseline of the ratios.

    ``unit`` is shown behind absolute values. Values are added one by one, as often as there are rounds.
    """

    def __init__(self, title: str, columns: list[str], unit: str = "s") -> None:
        self.title = title
        self.columns = columns
        self.unit = unit
        self._values: dict[str, dict[str, list[float]]] = {}
        self._targets: dict[str, dict[str, float]] = {}

    def add(self, work: str, column: str, value: float) -> None:
        if column not in self.columns:
            raise ValueError(f"no column {column!r}")
        self._values.setdefault(work, {}).setdefault(column, []).append(value)

    def target(self, work: str, column: str, ratio: float) -> None:
        """The highest ratio to the baseline that is wanted; shown beside the measured one."""
        self._targets.setdefault(work, {})[column] = ratio

    def median(self, work: str, column: str) -> float | None:
        values = self._values.get(work, {}).get(column)
        return statistics.median(values) if values else None

    def ratio(self, work: str, column: str) -> float | None:
        """To the baseline; None when either was not measured."""
        value, base = self.median(work, column), self.median(work, self.columns[0])
        return value / base if value is not None and base else None

    def missed(self) -> list[str]:
        """Targets that were not reached, one line each."""
        lines = []
        for work, targets in self._targets.items():
            for column, target in targets.items():
                ratio = self.ratio(work, column)
                if ratio is None or ratio > target:
                    shown = "not measured" if ratio is None else f"{ratio:.2f}"
                    lines.append(f"{work}, {column}: {shown}, wanted at most {target:g}")
        return lines

    def markdown(self) -> str:
        rows = [["", *self.columns], ["---"] * (len(self.columns) + 1)]
        rows += [[work, *(self._cell(work, column) for column in self.columns)] for work in self._values]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
            for row in rows
        ]
        rounds = max((len(v) for columns in self._values.values() for v in columns.values()), default=0)
        about = f"Medians of {rounds}; in brackets the ratio to {self.columns[0]} in the same run."
        return "\n".join([f"### {self.title}", "", *lines, "", about, provenance(), ""])

    def _cell(self, work: str, column: str) -> str:
        value = self.median(work, column)
        if value is None:
            return "–"
        shown = f"{significant(value)} {self.unit}"
        ratio = self.ratio(work, column)
        if column != self.columns[0] and ratio is not None:
            target = self._targets.get(work, {}).get(column)
            shown += f" ({ratio:.2f}" + (f", target {target:g}" if target is not None else "") + ")"
        return shown


def significant(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = 0
    while digits < 9 and abs(value) * 10**digits < 100:
        digits += 1
    return f"{value:,.{digits}f}"


def in_turns(
    rounds: int, ways: Mapping[str, Callable[[], float]], record: Callable[[str, float], None]
) -> None:
    """Measure each way once per round, so that a slow moment of the machine meets all; every other round backwards."""
    for number in range(rounds):
        names = list(ways) if number % 2 == 0 else list(ways)[::-1]
        for name in names:
            record(name, ways[name]())


def provenance() -> str:
    """When, where and how this was measured."""
    command = shlex.join(["./dev", "bench", Path(sys.argv[0]).stem, *sys.argv[1:]])
    return f"{datetime.now(UTC):%Y-%m-%d}, {machine()}. `{command}`"


def machine() -> str:
    """Processor, memory, kernel and Python of this machine in one line."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    cpus = len(os.sched_getaffinity(0))
    return f"{model}, {cpus} CPUs, {memory:.0f} GiB, Linux {platform.release()}, Python {platform.python_version()}"
