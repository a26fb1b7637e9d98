"""Memory of the store daemon and the mount server with a million entries known.

::

    ./dev bench memory [--entries N]

The caches are synthetic: 200 paths with 5,000 entries each, and one path with 1,000,000. Everything in them is looked up
through the mount (``find -printf %s``). VmHWM is the most that was resident at any time; Pss counts pages that are
shared, such as mapped trees and the interpreter, by their share.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.support.results import Table
from benchmarks.support.stage import BenchError, daemon_ended, scratch, veneer_command
from benchmarks.support.wide_cache import write_wide_cache

LIMIT = 150.0
"""MiB, for each of the two."""
_TARGET, _DAEMON, _MOUNT = "target", "daemon", "mount server"
_ABSENT = f"/nix/store/{'0' * 32}-absent"
_LOOK = rf"""test -e {_ABSENT}; echo; read go; find "$@" -printf '%s\n' 2>/dev/null | wc -l; read go"""
"""The first question is answered when the daemon is up."""


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--entries", type=int, default=1_000_000, help="of all paths together [1000000]")
    entries = options.parse_args().entries
    table = Table(f"Memory with {entries:,} entries known", [_TARGET, _DAEMON, _MOUNT], unit="MiB")
    for paths in (200, 1):
        with contextlib.ExitStack() as stack:
            home = scratch(stack)
            (home / "wide").mkdir()
            wide, key = write_wide_cache(home / "wide", paths, entries // paths)
            for when, measured in _lookups(home, wide, key, entries):
                if when == "start" and paths > 1:
                    continue  # the same as with the other cache
                work = "at the start" if when == "start" else f"{paths} × {entries // paths:,}"
                for process, figures in measured.items():
                    for name, value in figures.items():
                        if process == _DAEMON:
                            table.add(f"{work}: {name}", _TARGET, LIMIT)
                        table.add(f"{work}: {name}", process, value)
                        table.target(f"{work}: {name}", process, 1.0)
    print(table.markdown())


def _lookups(
    home: Path, paths: list[str], key: str, entries: int
) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """("start" | "known", process -> figure -> MiB) of an environment in which all of ``paths`` is looked up."""
    options = [
        "--quiet",
        "--cache",
        f"file://{home}/wide",
        "--trusted-public-key",
        key,
        "--cache-dir",
        f"{home}/cache",
    ]
    command = [*veneer_command(), "run", *options, "--", "sh", "-c", _LOOK, "sh", *paths]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        for when in ("start", "known"):
            told = run.stdout.readline().strip()
            if when == "known" and (not told or int(told) != entries // len(paths) * len(paths)):
                raise BenchError(f"{told or 'no'} entries were found")
            yield when, {_DAEMON: memory(_daemon(run.pid)), _MOUNT: memory(_mount_server(run.pid))}
            with contextlib.suppress(BrokenPipeError):  # it failed: its status tells
                print("go", file=run.stdin, flush=True)
    if run.returncode:
        raise BenchError(f"veneer run ended with status {run.returncode}")
    with daemon_ended(home / "cache"):
        return


def memory(process: int) -> dict[str, float]:
    """VmRSS, VmHWM and Pss of a process in MiB."""
    proc = Path("/proc") / str(process)
    text = (proc / "status").read_text() + (proc / "smaps_rollup").read_text()
    found = dict(re.findall(r"^(VmRSS|VmHWM|Pss):\s+(\d+) kB$", text, re.MULTILINE))
    return {name: int(found[name]) / 1024 for name in ("VmRSS", "VmHWM", "Pss")}


def _daemon(run: int) -> int:
    return _one(run, lambda proc: b"veneer.daemon" in (proc / "cmdline").read_bytes(), "store daemon")


def _mount_server(run: int) -> int:
    return _one(run, lambda proc: (proc / "comm").read_text() == "veneer-mount\n", "mount server")


def _one(root: int, wanted: Callable[[Path], bool], what: str) -> int:
    """The descendant of ``root`` that is wanted."""
    found = [process for process in _descendants(root) if wanted(Path("/proc") / str(process))]
    if len(found) != 1:
        raise BenchError(f"{len(found)} processes look like the {what}")
    return found[0]


def _descendants(root: int) -> Iterator[int]:
    try:
        children = [f.read_text().split() for f in Path(f"/proc/{root}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):
        return  # it has ended
    for child in (int(each) for of_task in children for each in of_task):
        yield child
        yield from _descendants(child)


if __name__ == "__main__":
    main()
