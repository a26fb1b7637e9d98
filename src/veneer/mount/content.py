"""NAR files, open for pread. Not mapped: contents would count as our memory, and a truncated file would kill us."""

from __future__ import annotations

import errno
import os
import threading
from bisect import bisect_right

from veneer.formats.tree_index import nar_file, part_file, sparse_file

from .recent import Recent

MAX_OPEN = 512
"""Per generation of ``Recent``."""
MAX_SPANS = 4096
"""Of one file. A reader of more has forgotten which parts it was told of, and asks again."""
READ_AROUND = 1 << 17
"""Bytes, a power of two; the kernel's own default around a page fault. With the kernel's caches cold, files of one directory
(neighbours in a NAR) read by several threads, and dense random reads, take 0.6 of the time; lone random reads 1.1."""
READ_WIDE = 1 << 20
"""The same for a file of which readers waited for more than one part in DENSE: they go on, and a disk gives it sooner in big pieces."""
DENSE = 8
_NOT_NOW = (errno.EAGAIN, errno.EOPNOTSUPP)


class Nar:
    """An open NAR file, whole or with spans of it that may be read. Closes itself with its last reference.

    Never close it by hand: another thread may be between taking it and reading, and the number may name another
    path's file by then.
    """

    __slots__ = ("_last", "_lock", "_size", "_spans", "_waited", "fd", "flags", "inode", "whole")

    def __init__(self, fd: int, *, whole: bool) -> None:
        status = os.fstat(fd)
        self.fd = fd
        self.whole = whole
        self.inode = status.st_ino
        self.flags = os.RWF_NOWAIT
        """For preadv(2): read what is in memory, and no more."""
        self._size = status.st_size
        self._waited = 0
        self._lock = threading.Lock()
        self._spans: list[tuple[int, int]] = []
        """Parts that may be read, ascending, apart from each other; replaced, never changed."""
        self._last = (0, 0)
        """The span of the last answer: reads come in rows."""

    def covers(self, start: int, end: int) -> bool:
        """Whether the bytes [start, end) may be read."""
        first, last = self._last
        if first <= start and end <= last:
            return True
        spans = self._spans
        at = bisect_right(spans, (start, 1 << 63)) - 1
        if at < 0 or spans[at][1] < end:
            return False
        self._last = spans[at]
        return True

    def allow(self, start: int, end: int) -> None:
        """The bytes [start, end) may be read from now on."""
        with self._lock:
            spans = self._spans if len(self._spans) < MAX_SPANS else []
            before = [span for span in spans if span[1] < start]
            after = [span for span in spans if span[0] > end]
            met = spans[len(before) : len(spans) - len(after)]
            whole = (min([start, *(s for s, _ in met)]), max([end, *(e for _, e in met)]))
            self._spans = [*before, whole, *after]

    def finish(self, into: memoryview, start: int, got: int) -> int:
        """After a preadv with ``flags`` gave ``got`` bytes only: waits for the rest. How many there are now. OSError."""
        around = READ_AROUND if self._waited * DENSE < self._size else READ_WIDE
        self._waited += READ_AROUND
        if len(into) < around:
            os.posix_fadvise(self.fd, start & -around, around, os.POSIX_FADV_WILLNEED)
        return got + os.preadv(self.fd, [into[got:]], start + got)

    def refused(self, error: OSError) -> int:
        """What a preadv with ``flags`` got that raised: nothing yet. Raises ``error`` if it is not about the flags."""
        if error.errno not in _NOT_NOW:
            raise error
        if error.errno == errno.EOPNOTSUPP:  # this file system cannot tell; then all reads wait
            self.flags = 0
        return 0

    def __del__(self) -> None:
        os.close(self.fd)


class Contents:
    """Open NAR files by path number. Threads may share it."""

    def __init__(self, cache_dirfd: int, *, max_open: int = MAX_OPEN) -> None:
        self._dirfd = cache_dirfd
        self.open: Recent[int, Nar] = Recent(max_open)
        self._lock = threading.Lock()

    def get(self, number: int) -> Nar | None:
        """The path's file, if it was opened before or lies whole in the cache; None otherwise. OSError."""
        return self.open.get(number) or self._open(number)

    def ready(self, number: int, start: int, end: int, *, whole: bool, inode: int = 0) -> None:
        """The daemon said what may be read, as in READY. A missing file is none of our errors: the reader will ask again."""
        if whole:
            self.open.drop(number)
            self._open(number)
            return
        with self._lock:
            nar = self.open.get(number)
            if nar is None or nar.whole or nar.inode != inode:
                nar = self._open_parts(number, inode)
            if nar is not None:
                nar.allow(start, end)

    def _open(self, number: int) -> Nar | None:
        try:
            fd = os.open(nar_file(number), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._dirfd)
        except FileNotFoundError:
            return None
        nar = Nar(fd, whole=True)
        self.open.put(number, nar)
        return nar

    def _open_parts(self, number: int, inode: int) -> Nar | None:
        """The file that the daemon spoke of; None when there is another one by now, or none."""
        for name in (sparse_file(number), part_file(number), nar_file(number)):
            try:
                fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._dirfd)
            except FileNotFoundError:
                continue
            nar = Nar(fd, whole=False)
            if nar.inode == inode:  # else the number of a file that is gone
                self.open.put(number, nar)
                return nar
        return None

    def drop(self, number: int) -> None:
        self.open.drop(number)

    def clear(self) -> None:
        self.open.clear()
