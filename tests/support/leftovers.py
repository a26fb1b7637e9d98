"""What a test session leaves behind on the machine: processes, mounts, a /nix. Linux; reads /proc only."""

from __future__ import annotations

import contextlib
import os
import select
import time
from dataclasses import dataclass
from pathlib import Path

MARK = "VENEER_TEST_SESSION"
"""Environment variable by which processes of this session are known, also after their parents ended."""


@dataclass(frozen=True)
class Before:
    """The machine before the first test."""

    mark: str
    mounts: frozenset[str]
    has_nix: bool


def look_before(mark: str) -> Before:
    """``mark`` must be in the environment (``MARK``) of all that tests start, and of nothing else."""
    return Before(mark, frozenset(_mounts()), os.path.lexists("/nix"))


def leftovers(before: Before, patience: float = 10) -> list[str]:
    """What is there now and was not before, one line each. Waits up to ``patience`` seconds for endings under way.

    New mounts do not count while another test session or program on this machine serves FUSE: they may be its own.
    """
    deadline = time.monotonic() + patience
    for pid, _ in _processes(before.mark):
        _await_end(pid, deadline)
    found = [f"process {pid} still runs: {command}" for pid, command in _processes(before.mark)]
    mounts = _mounts() - before.mounts
    if mounts and not _has_other_server(before.mark):
        found += [f"still mounted: {mount}" for mount in sorted(mounts)]
    if os.path.lexists("/nix") and not before.has_nix:
        found.append("/nix was created on this machine")
    return found


def _mounts() -> set[str]:
    """FUSE and overlay mounts and all that name veneer: "<point> (<type> <source>)"."""
    mounts = set()
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields, _, rest = line.partition(" - ")
        point, (kind, source) = fields.split(" ")[4], rest.split(" ")[:2]
        if kind.startswith("fuse") or "veneer" in f"{point} {source}":
            mounts.add(f"{point} ({kind} {source})")
    return mounts


def _has_other_server(mark: str) -> bool:
    """Whether a live process without our mark serves a FUSE mount: then new mounts may be another session's."""
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile, or belongs to somebody else
                is_ours = f"{MARK}={mark}".encode() in (directory / "environ").read_bytes().split(b"\0")
                if not is_ours and any(
                    str(fd.readlink()) == "/dev/fuse" for fd in (directory / "fd").iterdir()
                ):
                    return True
    return False


def _processes(mark: str) -> list[tuple[int, str]]:
    """(pid, command line) of live processes with the mark, without this one."""
    found = []
    wanted = f"{MARK}={mark}".encode()
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit() and int(directory.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended meanwhile, or belongs to somebody else
                if wanted in (directory / "environ").read_bytes().split(b"\0"):
                    words = (directory / "cmdline").read_bytes().split(b"\0")
                    found.append((int(directory.name), b" ".join(words).decode(errors="replace")[:300]))
    return found


def _await_end(pid: int, deadline: float) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
    finally:
        os.close(descriptor)
