"""``veneer cache verify``: everything in the cache is read and compared with what it should be; what is not is dropped.

V1  SQLite finds nothing wrong with the index. Otherwise no row is believed: the check ends, and the index is begun anew.
V2  Every file that a row promises is there, is what ``kinds`` says of its kind, and can be read from the disk.
V3  Every other file is being written by a download, or goes.
V4  Dropping is done on the index's thread, and only where file and row are still those that were examined: a daemon
    that goes on meanwhile may have evicted or fetched them. First the file, then the row.
V5  Content that differs may have been read by somebody, whose kernel keeps it. Such a number is retired, as for a source that
    lied, and the path lives on under a new one. What is missing, cut short or unreadable gave nobody a wrong byte and is reset.
V6  Memory does not grow with the cache: rows and names come BATCH by BATCH, one file is read at a time, and of the faults
    SHOWN are kept.

``check`` is a generator without threads of its own: it yields functions that may run in any thread, is sent their result, and
does between them what belongs to the index's thread, never for long.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Generator, Iterator, Set
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from veneer.model.errors import CacheError
from veneer.model.store_path import StorePath

from . import directory
from .cache import Cache
from .database import DamagedIndexError, damage_mark
from .directory import PUBLISHED, cache_error
from .index import Index, NarState, PathRow, TreeState
from .kinds import KINDS, Kind, Read

BATCH = 256
SHOWN = 1000
BUSY_TRIES = 10
BUSY_SECONDS = 0.5
"""Files that are being written are looked at again so often, so much later."""
_UNREADABLE = (errno.EIO, errno.EUCLEAN, errno.ENODATA, errno.EBADMSG)
"""What a disk says of a file that it has lost; anything else is said of us or of the whole file system."""
_STRAY_NUMBER = 12

Work = Callable[[], Any]


class Fault(StrEnum):
    MISSING = "missing"
    CUT = "wrong size"
    WRONG = "wrong content"
    UNREADABLE = "unreadable"
    STRAY = "not wanted"
    INDEX = "damaged index"


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault. ``name``: of the file, below the cache directory. ``kind``: of KINDS, "file" or "index"."""

    fault: Fault
    kind: str
    name: str
    reason: str = ""
    number: int = 0
    store_path: StorePath | None = None
    identity: tuple[int, int, int] | None = None
    """Of the file that was examined; None: there was none."""


@dataclass(slots=True)
class Report:
    """What was looked at and what was wrong. Sizes in bytes."""

    nars: int = 0
    trees: int = 0
    files: int = 0
    read: int = 0
    found: int = 0
    dropped: int = 0
    freed: int = 0
    index_damaged: bool = False
    findings: list[tuple[Finding, bool]] = field(default_factory=list)
    """The first SHOWN, and whether each was dropped."""

    def add(self, finding: Finding, *, dropped: bool, freed: int = 0) -> None:
        self.found += 1
        self.dropped += dropped
        self.freed += freed if dropped else 0
        if len(self.findings) < SHOWN:
            self.findings.append((finding, dropped))

    def document(self) -> dict[str, object]:
        """For CONTROL and ``--json``."""
        return {
            "checked": {"nars": self.nars, "trees": self.trees, "files": self.files, "bytes": self.read},
            "index": "damaged" if self.index_damaged else "ok",
            "found": self.found,
            "dropped": self.dropped,
            "freed": self.freed,
            "findings": [
                {
                    "fault": str(finding.fault),
                    "kind": finding.kind,
                    "file": finding.name,
                    "path": None if finding.store_path is None else finding.store_path.basename,
                    "reason": finding.reason,
                    "dropped": dropped,
                }
                for finding, dropped in self.findings
            ],
        }


@dataclass(frozen=True, slots=True)
class Notices:
    """Whom to tell of what was dropped, on the index's thread."""

    dropped: Callable[[Finding], None] = lambda finding: None
    condemned: Callable[[Finding], None] = lambda finding: None


