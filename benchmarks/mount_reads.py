"""Reading through the mount, against the same tree on the machine's own file system. Each figure is a ratio of one run.

usage: ./dev bench mount_reads [--files N] [--rounds N] [--only NAME,NAME] [--no-overlay]

Columns: cold (kernel caches dropped, content in our cache) and warm, for the mount against the directory, and for
overlayfs on the mount against overlayfs on the directory. Needs root, /dev/fuse, and a file system to write to in
$TMPDIR; fio and rg are used when there. Medians over the rounds; variants alternate inside a round.
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

from tests.support.stub_daemon import Mounted, Spec, mounted
from veneer.mount import device

PACKAGE = "package"


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
        bases = {"ext4": plain, "mount": mount.path(name)}
        if not options.no_overlay:
            bases["overlay on ext4"] = stack.enter_context(overlay(directory / "o1", plain.parent)) / PACKAGE
            bases["overlay on mount"] = stack.enter_context(overlay(directory / "o2", mount.root)) / name
        results = measure(
            bases, works(options.only.split(",") if options.only else None, mount), options.rounds
        )
        print_table(results, overlay=not options.no_overlay)
        if options.json:
            Path(options.json).write_text(json.dumps(results, indent=1))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="")
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


def works(only: list[str] | None, mount: Mounted) -> dict[str, str]:
    """Shell commands; $T is the tree. Each takes a fraction of a second warm."""
    rows = {
        "find": "find $T -size +1000000 >/dev/null",
        "du": "du -s $T >/dev/null",
        "ls -lR": "ls -lR $T >/dev/null",
        "tar": "tar cf - -C $T share | cat >/dev/null",
        "rg": "rg -c --no-ignore nothing-like-that $T/share >/dev/null; true",
        "fio 4k 1 job": _fio(1),
        "fio 4k 8 jobs": _fio(8),
        "dd big file": "dd if=$T/lib/big of=/dev/null bs=1M status=none",
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
    """work -> "variant cold|warm" -> seconds of each round."""
    results: dict[str, dict[str, list[float]]] = {}
    for work, command in rows.items():
        times = results[work] = {f"{base} {state}": [] for base in bases for state in ("cold", "warm")}
        for _ in range(rounds):
            for base, path in bases.items():
                _drop_caches()
                for state in ("cold", "warm"):
                    started = time.perf_counter()
                    subprocess.run(["sh", "-c", command], env={**os.environ, "T": str(path)}, check=True)
                    times[f"{base} {state}"].append(time.perf_counter() - started)
        print(
            work, {key: round(statistics.median(values), 4) for key, values in times.items()}, file=sys.stderr
        )
    return results


def _drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def print_table(results: dict[str, dict[str, list[float]]], *, overlay: bool) -> None:
    pairs = [("mount", "ext4")] + ([("overlay on mount", "overlay on ext4")] if overlay else [])
    print("| work | " + " | ".join(f"{a} / {b}, cold / warm" for a, b in pairs) + " |")
    print("|---" * (1 + len(pairs)) + "|")
    for work, times in results.items():
        cells = []
        for ours, theirs in pairs:
            ratios = [
                statistics.median(times[f"{ours} {state}"]) / statistics.median(times[f"{theirs} {state}"])
                for state in ("cold", "warm")
            ]
            cells.append(" / ".join(f"{ratio:.2f}" for ratio in ratios))
        print(f"| {work} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(main())
