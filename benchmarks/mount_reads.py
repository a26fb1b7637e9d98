"""Reading through the mount, against the same tree on the machine's own file system, and against other FUSE servers.

::

    ./dev bench mount_reads [--files N] [--rounds N] [--only NAME,NAME] [--peers NAME,NAME] [--no-overlay]

Two tables: the mount, and overlayfs on it. Rows are cold (kernel caches dropped, content in our cache) and warm.
Peers are a minimal server in C and one on pyfuse3 (``peers/``); one that cannot be made here is left out, with the reason. Needs
root, /dev/fuse, and a file system to write to in $TMPDIR; fio and rg are used when there. All variants take turns
inside a round.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.support.peers import PEERS, NotHereError, served, write_manifest
from benchmarks.support.results import Table
from tests.support.stub_daemon import Spec, mounted, tree_of
from veneer.formats.tree_index import nar_file
from veneer.mount import device

PACKAGE = "package"
EXT4, OURS, OVERLAY = "ext4", "veneer", "overlay on "
COLD, WARM = "cold", "warm"
TARGETS = {COLD: (1.3, 1.3), WARM: (1.05, 1.1)}
"""Of the mount and of the overlay on it, to ext4 and overlay on that."""
TARGETS_CPU_BOUND = {COLD: (1.3, 1.3), WARM: (1.15, 1.25)}
CPU_BOUND = ("rg", "python imports")
SEQUENTIAL = "dd big file"
"""Its target when warm is the C server."""


def main() -> int:
    options = _options()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="veneer-bench-")))
        spec = make_tree(options.files)
        plain = directory / "plain" / PACKAGE
        write_tree(plain, spec)
        (directory / "m").mkdir()
        mount = stack.enter_context(mounted(directory / "m", limit=3600))
        name = mount.daemon.add(PACKAGE, spec, whole=True)
        mount.daemon.contents.clear()
        mount.daemon.start()
        bases = {EXT4: plain, OURS: mount.path(name)}
        bases |= _peers(
            stack,
            options.peers.split(","),
            directory,
            spec,
            mount.cache / nar_file(mount.daemon.numbers[name]),
        )
        if not options.no_overlay:
            for number, (base, path) in enumerate(list(bases.items())):
                merged = stack.enter_context(overlay(directory / f"o{number}", path.parent))
                bases[OVERLAY + base] = merged / path.name
        rows = works(options.only.split(",") if options.only else None)
        results = measure(bases, rows, options.rounds)
    for table in tables(results, list(bases)):
        print(table.markdown())
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))
    return 0


def _peers(
    stack: ExitStack, wanted: list[str], directory: Path, spec: Spec, content: Path
) -> dict[str, Path]:
    """The tree in each peer that can be had here."""
    manifest = directory / "manifest"
    write_manifest(manifest, tree_of(spec)[0], PACKAGE.encode())
    trees = {}
    for number, (name, command) in enumerate(PEERS.items()):
        if name not in wanted:
            continue
        try:
            root = served(command(), manifest, content, directory / f"peer{number}")
            trees[name] = stack.enter_context(root) / PACKAGE
        except NotHereError as error:
            print(f"without {name}: {error}", file=sys.stderr)
    return trees


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="")
    parser.add_argument("--peers", default=",".join(PEERS), help="[%(default)s]")
    parser.add_argument("--no-overlay", action="store_true")
    parser.add_argument("--json", default="")
    return parser.parse_args()


def make_tree(files: int) -> dict[bytes, Spec]:
    """Directories of 40 text files each of 0.3 to 12 KiB, one big file, Python modules, a script."""
    text = b"".join(hashlib.sha256(b"%d" % i).hexdigest().encode() + b"\n" for i in range(400))
    directories: dict[bytes, Spec] = {}
    for i in range(files // 40):
        directories[b"dir%05d" % i] = {
            b"file-%02d.txt" % j: text[(i * 7 + j) % 50 :][: 300 + (i * 31 + j * 977) % 12_000]
            for j in range(40)
        }
    modules: dict[bytes, Spec] = {
        b"mod%03d.py" % i: b"".join(b"def f%d(x):\n    return x + %d\n" % (k, k) for k in range(30))
        for i in range(200)
    }
    return {
        b"share": directories,
        b"lib": {b"big": os.urandom(1 << 20) * 256, b"python": modules},
        b"bin": {b"script": b"#!/bin/sh\nexit 0\n"},
    }


def write_tree(path: Path, spec: Spec) -> None:
    if isinstance(spec, bytes):
        path.write_bytes(spec)
        path.chmod(0o555 if path.parent.name == "bin" else 0o444)
    elif isinstance(spec, str):
        path.symlink_to(spec)
    else:
        path.mkdir(parents=True)
        for name, child in spec.items():
            write_tree(path / os.fsdecode(name), child)


@contextmanager
def overlay(directory: Path, lower: Path) -> Iterator[Path]:
    for part in ("upper", "work", "merged"):
        (directory / part).mkdir(parents=True)
    merged = directory / "merged"
    subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o",
         f"lowerdir={lower},upperdir={directory / 'upper'},workdir={directory / 'work'}", merged],
        check=True,
    )  # fmt: skip
    try:
        yield merged
    finally:
        device.umount(str(merged), detach=True)


def works(only: list[str] | None) -> dict[str, str]:
    """Shell commands; $T is the tree. Each takes a fraction of a second warm."""
    rows = {
        "find": "find $T -size +1000000 >/dev/null",
        "du": "du -s $T >/dev/null",
        "ls -lR": "ls -lR $T >/dev/null",
        "tar": "tar cf - -C $T share | cat >/dev/null",
        "rg": "rg -c --no-ignore nothing-like-that $T/share >/dev/null; true",
        "fio 4k 1 job": _fio(1),
        "fio 4k 8 jobs": _fio(8),
        SEQUENTIAL: "dd if=$T/lib/big of=/dev/null bs=1M status=none",
        "python imports": (
            f"{sys.executable} -S -B -c \"import sys; sys.path.insert(0, '$T/lib/python'); "
            "[__import__(f'mod{i:03d}') for i in range(200)]\""
        ),
        "50 x exec": "for i in $(seq 50); do $T/bin/script; done",
    }
    if shutil.which("rg") is None:
        del rows["rg"]
    if shutil.which("fio") is None:
        del rows["fio 4k 1 job"], rows["fio 4k 8 jobs"]
    return {name: row for name, row in rows.items() if only is None or name in only}


def _fio(jobs: int) -> str:
    return (
        "fio --name=r --filename=$T/lib/big --readonly --rw=randread --bs=4k --size=256m "
        f"--io_size={32 // jobs}m --numjobs={jobs} --thread --invalidate=0 --group_reporting --minimal >/dev/null"
    )


def measure(bases: dict[str, Path], rows: dict[str, str], rounds: int) -> dict[str, dict[str, list[float]]]:
    """ "work, cold|warm" -> variant -> seconds of each round."""
    results: dict[str, dict[str, list[float]]] = {}
    for work, command in rows.items():
        for state in (COLD, WARM):
            results[f"{work}, {state}"] = {base: [] for base in bases}
        for number in range(rounds):
            for base in list(bases) if number % 2 == 0 else list(bases)[::-1]:
                environment = {**os.environ, "T": str(bases[base])}
                _drop_caches()
                for state in (COLD, WARM):
                    started = time.perf_counter()
                    subprocess.run(["sh", "-c", command], env=environment, check=True)
                    results[f"{work}, {state}"][base].append(time.perf_counter() - started)
        for state in (COLD, WARM):
            times = results[f"{work}, {state}"]
            medians = {base: round(statistics.median(values), 4) for base, values in times.items()}
            print(f"{work}, {state}", medians, file=sys.stderr)
    return results


def _drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def tables(results: dict[str, dict[str, list[float]]], bases: list[str]) -> list[Table]:
    """One of the mounts, one of the overlays."""
    direct = [base for base in bases if not base.startswith(OVERLAY)]
    overlays = [base for base in bases if base.startswith(OVERLAY)]
    made = [Table("Reading through the mount", direct)]
    if overlays:
        made.append(Table("Reading through an overlay on the mount", overlays))
    for place, table in enumerate(made):
        for row, times in results.items():
            for base in table.columns:
                for seconds in times[base]:
                    table.add(row, base, seconds)
            work, state = row.rsplit(", ", 1)
            targets = TARGETS_CPU_BOUND if work in CPU_BOUND else TARGETS
            if (work, state) != (SEQUENTIAL, WARM):
                table.target(row, table.columns[1], targets[state][place])
    return made


if __name__ == "__main__":
    sys.exit(main())
