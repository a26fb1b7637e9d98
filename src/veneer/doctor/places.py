"""Checks of the cache directory and of the daemon."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from veneer.cache.directory import INDEX
from veneer.doctor.finding import Result, Subject
from veneer.formats.mountinfo import parse_mountinfo
from veneer.model.errors import VeneerError

_SQLITE = b"SQLite format 3\0"
_LITTLE = 1 << 30
_NETWORK = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "9p",
    "fuse.sshfs",
    "ceph",
    "afs",
    "lustre",
    "glusterfs",
    "fuse.glusterfs",
)


def cache_directory(subject: Subject) -> Iterator[Result]:
    place = _nearest(subject.cache_dir)
    fix = f"choose another: --cache-dir DIR; or, as root: chown {subject.uid} {place}"
    if subject.borrowed:
        yield Result("ok", f"{subject.cache_dir} is another user's; their daemon is used")
    elif not os.access(place, os.W_OK | os.X_OK):
        yield Result("failed", f"{place} cannot be written to by user {subject.uid}", fix)
    elif place == subject.cache_dir and place.stat().st_uid != subject.uid:
        yield Result("failed", f"{place} belongs to user {place.stat().st_uid}", fix)
    else:
        yield Result("ok", f"{subject.cache_dir}" + ("" if place == subject.cache_dir else " (not made yet)"))


def disk_space(subject: Subject) -> Iterator[Result]:
    free = shutil.disk_usage(_nearest(subject.cache_dir)).free
    yield space(free, subject.max_bytes, _held(subject))


def space(free: int, limit: int | None, held: int) -> Result:
    """``held``: bytes in the cache already. ``limit``: its configured size, None without one."""
    if free < _LITTLE:
        what = f"{free >> 20} MiB are free on the cache's file system"
        return Result("warning", what, "veneer gc --max-size 10G, or another --cache-dir")
    if limit is not None and limit - held > free:
        what = f"the cache may grow to {limit >> 20} MiB, and {free >> 20} MiB are free"
        return Result(
            "warning", what, f"max-size = {(held + free - _LITTLE) >> 20}M in the configuration file"
        )
    return Result("ok", f"{free >> 30} GiB free" + ("" if limit is None else f", limit {limit >> 20} MiB"))


def file_system(subject: Subject) -> Iterator[Result]:
    place = os.fsencode(_nearest(subject.cache_dir).resolve())
    with open("/proc/self/mountinfo", "rb") as file:
        mounts = parse_mountinfo(file.read())
    above = [
        m for m in mounts if place == m.mount_point or place.startswith(m.mount_point.rstrip(b"/") + b"/")
    ]
    longest = max((len(m.mount_point) for m in above), default=0)
    fstype = next((m.fstype for m in reversed(above) if len(m.mount_point) == longest), b"").decode(
        "ascii", "replace"
    )
    if fstype in _NETWORK:
        yield Result(
            "warning", f"the cache is on {fstype}", "choose a directory on a local disk: --cache-dir DIR"
        )
    elif fstype in ("tmpfs", "ramfs"):
        yield Result(
            "warning", "the cache is in memory (tmpfs)", "choose a directory on a disk: --cache-dir DIR"
        )
    else:
        yield Result("ok", f"{fstype}")


def index(subject: Subject) -> Iterator[Result]:
    """Only the file's beginning: the daemon alone opens it."""
    file = subject.cache_dir / INDEX
    try:
        with open(file, "rb") as opened:
            begin = opened.read(len(_SQLITE))
    except FileNotFoundError:
        yield Result("skipped", "there is no cache yet")
    except PermissionError:
        yield Result(
            "skipped" if subject.borrowed else "failed",
            f"{file} cannot be read",
            f"chown {subject.uid} {file}",
        )
    else:
        if begin and begin != _SQLITE:
            yield Result(
                "failed", f"{file} is no index", f"mv {file} {file}.bad; what it knew is fetched again"
            )
        else:
            yield Result("ok", f"{file}")


def daemon(subject: Subject) -> Iterator[Result]:
    try:
        status = subject.status()
    except VeneerError as error:
        fix = error.hint or "end that process; every command starts a daemon when none runs"
        yield Result("failed", error.story(), fix)
        return
    if status is None:
        yield Result("ok", "none runs; commands start their own")
        return
    pid = status.get("pid")
    owner = _owner(pid)
    if owner is not None and owner != subject.uid and not subject.borrowed and subject.uid != 0:
        fix = "leave out --cache and keys, or use a cache directory of your own: --cache-dir DIR"
        yield Result("warning", f"the daemon {pid} is that of user {owner}", fix)
    else:
        yield Result("ok", f"process {pid} answers")


def failures(subject: Subject) -> Iterator[Result]:
    try:
        status = subject.status()
    except VeneerError:
        status = None
    stories = (status or {}).get("stories")
    if not isinstance(stories, list):
        yield Result("skipped", "no daemon to ask")
    elif stories:
        last = stories[-1]
        text = last.get("text", "") if isinstance(last, dict) else ""
        yield Result(
            "warning", f"{len(stories)} reads or questions failed lately; the last: {text}", "veneer status"
        )
    else:
        yield Result("ok", "none")


def _held(subject: Subject) -> int:
    try:
        status = subject.status()
    except VeneerError:
        return 0
    totals = (status or {}).get("totals")
    held = totals.get("nar_bytes", 0) if isinstance(totals, dict) else 0
    return held if isinstance(held, int) else 0


def _owner(pid: object) -> int | None:
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return None


def _nearest(path: Path) -> Path:
    """The directory itself, or the first above it that exists."""
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path
