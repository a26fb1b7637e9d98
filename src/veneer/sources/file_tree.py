"""A store path's files as a tree and as a NAR, read below one directory descriptor. Blocks; for worker threads.

Names are bytes. No link is followed: every step opens one name of a directory that is already open, with ``O_NOFOLLOW``,
so that nobody can lead the reader out of the path by replacing a directory with a link. This needs one descriptor per
level. Files that were replaced between the walk and the reading show as a wrong size here, or as a wrong hash to whoever
checks the NAR.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress

from veneer.formats.nar import DirectoryEnd, DirectoryStart, events_of, nar_of, with_offsets
from veneer.formats.nar import File as FileEvent
from veneer.model.errors import FormatError, LimitError
from veneer.model.tree import MAX_DEPTH, MAX_ENTRIES, Directory, Node, RegularFile, Symlink

PIECE = 1 << 20
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def tree_below(parent: int, name: bytes) -> Node:
    """The tree of ``name`` in the directory ``parent``, offsets included. Reads no content.

    OSError; FormatError for what a store cannot hold (sockets, devices); LimitError.
    """
    found: list[tuple[bytes, Node]] = []
    count = 0
    levels: list[tuple[int, Iterator[bytes], bytes, list[tuple[bytes, Node]]]] = []
    """For each open directory: descriptor, names to come, its own name, its entries so far."""
    todo: Iterator[bytes] = iter((name,))
    directory, entries = parent, found
    try:
        while True:
            for each in todo:
                count += 1
                if count > MAX_ENTRIES:
                    raise LimitError(f"more than {MAX_ENTRIES} entries", where="store path")
                status = os.stat(each, dir_fd=directory, follow_symlinks=False)
                mode = status.st_mode
                if stat.S_ISREG(mode):
                    entries.append((each, RegularFile(status.st_size, bool(mode & stat.S_IXUSR), 0)))
                elif stat.S_ISLNK(mode):
                    entries.append((each, Symlink(os.readlink(each, dir_fd=directory))))
                elif stat.S_ISDIR(mode):
                    if len(levels) >= MAX_DEPTH:
                        raise LimitError(
                            f"more than {MAX_DEPTH} directories inside each other", where="store path"
                        )
                    inner = os.open(each, _DIRECTORY, dir_fd=directory)
                    levels.append((inner, todo, each, entries))
                    with os.scandir(inner) as scan:
                        todo = iter(sorted(os.fsencode(entry.name) for entry in scan))
                    directory, entries = inner, []
                    break
                else:
                    raise FormatError(
                        f"neither a file nor a directory nor a link: {each!r}", where="store path"
                    )
            else:
                if not levels:
                    return with_offsets(found[0][1])
                closed, todo, own, outer = levels.pop()
                os.close(closed)
                outer.append((own, Directory(tuple(entries))))
                entries = outer
                directory = levels[-1][0] if levels else parent
    finally:
        for opened, *_ in levels:
            os.close(opened)


def nar_below(parent: int, name: bytes, tree: Node) -> Iterator[bytes]:
    """The NAR of ``tree``, which was walked there before, in pieces of 64 KiB to 1 MiB.

    OSError; FormatError when a file is not of its size any more. ``parent`` stays open until the iterator is closed.
    """
    files = _Files(parent, name, tree)
    try:
        yield from nar_of(tree, lambda file: files.read(file.size))
    finally:
        files.close()


class _Files:
    """Opens the tree's files one after the other, in the order of the NAR."""

    def __init__(self, parent: int, name: bytes, tree: Node) -> None:
        self._parent = parent
        self._name = name
        self._events = events_of(tree)
        self._open: list[int] = []
        """Of the directories around the next file."""

    def read(self, size: int) -> Iterator[bytes]:
        """The next file's content: at most one byte more than ``size``."""
        descriptor = self._next()
        try:
            left = size + 1
            while left and (data := os.read(descriptor, min(PIECE, left))):
                left -= len(data)
                yield data
        finally:
            os.close(descriptor)

    def close(self) -> None:
        for descriptor in self._open:
            with suppress(OSError):
                os.close(descriptor)
        self._open.clear()

    def _next(self) -> int:
        for event in self._events:
            at = self._open[-1] if self._open else self._parent
            if isinstance(event, FileEvent):
                return os.open(event.name or self._name, _FILE, dir_fd=at)
            if isinstance(event, DirectoryStart):
                self._open.append(os.open(event.name or self._name, _DIRECTORY, dir_fd=at))
            elif isinstance(event, DirectoryEnd):
                os.close(self._open.pop())
        raise AssertionError("more files than the tree has")
