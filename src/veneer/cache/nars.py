"""NAR files: whole, verified, uncompressed; and those on the way there.

    incoming/<number>.<n>.nar   a strict download: nobody reads it before it was verified
    nars/<xx>/<number>.nar.part a deferred one: mount servers read the prefix that the daemon announced
    nars/<xx>/<number>.nar.sparse  a NAR of which some chunks are there (``sparse``)
    nars/<xx>/<number>.nar      admitted, mode 0444, never written again

N1  A file gets the name ``.nar`` only in ``admit``, which takes a ``VerifiedNar``, and only under a number whose row has
    the same hash and size.
N2  First the file's name, then its row. A crash between leaves a file without a row, which recovery removes.
N3  Dropping: first the file (a full disk must not keep us from making room), then the row. A crash between leaves a row
    without a file, which recovery resets. Readers who have the file open go on reading it.
N4  After a crash of the daemon alone, what was renamed is whole: the kernel has it all. After a power loss a renamed
    file may be empty or have holes. No fsync at ``admit`` then, which would bind downloads to the disk's speed; the
    row is listed as ``unsynced`` until ``Cache.end_sync``, and after a change of the kernel's boot id recovery hashes
    or drops what is still listed.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from veneer.formats.chunk_map import Chunk
from veneer.formats.tree_index import nar_file, part_file, sparse_file
from veneer.model.errors import CacheError, CacheFullError
from veneer.model.hashes import Hash

from .directory import cache_error, make_parent, rename_published
from .index import Index, NarState
from .sparse import SparseNar

Bytes = bytes | bytearray | memoryview
KEPT_QUARANTINED = 4
"""Files kept in ``quarantine/`` for a look at what a source served."""
KEPT_INODES = 1 << 15
"""Path numbers whose last inode is remembered: of more, no mount server has a file to open still."""
_BLOCK = 4096


def disk_size(size: int) -> int:
    """Bytes that a file of ``size`` bytes is counted with: whole blocks."""
    return -(-size // _BLOCK) * _BLOCK


class IncomingNar:
    """A NAR being written, by one writer at a time, from any thread. Ends with ``Nars.admit``, ``discard`` or ``set_aside``."""

    def __init__(self, path: Path, number: int, mode: int) -> None:
        """Made by ``Nars.incoming`` and ``Nars.partial``."""
        self.path = path
        self.number = number
        self.size = 0
        """Bytes written; of a partial NAR, what may be announced."""
        try:
            path.unlink(missing_ok=True)  # whoever still reads an earlier attempt keeps that one
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
            os.fchmod(self._fd, mode)
            self.inode = os.fstat(self._fd).st_ino
        except OSError as error:
            raise cache_error(error, path, "write to") from error

    @property
    def fileno(self) -> int:
        """Open for reading and writing; -1 once ended."""
        return self._fd

    def write(self, data: Bytes) -> None:
        """Appends all of ``data`` or nothing: after CacheFullError evict and call it again."""
        rest = memoryview(data).cast("B")
        at = self.size
        try:
            while rest:
                written = os.pwrite(self._fd, rest, at)
                at += written
                rest = rest[written:]
        except OSError as error:
            os.ftruncate(self._fd, self.size)
            raise cache_error(error, self.path, "write to") from error
        self.size = at

    def discard(self) -> None:
        """Removes the file. Harmless after the end."""
        if self._fd >= 0:
            self.finish()
            self.path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Closes the file."""
        fd, self._fd = self._fd, -1
        os.close(fd)


@dataclass(frozen=True, slots=True)
class VerifiedNar:
    """A NAR of which every byte was hashed on its way into ``incoming``, and the hash and size were the signed ones.

    Only ``store/verify.py`` makes it (and tests): the type is the claim.
    """

    incoming: IncomingNar | SparseNar
    nar_hash: Hash
    nar_size: int


