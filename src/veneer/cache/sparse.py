"""A NAR of which some chunks are here: one sparse file, and which of its chunks are written.

N5  A chunk's row (``Index.set_nar`` with ``present``) is written after its bytes are in the file, and only for chunks that
    were verified by themselves. A daemon that is killed between the two has the chunk fetched again. After a power loss the file may
    have holes where rows say chunks: recovery hashes each, or drops the file.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from operator import attrgetter
from pathlib import Path

from veneer.formats.chunk_map import Chunk
from veneer.model.errors import CacheError

from .directory import cache_error

_offset = attrgetter("offset")
_BLOCK = 4096


class SparseNar:
    """Chunks of one NAR, by their ordinal. ``write`` in any thread; the rest on the index's."""

    def __init__(self, path: Path, number: int, chunks: tuple[Chunk, ...], present: bytes | None) -> None:
        """Made by ``Nars.sparse``. ``present``: those that the file at ``path`` holds; None: begin a new file."""
        self.path = path
        self.number = number
        self.chunks = chunks
        self.nar_size = chunks[-1].offset + chunks[-1].size
        self.present = bytearray(len(chunks)) if present is None else bytearray(present)
        """1 for each chunk that was written and may be read."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            if present is None:
                path.unlink(missing_ok=True)  # whoever still reads an earlier one keeps that
                self._fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
                os.ftruncate(self._fd, self.nar_size)
                os.fchmod(self._fd, 0o644)  # opened for writing again, also by who is not root
            else:
                self._fd = os.open(path, flags)
            status = os.fstat(self._fd)
        except OSError as error:
            raise cache_error(error, path, "write to") from error
        if status.st_size != self.nar_size or len(self.present) != len(chunks):
            os.close(self._fd)
            raise CacheError("a sparse NAR is not as its row says", where=str(path))
        self.inode = status.st_ino
        """Tells readers whether what they have open is this file."""
        self.held = sum(chunk.size for chunk, here in zip(chunks, self.present, strict=True) if here)
        """Bytes of the chunks that are present."""

    @property
    def fileno(self) -> int:
        """Open for reading and writing; -1 once ended."""
        return self._fd

    @property
    def disk_size(self) -> int:
        """What the file is counted with: like the kernel, in whole blocks."""
        return min(-(-self.nar_size // _BLOCK), -(-self.held // _BLOCK) + 1) * _BLOCK

    @property
    def is_whole(self) -> bool:
        return self.held == self.nar_size

    def is_in_place(self) -> bool:
        """Whether the file is still there, and the one that is written."""
        try:
            return self.path.lstat().st_ino == self.inode
        except OSError:
            return False

    def covering(self, start: int, end: int) -> range:
        """Ordinals of the chunks that the bytes [start, end) lie in."""
        first = bisect_right(self.chunks, start, key=_offset) - 1
        last = bisect_right(self.chunks, max(start, end - 1), key=_offset)
        return range(max(0, first), last)

    def around(self, start: int, end: int) -> tuple[int, int] | None:
        """The widest part of the NAR around [start, end) that is here; None when [start, end) is not."""
        wanted = self.covering(start, end)
        if not all(self.present[wanted.start : wanted.stop]):
            return None
        first, last = wanted.start, wanted.stop - 1
        while first > 0 and self.present[first - 1]:
            first -= 1
        while last + 1 < len(self.chunks) and self.present[last + 1]:
            last += 1
        return self.chunks[first].offset, self.chunks[last].offset + self.chunks[last].size

    def write(self, ordinal: int, data: bytes) -> None:
        """The bytes of a chunk, which was verified. Present only after ``landed``. CacheFullError, CacheError."""
        at, rest = self.chunks[ordinal].offset, memoryview(data)
        try:
            while rest:
                written = os.pwrite(self._fd, rest, at)
                at += written
                rest = rest[written:]
        except OSError as error:
            raise cache_error(error, self.path, "write to") from error

    def landed(self, ordinals: list[int]) -> None:
        """These chunks were written whole. The row is the caller's to write (N5)."""
        for ordinal in ordinals:
            if not self.present[ordinal]:
                self.present[ordinal] = 1
                self.held += self.chunks[ordinal].size

    def discard(self) -> None:
        """Removes the file. Harmless after the end."""
        if self._fd >= 0:
            self.finish()
            self.path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Closes the file, which stays. Harmless after the end."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
