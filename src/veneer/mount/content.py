"""NAR files, open for pread. Not mapped: contents would count as our memory, and a truncated file would kill us."""

from __future__ import annotations

import errno
import os
import threading

from veneer.formats.tree_index import nar_file

from .recent import Recent

MAX_OPEN = 512
"""Per generation of ``Recent``."""
READ_AROUND = 1 << 17
"""Bytes, a power of two; the kernel's own default around a page fault. With the kernel's caches cold, files of one directory
(neighbours in a NAR) read by several threads, and dense random reads, take 0.6 of the time; lone random reads 1.1."""
READ_WIDE = 1 << 20
"""The same for a file of which readers waited for more than one part in DENSE: they go on, and a disk gives it sooner in big pieces."""
DENSE = 8
_NOT_NOW = (errno.EAGAIN, errno.EOPNOTSUPP)


class Nar:
    """An open NAR file of which the bytes [start, end) may be read. Closes itself with its last reference.

    Never close it by hand: another thread may be between taking it and reading, and the number may name another
    path's file by then.
    """

    __slots__ = ("_size", "_waited", "end", "fd", "flags", "start", "whole")

    def __init__(self, fd: int, start: int, end: int, *, whole: bool) -> None:
        self.fd = fd
        self.start = start
        self.end = end
        self.whole = whole
        self.flags = os.RWF_NOWAIT
        """For preadv(2): read what is in memory, and no more."""
        self._size = os.fstat(fd).st_size
        self._waited = 0

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

    def ready(self, number: int, start: int, end: int, *, whole: bool) -> None:
        """The daemon said what may be read. A missing file is none of our errors: the reader will ask again."""
        if whole:
            self.open.drop(number)
            self._open(number)
            return
        with self._lock:
            known = self.open.get(number)
            if known is not None and not known.whole:
                # One range per file; a gap between two keeps the later one, and the reader of the other asks again.
                if start <= known.end and known.start <= end:
                    known.start, known.end = min(start, known.start), max(end, known.end)
                else:
                    known.start, known.end = start, end
                return
            try:
                fd = os.open(nar_file(number) + ".part", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._dirfd)
            except FileNotFoundError:
                return
            self.open.put(number, Nar(fd, start, end, whole=False))

    def _open(self, number: int) -> Nar | None:
        try:
            fd = os.open(nar_file(number), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._dirfd)
        except FileNotFoundError:
            return None
        nar = Nar(fd, 0, 1 << 63, whole=True)
        self.open.put(number, nar)
        return nar

    def drop(self, number: int) -> None:
        self.open.drop(number)

    def clear(self) -> None:
        self.open.clear()
