"""Published tree indexes, mapped; and which names have which numbers.

I1: a mapped index has the path number and the generation that were asked for.
I2: of a quarantined path nothing is opened again.
"""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

from veneer.formats.tree_index import TreeIndex, tree_file
from veneer.model.errors import CacheError, FormatError, TrustError

from .recent import Recent

MAX_MAPPED = 1024
"""Per generation of ``Recent``; each mapping costs a descriptor before Python 3.13."""
MAX_NAMES = 1 << 16
RESIDENT_LIMIT = 96 << 20
"""Bytes of this process above which the mapped pages are given back (they stay in the page cache)."""
SERVED_LIMIT = 32 << 20
_STATM = Path("/proc/self/statm")


class Trees:
    """Tree indexes by path number, path numbers by name. Threads may share it.

    Maps are released by reference count, so an answer in the making is never pulled away.
    """

    def __init__(self, cache_dirfd: int, *, max_mapped: int = MAX_MAPPED) -> None:
        self._dirfd = cache_dirfd
        self.mapped: Recent[int, TreeIndex] = Recent(max_mapped)
        self.numbers: Recent[bytes, int] = Recent(MAX_NAMES)
        self.absent = Absent()
        self.generation: bytes | None = None
        """Of the cache, once the daemon told; indexes of another one are refused."""
        self.quarantined: set[int] = set()
        self._served = 0
        self._page = mmap.PAGESIZE

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
        return index

    def open_quarantined(self, number: int) -> TreeIndex | None:
        """For invalidation only: which files the kernel may hold pages of."""
        return self._map(number)

    def _map(self, number: int) -> TreeIndex | None:
        try:
            fd = os.open(tree_file(number), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._dirfd)
        except FileNotFoundError:
            return None
        try:
            size = os.fstat(fd).st_size
            if size == 0:
                raise FormatError("empty", where=tree_file(number))
            index = TreeIndex(mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ))
        finally:
            os.close(fd)
        if index.number != number:
            raise FormatError(f"index of path {index.number}, not {number}", where=tree_file(number))
        if self.generation is not None and index.generation != self.generation:
            raise CacheError("the cache was made anew; this path is of the old one", where=tree_file(number))
        return index

    def forget(self, number: int, name: bytes) -> None:
        """Quarantine."""
        self.quarantined.add(number)
        self.mapped.drop(number)
        self.numbers.drop(name)

    def change_generation(self, generation: bytes) -> list[bytes]:
        """The daemon told its cache's generation. The names that became void when it is another one than before."""
        before, self.generation = self.generation, generation
        if before is None or before == generation:
            return []
        names = self.numbers.keys()
        self.numbers.clear()
        self.mapped.clear()
        return names

    # Memory: mapped pages count as ours while they are mapped in, however cheap they are to get back.

    def served(self, size: int) -> None:
        """Counts bytes that went out of a map in bulk."""
        self._served += size
        if self._served > SERVED_LIMIT:
            self._release()

    def relieve(self) -> None:
        """Gives mapped pages back when this process has become large. Called every few hundred requests."""
        if int(_STATM.read_bytes().split()[1]) * self._page > RESIDENT_LIMIT:
            self._release()

    def _release(self) -> None:
        self._served = 0
        for index in self.mapped.values():
            if isinstance(index.buffer, mmap.mmap):
                index.buffer.madvise(mmap.MADV_DONTNEED)


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
