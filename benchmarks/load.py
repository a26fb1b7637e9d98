"""Load on one store daemon for as long as you like: environments, readers, store paths, entries, churn.

::

    ./dev bench load [--short] [--minutes N] [--only KIND]...

Every kind has a daemon of its own, which must be idle afterwards: no request open, no download, no descriptors and threads
left. While it churns, the memory, descriptors and threads of the daemon and of the mount server are sampled every half
second; they must not grow from the second quarter of the time to the last. Every byte that is read is compared.

environments  64 environments up at the same time, 8 of them named, each of which reads everything
readers       500 readers at once in one environment, of a source that gives 20 MB/s
paths         10,000 store paths mounted and looked up
entries       one path with 1,000,000 entries, looked up
churn         reads at random of many times the cache's limit, behind nginx, of NARs that come whole and in parts
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.support.results import provenance
from benchmarks.support.stage import BenchError, scratch
from benchmarks.support.wide_cache import write_wide_cache
from tests.support import load
from tests.support.callers import Caller
from tests.support.load import LoadError, Sample
from tests.support.nginx import Nginx, find_nginx


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of each. ``plain``, ``published``: (paths, bytes of each) of the churn."""

    environments: int
    named: int
    readers: int
    paths: int
    entries: int
    plain: tuple[int, int]
    published: tuple[int, int]
    limit: int


FULL = Scale(56, 8, 500, 10_000, 1_000_000, (60, 4_000_000), (20, 24_000_000), 64 << 20)
SHORT = Scale(14, 2, 500, 2_000, 100_000, (24, 1_000_000), (6, 6_000_000), 12 << 20)
Figures = dict[str, Any]


def main() -> None:
    kinds: Mapping[str, Callable[[Path, Scale, float], Figures]] = {
        "environments": _environments,
        "readers": _readers,
        "paths": _paths,
        "entries": _entries,
        "churn": _churn,
    }
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--short", action="store_true", help="a fifth of everything, and a minute of churn")
    options.add_argument("--minutes", type=float, help="of churn [10, with --short 1]")
    options.add_argument("--only", choices=kinds, action="append", help="this kind; repeatable [all]")
    given = options.parse_args()
    scale = SHORT if given.short else FULL
    seconds = 60 * (given.minutes or (1 if given.short else 10))
    bad = 0
    for kind in given.only or kinds:
        print(f"\n### {kind}\n", flush=True)
        with contextlib.ExitStack() as stack:
            home = scratch(stack)
            try:
                _show(kinds[kind](home, scale, seconds))
            except LoadError as error:
                bad += 1
                print(f"FAILED: {error}", file=sys.stderr)
    print(f"\n{provenance()}")
    if bad:
        raise BenchError(f"{bad} kinds of load failed")


def _environments(home: Path, scale: Scale, _: float) -> Figures:
    return load.environments(
        _caller(home), load.make_stock(home, 12, 100_000, 2, 2_000_000), scale.environments, scale.named
    )


def _readers(home: Path, scale: Scale, _: float) -> Figures:
    stock = load.make_stock(home, 200, 300_000, 20, 6_000_000)
    return load.readers(_caller(home), stock, scale.readers, rate=20_000_000)


def _paths(home: Path, scale: Scale, _: float) -> Figures:
    (home / "served").mkdir()
    paths, key = write_wide_cache(home / "served", scale.paths, 10)
    return load.lookups(_caller(home), home / "served", key, paths, 10 * scale.paths)


def _entries(home: Path, scale: Scale, _: float) -> Figures:
    (home / "served").mkdir()
    paths, key = write_wide_cache(home / "served", 1, scale.entries)
    return load.lookups(_caller(home), home / "served", key, paths, scale.entries)


def _churn(home: Path, scale: Scale, seconds: float) -> Figures:
    stock = load.make_stock(home, *scale.plain, *scale.published)
    (home / "nginx").mkdir()
    with Nginx(find_nginx(), home / "nginx", stock.directory, workers=1) as server:
        return load.churn(_caller(home), stock, server.url, scale.limit, 8, seconds)


def _caller(home: Path) -> Caller:
    (home / "caller").mkdir()
    return Caller.root(home / "caller")


def _show(figures: Figures) -> None:
    plain = {name: value for name, value in figures.items() if not isinstance(value, (list, dict))}
    print("| " + " | ".join(plain) + " |\n|" + "---|" * len(plain))
    print("| " + " | ".join(f"{v:,.2f}" if isinstance(v, float) else f"{v:,}" for v in plain.values()) + " |")
    samples = {name: value for name, value in figures.items() if isinstance(value, list) and value}
    samples |= figures.get("quarters", {})
    print("\n| process | resident MiB | descriptors | threads |\n|---|---|---|---|")
    for name, rows in samples.items():
        if all(isinstance(row, Sample) for row in rows):
            columns = (
                ", ".join(f"{row.resident / (1 << 20):.0f}" for row in rows),
                ", ".join(str(row.descriptors) for row in rows),
                ", ".join(str(row.threads) for row in rows),
            )
            print(f"| {name} | " + " | ".join(columns) + " |")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
