"""Published tree indexes, mapped; and which names have which numbers.

I1: a mapped index has the path number and the generation that were asked for.
I2: of a quarantined path nothing is opened again.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time

from veneer.formats.tree_index import TreeIndex, tree_file
from veneer.model.errors import CacheError, FormatError, TrustError

from .recent import Recent

MAX_MAPPED = 1024
"""Per generation of ``Recent``; each mapping costs a descriptor before Python 3.13."""
MAX_NAMES = 1 << 16
RESIDENT_LIMIT = 56 << 20
"""Bytes of this process above which the mapped pages are given back (they stay in the page cache)."""
BATCH_BUDGET = 20 << 20
"""Bytes that one thread may map in between two looks."""
LARGEST_FAULT = 2 << 20
"""What one fault can map in: since Linux 6.18 the page's whole folio, before that 64 KiB around it."""
BATCH = 32
COUNTED_EVERY = 64
"""New maps between two counts of all: to count two thousand at each would be a tenth of a lookup."""
READ_FIRST = 16 << 20
"""Bytes of an index that a mount's first server reads before it maps it; nearly all are smaller. Successors read all."""
_PIECE = 1 << 18


class Trees:
    """Tree indexes by path number, path numbers by name. Threads may share it.

    Maps are released by reference count, so an answer in the making is never pulled away. ``read_first``: bytes of an index
    that are read before it is mapped, None for all: then no page that the disk has lost is mapped.
    """

    def __init__(
        self, cache_dirfd: int, *, max_mapped: int = MAX_MAPPED, read_first: int | None = READ_FIRST
    ) -> None:
        self._dirfd = cache_dirfd
        self._read_first = read_first
        self.mapped: Recent[int, TreeIndex] = Recent(max_mapped)
        self.numbers: Recent[bytes, int] = Recent(MAX_NAMES)
        self.directories: Recent[int, bool] = Recent(MAX_NAMES)
        """Numbers that were told as directories, perhaps without an index."""
        self.absent = Absent()
        self.generation: bytes | None = None
        """Of the cache, once the daemon told; indexes of another one are refused."""
        self.quarantined: set[int] = set()
        self.batch = BATCH
        """Requests that a thread may answer before it calls ``relieve``."""
        self._watched = False
        self._uncounted = 0
        self._mapped_bytes = 0
        self._largest = 0
        self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        os.close(self._statm)

    def get(self, number: int) -> TreeIndex | None:
        """The index of a path; None: its file is not there. FormatError, CacheError, TrustError."""
        index = self.mapped.get(number)
        return index if index is not None else self._open(number)

    def _open(self, number: int) -> TreeIndex | None:
        if number in self.quarantined:
            raise TrustError("quarantined: its content is not what was signed", where=f"path {number}")
        index = self._map(number)
        if index is not None:
            self.mapped.put(number, index)
            self._plan(len(index.buffer))
        return index

    def _map(self, number: int) -> TreeIndex | None:
        try:
            fd = os.open(tree_file(number), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._dirfd)
        except FileNotFoundError:
            return None
        try:
            size = os.fstat(fd).st_size
            if size == 0:
                raise FormatError("empty", where=tree_file(number))
            _read_through(fd, size if self._read_first is None else min(size, self._read_first))
            mapping = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
            with contextlib.suppress(OSError):  # a kernel without huge pages has nothing to be told
                mapping.madvise(mmap.MADV_NOHUGEPAGE)  # one fault would map 2 MiB
            index = TreeIndex(mapping)
        finally:
            os.close(fd)
        if index.number != number:
            raise FormatError(f"index of path {index.number}, not {number}", where=tree_file(number))
        if self.generation is not None and index.generation != self.generation:
            raise CacheError("the cache was made anew; this path is of the old one", where=tree_file(number))
        return index

    def forget(self, number: int, name: bytes) -> TreeIndex | None:
        """Quarantine. The index, for invalidation only: the kernel may hold pages of the files in it.

        The one that was mapped, because the daemon may have removed its file already. FormatError, CacheError, OSError.
        """
        self.quarantined.add(number)
        index = self.mapped.get(number)
        self.mapped.drop(number)
        self.numbers.drop(name)
        self.directories.drop(number)
        return index if index is not None else self._map(number)

    def change_generation(self, generation: bytes) -> list[bytes]:
        """The daemon told its cache's generation. The names that became void when it is another one than before."""
        before, self.generation = self.generation, generation
        if before is None or before == generation:
            return []
        names = self.numbers.keys()
        self.numbers.clear()
        self.directories.clear()
        self.mapped.clear()
        return names

    # Memory: mapped pages count as ours while they are mapped in, however cheap they are to get back.

    def _plan(self, size: int) -> None:
        """How often to look, now that ``size`` bytes more are mapped: never, when all maps together are small; else so that BATCH_BUDGET holds.

        Between two counts what went is still counted, and what comes is added: never too little.
        """
        self._uncounted += 1
        self._mapped_bytes += size
        self._largest = max(self._largest, size)
        if self._uncounted >= COUNTED_EVERY:
            sizes = [len(index.buffer) for index in self.mapped.values()]
            self._uncounted, self._mapped_bytes, self._largest = 0, sum(sizes), max(sizes)
        self._watched = self._mapped_bytes > RESIDENT_LIMIT
        if self._watched:  # a LOOKUP touches three places: table, record, row
            self.batch = max(4, min(BATCH, BATCH_BUDGET // (3 * min(self._largest, LARGEST_FAULT))))
        else:
            self.batch = BATCH

    def relieve(self) -> None:
        """Gives mapped pages back when this process has become large. Every thread calls it after ``batch`` requests."""
        if self._watched and int(os.pread(self._statm, 64, 0).split()[1]) * mmap.PAGESIZE > RESIDENT_LIMIT:
            for index in self.mapped.values():
                if isinstance(index.buffer, mmap.mmap):
                    index.buffer.madvise(mmap.MADV_DONTNEED)


def _read_through(fd: int, size: int) -> None:
    """What the disk cannot give is an OSError for one request here; at a mapped page it would be our end (SIGBUS)."""
    scratch = bytearray(min(size, _PIECE))
    for at in range(0, size, _PIECE):
        os.preadv(fd, [scratch], at)


class Absent:
    """Store path names that no source has, each for a time. Bounded; threads may share it."""

    def __init__(self) -> None:
        self._until: Recent[bytes, float] = Recent(MAX_NAMES)

    def put(self, name: bytes, seconds: float) -> None:
        self._until.put(name, time.monotonic() + seconds)

    def drop(self, name: bytes) -> None:
        self._until.drop(name)

    def clear(self) -> None:
        self._until.clear()

    def __contains__(self, name: bytes) -> bool:
        until = self._until.get(name)
        return until is not None and until > time.monotonic()
