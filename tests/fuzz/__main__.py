"""Coverage-guided fuzzing of the codecs: ``./dev fuzz [--seconds N] [TARGET...]``.

Each target runs under libFuzzer (atheris) in a process of its own, with limits of time and memory per input, one after
the other. What it learns is kept in .dev/fuzz/TARGET for the next time. A finding is printed with its traceback and input, and
ends with status 1; the input belongs into a unit test, with the repair.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.targets import TARGETS, corpus_file, kept
from tests.support.places import ROOT, own_directory

SECONDS_PER_INPUT = 10
MEGABYTES = 1024
KEPT = 60
KEPT_LENGTH = 700
"""Inputs that ``--keep`` stores for the short run of every day: so many, the shortest first, no longer than this."""

_COVERED = re.compile(r"cov: (\d+)")
_EXECUTED = re.compile(r"stat::number_of_executed_units: (\d+)")
_NOISE = re.compile(r"#\d+\s|INFO: |WARNING: |stat::|\s*$")
_PEAK = re.compile(r"stat::peak_rss_mb: +(\d+)")


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one run. ``edges``: counted by libFuzzer in instrumented Python. ``finding``: the end of its output, or ""."""

    executions: int
    edges: int
    megabytes: int
    inputs: int
    finding: str


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--keep", action="store_true", help="store what was learnt in tests/fuzz/corpus")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of: {', '.join(TARGETS)}")
    args = parser.parse_args()
    unknown = set(args.targets) - TARGETS.keys()
    if unknown:
        parser.error(f"no target {', '.join(sorted(unknown))}; there are: {', '.join(TARGETS)}")
    place = own_directory() / "fuzz"
    found = 0
    print(
        f"{'target':14} {'executions':>11} {'per s':>7} {'edges':>6} {'inputs':>6} {'MB':>5}  finding",
        flush=True,
    )
    for name in args.targets or TARGETS:
        figures = fuzz(name, place / name, args.seconds)
        speed = figures.executions // max(1, args.seconds)
        columns = (
            f"{figures.executions:11} {speed:7} {figures.edges:6} {figures.inputs:6} {figures.megabytes:5}"
        )
        print(f"{name:14} {columns}  {'see below' if figures.finding else 'none'}", flush=True)
        if figures.finding:
            found += 1
            print(figures.finding, flush=True)
        if args.keep:
            keep(name, place / name)
    return 1 if found else 0


def fuzz(name: str, place: Path, seconds: int) -> Figures:
    """Run one target for some seconds. Its corpus: seeds, the stored inputs, and what earlier runs learnt."""
    corpus, findings = place / "corpus", place / "findings"
    for directory in (corpus, findings):
        directory.mkdir(parents=True, exist_ok=True)
    target = TARGETS[name]
    for number, data in enumerate([*target.seed_bytes(), *kept(name)]):
        if len(data) <= target.max_len:
            (corpus / f"seed-{number}").write_bytes(data)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={target.max_len}",
        f"-timeout={SECONDS_PER_INPUT}",
        f"-rss_limit_mb={MEGABYTES}",
        f"-artifact_prefix={findings}/",
        "-print_final_stats=1",
    ]
    start = time.monotonic()
    done = engine(name, *options, corpus)
    covered, executed, peak = (pattern.findall(done.stderr) for pattern in (_COVERED, _EXECUTED, _PEAK))
    said = done.stdout + done.stderr
    finding = ""
    if done.returncode or not executed:
        finding = "\n".join(line for line in said.splitlines() if not _NOISE.match(line))[:6000]
        if not finding.strip():
            finding = f"status {done.returncode} after {time.monotonic() - start:.0f} s, without a word"
    return Figures(
        int(executed[-1]) if executed else 0,
        int(covered[-1]) if covered else 0,
        int(peak[-1]) if peak else 0,
        len(list(corpus.iterdir())),
        finding,
    )


def keep(name: str, place: Path) -> None:
    """Store some of what was learnt: short inputs, each of which reached something new when it was found."""
    inputs = {file.read_bytes() for file in (place / "corpus").iterdir()}
    chosen = sorted((data for data in inputs if 0 < len(data) <= KEPT_LENGTH), key=lambda d: (len(d), d))
    step = -(-len(chosen) // KEPT) or 1
    corpus_file(name).parent.mkdir(exist_ok=True)
    corpus_file(name).write_text("".join(f"{data.hex()}\n" for data in chosen[::step]))


def engine(name: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz.engine", name, *map(str, options)],
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )


if __name__ == "__main__":
    sys.exit(main())
