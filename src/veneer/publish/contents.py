"""Where the bytes of a published path come from: a NAR file of the cache, or a directory tree."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

from veneer.formats.nar import NarParser, TreeBuilder, nar_of, with_offsets
from veneer.model.errors import FormatError
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.tree import Directory, Node, RegularFile, Symlink

Nar = Callable[[Iterable[int]], Iterable[bytes]]
"""A NAR, to be read once: its bytes, cut where they are told, at ascending offsets of which the last is its size."""
Content = tuple[Node, Nar]
"""(tree with canonical offsets, its NAR)."""
Contents = Callable[[UnverifiedPathInfo], AbstractContextManager[Content]]
"""Opens the content of a path; called from several threads. VeneerError, OSError."""

_PIECE = 1 << 20
_HEADERS = 128 << 10
"""Bytes of a NAR that are read at once for what lies between its files' contents."""


@contextmanager
def nar_file(descriptor: int) -> Iterator[Content]:
    """A whole NAR file, open for reading; closed in the end. FormatError when it is not a NAR."""
    with open(descriptor, "rb", buffering=0) as file:
        yield _tree(file.fileno()), partial(_cut_file, file.fileno())


def directory_tree(path: Path) -> Content:
    """Files as they lie on disk: what Nix would archive. FormatError for what a NAR cannot hold, OSError."""
    bare, files = _scan(path)
    tree = with_offsets(bare)
    where = dict(zip((file.offset for file in files_of(tree)), files, strict=True))

    def read(file: RegularFile) -> Iterator[bytes]:
        with open(where[file.offset], "rb", buffering=0) as opened:
            yield from _pieces(opened.fileno())

    return tree, in_pieces(nar_of(tree, read))


def in_pieces(pieces: Iterable[bytes]) -> Nar:
    """A NAR out of pieces of any size."""
    return partial(_cut_pieces, pieces)


def _cut_pieces(pieces: Iterable[bytes], ends: Iterable[int]) -> Iterator[bytes]:
    """The bytes of ``pieces``, cut at ``ends``. More of them than the last end are an error: FormatError."""
    following = iter(ends)
    end = next(following, None)
    held: list[bytes] = []
    position = 0
    for piece in pieces:
        at = 0
        while end is not None and position + len(piece) - at >= end:
            taken = end - position
            held.append(piece[at : at + taken])
            at += taken
            position = end
            yield held[0] if len(held) == 1 else b"".join(held)
            held.clear()
            end = next(following, None)
        if at < len(piece):
            if end is None:
                raise FormatError(f"a NAR of more than the {position} bytes of its tree", where="NAR")
            held.append(piece[at:] if at else piece)
            position += len(piece) - at
    if held:
        yield b"".join(held)


def _tree(descriptor: int) -> Node:
    """Of a NAR file; what its files contain is passed over."""
    parser, builder, offset = NarParser(), TreeBuilder(), 0
    while piece := os.pread(descriptor, _HEADERS, offset):
        builder.add(parser.feed(piece))
        offset += len(piece) + parser.skip()
    parser.finish()
    return builder.tree()


def _cut_file(descriptor: int, ends: Iterable[int]) -> Iterator[bytes]:
    """Fewer bytes where the file ends before."""
    start = 0
    for end in ends:
        part = os.pread(descriptor, end - start, start)
        while len(part) < end - start and (
            more := os.pread(descriptor, end - start - len(part), start + len(part))
        ):
            part += more  # some file systems give less than was asked for
        yield part
        start = end


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


def files_of(tree: Node) -> Iterator[RegularFile]:
    """In the order of the tree's NAR."""
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
