"""At start, the index and the files are made to agree. ``plan`` is pure; ``scan`` and ``act`` touch the disk.

R1  A file without a row that wants it is removed: half-written ones, those that a crash left between rename and row, all
    of an index that was lost, those of retired numbers, and whatever else lies there.
R2  A row without its file, or with a file of another size, is reset; the path is fetched again when wanted.
R3  After a power loss (the kernel's boot id is another one than at the last start, or unknown) files that had not been
    synced are hashed: NARs against their hash, the chunks of sparse ones against theirs, trees against the digest inside. What differs is removed and reset;
    NARs beyond REHASH_BYTES are not read but removed, because a start may not take minutes.
    The rows that list them may be lost as well, while those of an earlier file of the same number, synced and evicted since,
    come back. So a synced file also bears a mark itself, set once its rows are on the disk (``mark``), and one without it is hashed.
R4  First files, then rows, in one transaction: a crash in here only leaves work for the next start.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .directory import PUBLISHED, cache_error
from .index import FileRow, Index, Unsynced
from .kinds import KINDS

REHASH_BYTES = 1 << 30
"""NAR bytes hashed at most at a start after a power loss: about a second or two."""
SYNCED = 1
"""Modification time, in seconds, of files that were synced. Every write gives them another."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file below the cache directory. ``name`` is relative, as ``KINDS`` give it."""

    name: str
    size: int
    synced: bool = True


@dataclass(frozen=True, slots=True)
class Remove:
    """Unlink this file."""

    name: str


@dataclass(frozen=True, slots=True)
class Reset:
    """Tell the row that it has no such file. ``kind``: of ``KINDS``."""

    number: int
    kind: str


@dataclass(frozen=True, slots=True)
class Rehash:
    """Read this file; Remove and Reset unless it is what the row says."""

    number: int
    kind: str


Step = Remove | Reset | Rehash


def plan(
    rows: Iterable[FileRow],
    files: Iterable[FoundFile],
    *,
    doubtful: Iterable[Unsynced] = (),
    power_lost: bool = False,
    rehash_bytes: int = REHASH_BYTES,
) -> list[Step]:
    """Steps after which files and rows agree.

    ``rows``: those that should have a file. ``doubtful``: files that a power loss may have emptied, oldest first;
    ``power_lost``: and those that are not marked as synced.
    """
    found = {file.name: file for file in files}
    steps: list[Step] = []
    wanted: set[str] = set()
    kept: dict[tuple[int, str], FileRow] = {}
    for row in rows:
        for name, kind in KINDS.items():
            if not kind.promised(row):
                continue
            file = found.get(kind.file(row.number))
            if file is None or row.quarantined or kind.size(row) not in (None, file.size):
                steps.append(Reset(row.number, name))
            else:
                wanted.add(file.name)
                kept[row.number, name] = row
    # The newest are the likeliest to be wanted again.
    suspects = dict.fromkeys((file.number, file.kind) for file in reversed(list(doubtful)))
    if power_lost:
        suspects |= dict.fromkeys(key for key in kept if not found[KINDS[key[1]].file(key[0])].synced)
    for number, name in suspects:
        doubted = kept.get((number, name))
        if doubted is None:
            continue
        if name != "tree":
            rehash_bytes -= doubted.nar_size
        if name == "tree" or rehash_bytes >= 0:
            steps.append(Rehash(number, name))
        else:
            wanted.discard(KINDS[name].file(number))
            steps.append(Reset(number, name))
    steps += [Remove(file) for file in found if file not in wanted]
    return steps


def scan(root: Path) -> Iterator[FoundFile]:
    """All files in trees, nars and incoming. Directories that are not ours to make are left alone."""
    try:
        for top in PUBLISHED:
            for middle in os.scandir(root / top):
                if middle.is_dir(follow_symlinks=False):
                    yield from _files(root, f"{top}/{middle.name}")
                else:
                    yield FoundFile(f"{top}/{middle.name}", 0)
        yield from _files(root, "incoming")
    except OSError as error:
        raise cache_error(error, error.filename or root, "read") from error


def _files(root: Path, directory: str) -> Iterator[FoundFile]:
    with os.scandir(root / directory) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                status = entry.stat(follow_symlinks=False)
                synced = status.st_mtime_ns == SYNCED * 10**9
                yield FoundFile(f"{directory}/{entry.name}", status.st_size, synced)


def act(root: Path, index: Index, steps: Iterable[Step]) -> None:
    """Carries ``steps`` out. CacheError when the directory cannot be written."""
    resets: list[Reset] = []
    try:
        for step in steps:
            if isinstance(step, Remove):
                (root / step.name).unlink(missing_ok=True)
            elif isinstance(step, Reset):
                resets.append(step)
            elif _is_whole(root, index, step):
                _sync(root / KINDS[step.kind].file(step.number))
            else:
                (root / KINDS[step.kind].file(step.number)).unlink(missing_ok=True)
                resets.append(Reset(step.number, step.kind))
    except OSError as error:
        raise cache_error(error, error.filename or root, "repair") from error
    if resets:
        index.forget_files(
            trees=[reset.number for reset in resets if reset.kind == "tree"],
            nars=[reset.number for reset in resets if reset.kind != "tree"],
        )


Version = tuple[int, int]
"""Of a file's content: another file of its name has another, and so has the same one once it was written to."""


def version(fd: int) -> Version:
    status = os.fstat(fd)
    return status.st_ino, status.st_ctime_ns


def mark(path: Path, of: Version) -> None:
    """Says on the file that its bytes and its rows are on the disk, unless it is not this version any more. OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        if version(fd) == of:
            os.utime(fd, (SYNCED, SYNCED))
    finally:
        os.close(fd)


def _sync(path: Path) -> None:
    """For a file that was read and is right: it may have been copied here just now."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fdatasync(fd)
        os.utime(fd, (SYNCED, SYNCED))
    finally:
        os.close(fd)


def _is_whole(root: Path, index: Index, step: Rehash) -> bool:
    row = index.path(step.number)
    if row is None:
        return False
    kind = KINDS[step.kind]
    with open(root / kind.file(step.number), "rb", buffering=0) as file:
        return not kind.examine(file, row, kind.look_up(index, row), lambda read: None)