class Nars:
    """The NAR files of one cache. ``admit`` and ``drop`` belong to the index's thread; the rest may be called anywhere."""

    def __init__(self, root: Path, index: Index, fault: Callable[[str], None] = lambda step: None) -> None:
        self._root = root
        self._index = index
        self._fault = fault
        self._serial = itertools.count()
        self._inodes: OrderedDict[int, int] = OrderedDict()
        """Path number -> inode of the last file of which parts were read."""

    def path(self, number: int) -> Path:
        return self._root / nar_file(number)

    def files(self, number: int) -> tuple[Path, Path]:
        """Where a whole and a sparse NAR are; there may be one of them, seldom both."""
        return self._root / nar_file(number), self._root / sparse_file(number)

    def has(self, number: int, size: int | None = None) -> bool:
        """Whether the file is there, on disk, and has ``size`` bytes (the row is the faster answer, and normally the same)."""
        try:
            status = self.path(number).stat()
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and size in (None, status.st_size)

    def incoming(self, number: int, nar_size: int = 0) -> IncomingNar:
        """A file for a strict download. CacheFullError at once when ``nar_size`` bytes cannot fit."""
        self._room(nar_size)
        path = self._root / "incoming" / f"{number:012x}.{next(self._serial)}.nar"
        return IncomingNar(path, number, 0o600)

    def partial(self, number: int, nar_size: int = 0) -> IncomingNar:
        """A file for a deferred download, readable by mount servers while it grows."""
        self._room(nar_size)
        path = self._root / part_file(number)
        try:
            make_parent(path)
        except OSError as error:
            raise cache_error(error, path.parent, "write to") from error
        nar = IncomingNar(path, number, 0o444)
        self._told(number, nar.inode)
        return nar

    def sparse(self, number: int, chunks: tuple[Chunk, ...], present: bytes | None) -> SparseNar:
        """The file for a path's chunks: the one that holds those ``present``, or a new one. CacheError, CacheFullError.

        A new one has another inode than the one before it: a mount server may still have to open that, and must not
        take this one for it.
        """
        path = self._root / sparse_file(number)
        try:
            make_parent(path)
        except OSError as error:
            raise cache_error(error, path.parent, "write to") from error
        nar = SparseNar(path, number, chunks, present)
        if present is None and nar.inode == self._inodes.get(number):
            again = nar
            try:
                nar = SparseNar(path, number, chunks, None)
            finally:
                again.finish()
        self._told(number, nar.inode)
        return nar

    def _told(self, number: int, inode: int) -> None:
        self._inodes[number] = inode
        self._inodes.move_to_end(number)
        if len(self._inodes) > KEPT_INODES:
            self._inodes.popitem(last=False)

    def set_off(self, nar: SparseNar) -> None:
        """Out of its number's place into ``incoming``, when all of it was verified: the number may be condemned now, and not the file. CacheError."""
        place = self._root / "incoming" / f"{nar.number:012x}.{next(self._serial)}.nar"
        try:
            nar.path = nar.path.rename(place)
        except OSError as error:
            raise cache_error(error, place, "write to") from error

    def admit(self, number: int, verified: VerifiedNar) -> None:
        """Gives a verified file its name, then its row. CacheError (and the file is gone) when either fails."""
        incoming = verified.incoming
        row = self._index.path(number)
        try:
            if row is None or row.quarantined or incoming.fileno < 0:
                raise CacheError(f"no place for the NAR of path {number:012x}", where=str(incoming.path))
            size = os.fstat(incoming.fileno).st_size
            if (verified.nar_hash, verified.nar_size, size) != (row.nar_hash, row.nar_size, row.nar_size):
                raise CacheError(f"the NAR is not the one of {row.store_path}", where=str(incoming.path))
            final = self.path(number)
            self._fault("nar.before_rename")
            try:
                os.fchmod(incoming.fileno, 0o444)
                rename_published(incoming.path, final)
            except OSError as error:
                raise cache_error(error, final, "write to") from error
        except BaseException:
            incoming.discard()
            raise
        self._fault("nar.renamed")
        try:
            incoming.finish()  # network file systems tell here that the disk is full
            (self._root / sparse_file(number)).unlink(missing_ok=True)  # whoever reads it keeps it
            self._index.set_nar(number, NarState.WHOLE, disk_size(size))
        except OSError as error:
            final.unlink(missing_ok=True)
            raise cache_error(error, final, "write to") from error
        except CacheError:
            final.unlink(missing_ok=True)
            raise
        self._fault("nar.recorded")

    def drop(self, number: int) -> None:
        """Unlinks the file, then its row. Open readers are not disturbed."""
        for file in self.files(number):
            _unlink(file)
        self._fault("nar.unlinked")
        self._index.set_nar(number, NarState.NONE)

    def set_aside(self, incoming: IncomingNar) -> None:
        """Ends a NAR whose bytes turned out wrong: into ``quarantine/``, where only the last few stay."""
        if incoming.fileno < 0:
            return
        incoming.finish()
        place = self._root / "quarantine"
        try:
            incoming.path.rename(place / f"{incoming.number:012x}.{next(self._serial)}.nar")
            kept = sorted(place.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        except OSError as error:
            incoming.path.unlink(missing_ok=True)
            raise cache_error(error, place, "write to") from error
        for file in kept[:-KEPT_QUARANTINED]:
            file.unlink(missing_ok=True)

    def empty_quarantine(self) -> int:
        """Removes what was set aside; returns the bytes."""
        freed = 0
        for file in (self._root / "quarantine").iterdir():
            freed += disk_size(file.stat().st_size)
            file.unlink(missing_ok=True)
        return freed

    def free(self) -> int:
        """Bytes that the file system still takes from us."""
        try:
            status = os.statvfs(self._root)
        except OSError as error:
            raise cache_error(error, self._root, "read") from error
        return status.f_bavail * status.f_frsize

    def _room(self, nar_size: int) -> None:
        if nar_size and self.free() < nar_size:
            raise CacheFullError(
                f"no space for a NAR of {nar_size} bytes",
                where=str(self._root),
                hint="make room, or lower the cache's limit: veneer gc --max-size",
            )


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise cache_error(error, path, "remove from") from error
