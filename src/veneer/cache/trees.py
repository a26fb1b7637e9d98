"""Tree index files (``formats.tree_index``): written once, renamed into place, mapped by mount servers.

T1  First the file's name, then its row (``Index.set_tree``), as for NARs; dropping the other way round. A tree that is
    replaced (a listing's by the NAR's own) is replaced by rename: who has mapped the old one keeps it.
T2  No fsync, as for NARs: after a change of the boot id recovery checks the digest inside, or drops the file.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from veneer.formats.tree_index import TreeIndex, tree_file
from veneer.model.errors import FormatError

from .directory import cache_error, rename_published
from .index import Index, TreeState

Bytes = bytes | bytearray | memoryview
_SMALL = 1 << 20


class Trees:
    """The tree files of one cache. ``publish`` and ``drop`` belong to the index's thread; the rest may be called anywhere."""

    def __init__(self, root: Path, index: Index, fault: Callable[[str], None] = lambda step: None) -> None:
        self._root = root
        self._index = index
        self._fault = fault
        self._serial = itertools.count()

    def path(self, number: int) -> Path:
        return self._root / tree_file(number)

    def open(self, number: int) -> TreeIndex:
        """The published tree, for a look. FormatError: it is damaged, or was evicted just now.

        A small one is read. A large one is mapped, and was read through before: what a failing disk does not give is an error
        here, and would be our end at a page that is mapped.
        """
        path = self.path(number)
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size <= _SMALL:
                    return TreeIndex(file.read())
                for at in range(0, size, _SMALL):
                    os.pread(file.fileno(), _SMALL, at)
                return TreeIndex(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise FormatError(f"the tree cannot be read: {error}", where=str(path)) from error

    def has(self, number: int) -> bool:
        """Whether the file is there, on disk."""
        return self.path(number).is_file()

    def put(self, number: int, chunks: Bytes | Iterable[Bytes]) -> int:
        """Writes the file, without its row; returns its size for ``Index.set_tree``. CacheError, and nothing is left."""
        if isinstance(chunks, Bytes):
            chunks = (chunks,)
        final = self.path(number)
        temporary = self._root / "incoming" / f"{number:012x}.{next(self._serial)}.tree"
        size = 0
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
            try:
                with open(fd, "wb", buffering=0) as file:
                    for chunk in chunks:
                        rest = memoryview(chunk)
                        while rest:
                            written = file.write(rest)
                            rest = rest[written:]
                            size += written
                    os.fchmod(fd, 0o444)  # whatever the umask
                self._fault("tree.before_rename")
                rename_published(temporary, final)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise cache_error(error, final, "write to") from error
        self._fault("tree.renamed")
        return size

    def publish(self, number: int, chunks: Bytes | Iterable[Bytes], state: TreeState) -> None:
        """``put`` and the row."""
        self._index.set_tree(number, state, self.put(number, chunks))
        self._fault("tree.recorded")

    def drop(self, number: int) -> None:
        """Unlinks the file, then its row."""
        try:
            self.path(number).unlink(missing_ok=True)
        except OSError as error:
            raise cache_error(error, self.path(number), "remove from") from error
        self._fault("tree.unlinked")
        self._index.set_tree(number, TreeState.NONE)
