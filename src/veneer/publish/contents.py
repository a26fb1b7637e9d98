"""Where the bytes of a published path come from: a NAR file of the cache, or a directory tree."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from veneer.formats.nar import nar_of, tree_of_nar, with_offsets
from veneer.model.errors import FormatError
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.tree import Directory, Node, RegularFile, Symlink

Content = tuple[Node, Iterable[bytes]]
"""(tree with canonical offsets, its NAR in pieces, to be read once)."""
Contents = Callable[[UnverifiedPathInfo], AbstractContextManager[Content]]
"""Opens the content of a path; called from several threads. VeneerError, OSError."""

_PIECE = 1 << 20


@contextmanager
def nar_file(descriptor: int) -> Iterator[Content]:
    """A whole NAR file, open for reading; closed in the end. FormatError when it is not a NAR."""
    with open(descriptor, "rb", buffering=0) as file:
        yield tree_of_nar(_pieces(file.fileno())), _pieces(file.fileno())


def directory_tree(path: Path) -> Content:
    """Files as they lie on disk: what Nix would archive. FormatError for what a NAR cannot hold, OSError."""
    bare, files = _scan(path)
    tree = with_offsets(bare)
    where = dict(zip((file.offset for file in _files(tree)), files, strict=True))

    def read(file: RegularFile) -> Iterator[bytes]:
        with open(where[file.offset], "rb", buffering=0) as opened:
            yield from _pieces(opened.fileno())

    return tree, nar_of(tree, read)


def _scan(top: Path) -> tuple[Node, list[bytes]]:
    """(tree, its files in the NAR's order). Does not recurse: trees may be deeper than Python's stack."""
    files: list[bytes] = []
    root: list[tuple[bytes, Node]] = []
    stack: list[tuple[bytes, bytes, Iterator[bytes], list[tuple[bytes, Node]]]] = [
        (b"", b"", iter((os.fsencode(top),)), root)
    ]
    while True:
        own, place, names, entries = stack[-1]
        for name in names:
            path = place + b"/" + name if place else name
            found = os.lstat(path)
            kept = name if len(stack) > 1 else b""
            if stat.S_ISDIR(found.st_mode):
                stack.append((kept, path, iter(sorted(_names(path))), []))
                break
            if stat.S_ISREG(found.st_mode):
                files.append(path)
                entries.append((kept, RegularFile(found.st_size, bool(found.st_mode & stat.S_IXUSR), 0)))
            elif stat.S_ISLNK(found.st_mode):
                entries.append((kept, Symlink(os.readlink(path))))  # noqa: PTH115 - bytes
            else:
                raise FormatError("neither a file, a directory nor a link", where=os.fsdecode(path))
        else:
            stack.pop()
            if not stack:
                return root[0][1], files
            stack[-1][3].append((own, Directory(tuple(entries))))


def _names(directory: bytes) -> list[bytes]:
    with os.scandir(directory) as entries:
        return [entry.name for entry in entries]


def _files(tree: Node) -> Iterator[RegularFile]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, RegularFile):
            yield node
        elif isinstance(node, Directory):
            waiting.extend(child for _, child in reversed(node.entries))


def _pieces(descriptor: int) -> Iterator[bytes]:
    offset = 0
    while piece := os.pread(descriptor, _PIECE, offset):
        yield piece
        offset += len(piece)