def check(
    root: Path,
    index: Index,
    *,
    drop: bool,
    clock: Callable[[], float],
    busy: Callable[[], Set[int]] = frozenset,
    read: Read = lambda size: None,
    notices: Notices = Notices(),
    fault: Callable[[str], None] = lambda step: None,
) -> Generator[Work, Any, Report]:
    """The whole check; see the module. ``busy``: the numbers that are being written just now.

    CacheError: the directory or the index cannot be used at all.
    """
    report = Report()
    damage: str = yield partial(index_damage, root / directory.INDEX)
    if damage:
        report.index_damaged = True
        report.add(Finding(Fault.INDEX, "index", directory.INDEX, damage), dropped=False)
        if drop:
            mark_damaged(root)
        return report

    def reading(size: int) -> None:
        report.read += size
        read(size)

    settle = partial(_settle, root, index, report, drop, clock, busy, notices, fault)
    after = 0
    later: set[int] = set()
    while rows := index.with_files_after(after, BATCH):
        after = rows[-1].number
        findings: list[Finding] = yield partial(_examine, root, _todo(index, rows), reading)
        report.trees += sum(row.tree is not TreeState.NONE for row in rows)
        report.nars += sum(row.nar is not NarState.NONE for row in rows)
        later |= settle(findings)
    for last in (*(False,) * BUSY_TRIES, True):
        if later:
            yield partial(time.sleep, BUSY_SECONDS)
            rows = [row for number in later if (row := index.path(number)) is not None]
            later = settle((yield partial(_examine, root, _todo(index, rows), reading)), anyway=last)
    names = _names(root)
    while batch := (yield partial(_some, names)):
        report.files += len(batch)
        being_written = busy()
        settle([Finding(Fault.STRAY, "file", n) for n in batch if not _is_wanted(index, n, being_written)])
    return report


def check_alone(
    root: Path,
    *,
    drop: bool,
    clock: Callable[[], float],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """The check of a cache that no daemon holds. A damaged index is begun anew, and with it goes every file.

    ``progress``: told bytes read and bytes to read. CacheInUseError: a daemon holds it; ask that one.
    """
    done = total = 0

    def read(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    lock = directory.lock(root)
    try:
        try:
            index = Index(root / directory.INDEX)
        except DamagedIndexError as error:
            report = Report(index_damaged=True)
            report.add(Finding(Fault.INDEX, "index", directory.INDEX, error.what), dropped=False)
        else:
            total = index.totals().nar_bytes + index.totals().tree_bytes
            try:
                report = _finish(check(root, index, drop=drop, clock=clock, read=read))
            except BaseException:
                index.abandon()
                raise
            index.close()
    finally:
        os.close(lock)
    if report.index_damaged and drop:
        mark_damaged(root)
        with Cache.open(root, clock=clock) as cache:
            report.files = cache.repaired.files_removed
        finding, _ = report.findings.pop()
        report.found = 0
        report.add(finding, dropped=True)
    return report


def index_damage(path: Path) -> str:
    """What SQLite finds wrong with the index, "" if nothing. From any thread, beside the open ``Index``. CacheError."""
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=2.0, isolation_level=None)) as db:
            db.execute("PRAGMA cache_size = -4096")
            problems = [str(line) for (line,) in db.execute("PRAGMA integrity_check(3)")]
    except sqlite3.DatabaseError as error:
        code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return str(error)
        raise CacheError(f"cannot check the cache's index: {error}", where=str(path)) from error
    return "" if problems == ["ok"] else "; ".join(" ".join(problem.split()) for problem in problems)


def mark_damaged(root: Path) -> None:
    """Has the next start begin a new index."""
    mark = damage_mark(root / directory.INDEX)
    try:
        mark.touch()
    except OSError as error:
        raise cache_error(error, mark, "write to") from error


# -- in any thread


_Todo = tuple[PathRow, str, Kind, Any]


def _todo(index: Index, rows: list[PathRow]) -> list[_Todo]:
    return [
        (row, name, kind, kind.look_up(index, row))
        for row in rows
        for name, kind in KINDS.items()
        if kind.promised(row)
    ]


def _examine(root: Path, todo: list[_Todo], read: Read) -> list[Finding]:
    found = (_examined(root, *what, read) for what in todo)
    return [finding for finding in found if finding is not None]


def _examined(root: Path, row: PathRow, called: str, kind: Kind, known: Any, read: Read) -> Finding | None:
    name = kind.file(row.number)
    about = partial(Finding, kind=called, name=name, number=row.number, store_path=row.store_path)
    identity = None
    try:
        identity = _identity(root / name)
        if row.quarantined:
            return about(Fault.STRAY, identity=identity, reason="its number is retired")
        if identity is None:
            return about(Fault.MISSING, identity=None)
        with open(root / name, "rb", buffering=0, opener=_open_regular) as file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino, status.st_mtime_ns)
            if not stat.S_ISREG(status.st_mode):
                return about(Fault.WRONG, identity=identity, reason="it is not a file")
            if kind.size(row) not in (None, status.st_size):
                reason = f"{status.st_size} bytes instead of {kind.size(row)}"
                return about(Fault.CUT, identity=identity, reason=reason)
            # The disk's bytes, not those that the kernel keeps; and nobody else's pages pushed out by ours.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            reason = kind.examine(file, row, known, read)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return about(Fault.WRONG, identity=identity, reason=reason) if reason else None
    except OSError as error:
        if error.errno == errno.ENOENT:
            return about(Fault.MISSING, identity=None)
        if error.errno == errno.ELOOP:
            return about(Fault.WRONG, identity=identity, reason="it is not a file")
        if error.errno in _UNREADABLE:
            return about(Fault.UNREADABLE, identity=identity, reason=os.strerror(error.errno))
        raise cache_error(error, root / name, "read") from error


def _open_regular(path: str, flags: int) -> int:
    """Follows no link and waits for no pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _names(root: Path) -> Iterator[str]:
    """All that lies where only files of rows and downloads should. Unlike ``recovery.scan``, files may come and go."""
    for top in (*PUBLISHED, "incoming"):
        for middle in _entries(root / top):
            if top != "incoming" and middle.is_dir(follow_symlinks=False):
                for entry in _entries(root / top / middle.name):
                    if not entry.is_dir(follow_symlinks=False):
                        yield f"{top}/{middle.name}/{entry.name}"
            elif not middle.is_dir(follow_symlinks=False):
                yield f"{top}/{middle.name}"


def _entries(path: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            yield from entries
    except FileNotFoundError:
        return
    except OSError as error:
        raise cache_error(error, path, "read") from error


def _some(names: Iterator[str]) -> list[str]:
    return list(itertools.islice(names, BATCH))


# -- on the index's thread


def _is_wanted(index: Index, name: str, busy: Set[int]) -> bool:
    try:
        number = int(name.rpartition("/")[2][:_STRAY_NUMBER], 16)
    except ValueError:
        return False
    if number in busy:
        return True
    row = index.path(number)
    return (
        row is not None
        and not row.quarantined
        and any(kind.promised(row) and kind.file(number) == name for kind in KINDS.values())
    )


def _settle(
    root: Path,
    index: Index,
    report: Report,
    drop: bool,
    clock: Callable[[], float],
    busy: Callable[[], Set[int]],
    notices: Notices,
    fault: Callable[[str], None],
    findings: list[Finding],
    anyway: bool = False,
) -> set[int]:
    """Reports those of ``findings`` that still hold, and drops them (V4).

    Left alone are the numbers that are being written just now, which it returns; ``anyway``: they are reported all the same.
    """
    being_written = busy()
    later: set[int] = set()
    resets: list[Finding] = []
    file = root
    try:
        for finding in findings:
            file = root / finding.name
            size = _size(file)
            if finding.number:
                row = index.path(finding.number)
                if row is None or not KINDS[finding.kind].promised(row):
                    continue
                if finding.number in being_written and not anyway:
                    later.add(finding.number)
                    continue
                if _identity(file) != finding.identity:
                    continue
            elif size is None:
                continue
            dropping = drop and finding.number not in being_written
            report.add(finding, dropped=dropping, freed=size or 0)
            if not dropping:
                continue
            if finding.fault is Fault.WRONG:
                index.replace_path(finding.number, clock())
                notices.condemned(finding)
                for file in (root / kind.file(finding.number) for kind in KINDS.values()):
                    file.unlink(missing_ok=True)
                index.forget_files(trees=[finding.number], nars=[finding.number])
            else:
                file.unlink(missing_ok=True)
                if finding.number:
                    resets.append(finding)
            fault("check.unlinked")
    except OSError as error:
        raise cache_error(error, file, "remove from") from error
    finally:
        if resets:
            index.forget_files(
                trees=[finding.number for finding in resets if finding.kind == "tree"],
                nars=[finding.number for finding in resets if finding.kind != "tree"],
            )
    for finding in resets:
        notices.dropped(finding)
    return later


def _size(path: Path) -> int | None:
    """Bytes on disk; None: not there."""
    try:
        return path.lstat().st_blocks * 512
    except FileNotFoundError:
        return None


def _finish(steps: Generator[Work, Any, Report]) -> Report:
    """Runs the check's work where it stands."""
    result: Any = None
    while True:
        try:
            work = steps.send(result)
        except StopIteration as end:
            assert isinstance(end.value, Report)
            return end.value
        result = work()
