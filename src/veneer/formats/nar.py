"""NAR: a file system tree as one canonical stream of bytes.

Source: the Nix manual ("Nix Archive (NAR) format"), Dolstra's thesis (figure 5.2); checked against real Nix (tests/golden).

    nar     = str("nix-archive-1") node
    node    = str("(") str("type") body str(")")
    body    = str("regular") [ str("executable") str("") ] str("contents") str(content)
            | str("symlink") str("target") str(target)
            | str("directory") { str("entry") str("(") str("name") str(name) str("node") node str(")") }
    str(s)  = u64 little-endian length, s, zero bytes up to a multiple of 8

There is one NAR for a tree: entries stand in strictly ascending byte order of their names. So every position in it
follows from names, sizes, executable bits and link targets (``Layout``).

Limits, enforced here (``veneer.model.tree`` has the numbers): names of 1 to MAX_NAME bytes, not ``.`` or ``..``, no
``/`` or NUL; link targets of 1 to MAX_TARGET bytes without NUL; at most MAX_DEPTH directories inside each other;
at most MAX_ENTRIES entries; files and the whole below 2^63 bytes. Padding must be zero. NarSize and NarHash are checked
by whoever asked for the NAR.

In the wild: old Nix accepted ``regular`` without ``contents``, repeated attributes and unsorted entries. No Nix wrote
them, and two spellings of one tree would break the offsets: refused. Names need not be UTF-8.

Memory: the parser holds at most one header (about 5 KiB) besides the chunk it was given; content is skipped, not copied.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from veneer.model.errors import FormatError, LimitError, TruncatedError
from veneer.model.tree import (
    MAX_DEPTH,
    MAX_ENTRIES,
    MAX_NAME,
    MAX_TARGET,
    Directory,
    Node,
    RegularFile,
    Symlink,
)

MAX_NAR_SIZE = (1 << 63) - 1
_U64 = struct.Struct("<Q")


def _string(data: bytes) -> bytes:
    return _U64.pack(len(data)) + data + bytes(-len(data) & 7)


def _tokens(text: str) -> bytes:
    return b"".join(_string(word.encode()) for word in text.split())


_MAGIC = _tokens("nix-archive-1")
_REGULAR = _tokens("( type regular contents")  # then the size
_EXECUTABLE = _tokens("( type regular executable") + _string(b"") + _tokens("contents")  # then the size
_SYMLINK = _tokens("( type symlink target")  # then the length
_DIRECTORY = _tokens("( type directory")
_ENTRY = _tokens("entry ( name")
_ENTRY_HEADER = len(_ENTRY) + 8  # with the name's length
_NODE = _tokens("node")
_CLOSE = _tokens(")")
_TAIL_OF_ROOT = [bytes(padding) + _CLOSE for padding in range(8)]
_TAIL_IN_DIRECTORY = [bytes(padding) + _CLOSE * 2 for padding in range(8)]
_NODE_AFTER = [bytes(padding) + _NODE for padding in range(8)]
_NODE_LOOKAHEAD = len(_DIRECTORY) + len(_CLOSE)
"""Bytes that follow the beginning of every node at least: enough to tell the kinds apart."""
_PIECE = 64 << 10


@dataclass(frozen=True, slots=True)
class DirectoryStart:
    """A directory; its entries follow, then DirectoryEnd. The root's name is ``b""``, here and below."""

    name: bytes


@dataclass(frozen=True, slots=True)
class DirectoryEnd:
    """The end of the innermost open directory."""


@dataclass(frozen=True, slots=True)
class File:
    """A regular file of ``size`` bytes, the first of which is byte ``offset`` of the NAR."""

    name: bytes
    size: int
    executable: bool
    offset: int


@dataclass(frozen=True, slots=True)
class FileData:
    """Some bytes of the last File, in order, never empty. Only with ``NarParser(contents=True)``."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link."""

    name: bytes
    target: bytes


TreeEvent = DirectoryStart | DirectoryEnd | File | Link
Event = TreeEvent | FileData
_DIRECTORY_END = DirectoryEnd()


def name_fault(name: bytes, previous: bytes) -> str | None:
    """Why ``name`` may not follow ``previous`` (``b""`` for none) in a directory; None when it may."""
    if not 0 < len(name) <= MAX_NAME:
        return f"name of {len(name)} bytes, limit {MAX_NAME}"
    if b"/" in name or b"\0" in name or name == b"." or name == b"..":
        return f"name {name!r} is not allowed"
    if name <= previous:
        return f"name {name!r} after {previous!r}: not in order"
    return None


def target_fault(target: bytes) -> str | None:
    """Why ``target`` may not be a link's target; None when it may."""
    if not 0 < len(target) <= MAX_TARGET:
        return f"link target of {len(target)} bytes, limit {MAX_TARGET}"
    if b"\0" in target:
        return "NUL in a link target"
    return None


class NarParser:
    """Events out of a NAR cut anywhere. After an error it refuses everything. Not thread-safe.

    The states are the methods ``_root`` .. ``_done``: each takes the buffer and a position and gives the position after
    what it understood, or -1 when it needs more bytes.
    """

    def __init__(self, *, contents: bool = False) -> None:
        """``contents``: deliver FileData events too."""
        self._contents = contents
        self._state: Callable[[bytes, int, list[Event]], int] = self._root
        self._rest = b""
        self._base = 0  # offset in the NAR of the buffer's first byte
        self._left = 0  # bytes of the current file's content still to come
        self._padding = 0  # zero bytes after it
        self._names: list[bytes] = []  # for each open directory, the name of its last entry
        self._entries = 0

    def feed(self, data: bytes) -> list[Event]:
        """The events completed by ``data``. FormatError, LimitError."""
        buffer = self._rest + data if self._rest else data
        events: list[Event] = []
        position = 0
        try:
            while (after := self._state(buffer, position, events)) >= 0:
                position = after
        except FormatError:
            self._state = self._failed
            raise
        self._rest = buffer[position:]
        self._base += position
        return events

    def skip(self) -> int:
        """Passes over the rest of the current file's content as if it had been fed; its bytes. For files that can be read anywhere."""
        size, self._left = self._left, 0
        self._base += size
        return size

    def finish(self) -> int:
        """The NAR's size, when it is whole. FormatError otherwise."""
        if self._state != self._done:
            self._state = self._failed
            raise TruncatedError("NAR is cut short", where=f"NAR offset {self._base + len(self._rest)}")
        return self._base

    def _root(self, buffer: bytes, at: int, events: list[Event]) -> int:
        if len(buffer) - at < len(_MAGIC) + _NODE_LOOKAHEAD:
            if not _MAGIC.startswith(buffer[at : at + len(_MAGIC)]):
                raise self._error("not a NAR", at)
            return -1
        if not buffer.startswith(_MAGIC, at):
            raise self._error("not a NAR", at)
        return self._node(b"", buffer, at + len(_MAGIC), events)

    def _entry(self, buffer: bytes, at: int, events: list[Event]) -> int:
        """The next entry of the innermost directory up to its content, or the directory's end."""
        names = self._names
        if buffer.startswith(_CLOSE, at):
            inner = len(names) > 1
            end = at + len(_CLOSE) * (1 + inner)
            if len(buffer) < end:
                return -1
            if inner and not buffer.startswith(_CLOSE, at + len(_CLOSE)):
                raise self._error("directory entry not closed", at)
            names.pop()
            events.append(_DIRECTORY_END)
            if not inner:
                self._state = self._done
            return end
        start = at + _ENTRY_HEADER
        if len(buffer) < start:
            return -1
        if not buffer.startswith(_ENTRY, at):
            raise self._error("neither a directory entry nor the directory's end", at)
        length: int = _U64.unpack_from(buffer, start - 8)[0]
        if not 0 < length <= MAX_NAME:
            raise self._error(f"name of {length} bytes, limit {MAX_NAME}", at, LimitError)
        node = start + (length + 7 & -8)
        if len(buffer) < node + len(_NODE) + _NODE_LOOKAHEAD:
            return -1
        name = buffer[start : start + length]
        if (fault := name_fault(name, names[-1])) is not None:
            raise self._error(fault, at)
        if not buffer.startswith(_NODE_AFTER[-length & 7], start + length):
            raise self._error("name not followed by zero padding and a node", at)
        previous = names[-1]
        names[-1] = name
        after = self._node(name, buffer, node + len(_NODE), events)
        if after < 0:
            names[-1] = previous  # this entry will be parsed again
        return after

    def _node(self, name: bytes, buffer: bytes, node: int, events: list[Event]) -> int:
        """The node at ``node`` up to its content. At least _NODE_LOOKAHEAD bytes of it are there."""
        if buffer.startswith(_REGULAR, node):
            content = node + len(_REGULAR) + 8
            executable = False
        elif buffer.startswith(_EXECUTABLE, node):
            content = node + len(_EXECUTABLE) + 8
            executable = True
        elif buffer.startswith(_DIRECTORY, node):
            if len(self._names) >= MAX_DEPTH:
                raise self._error(f"more than {MAX_DEPTH} directories inside each other", node, LimitError)
            self._count(node)
            self._names.append(b"")
            events.append(DirectoryStart(name))
            self._state = self._entry
            return node + len(_DIRECTORY)
        elif buffer.startswith(_SYMLINK, node):
            return self._link(name, buffer, node + len(_SYMLINK) + 8, events)
        else:
            if len(buffer) - node < len(_EXECUTABLE) and _EXECUTABLE.startswith(
                buffer[node : node + len(_EXECUTABLE)]
            ):
                return -1
            raise self._error("not a regular file, symbolic link or directory", node)
        if len(buffer) < content:
            return -1
        size: int = _U64.unpack_from(buffer, content - 8)[0]
        offset = self._base + content
        if size > MAX_NAR_SIZE - offset:
            raise self._error(f"file of {size} bytes", node, LimitError)
        self._count(node)
        events.append(File(name, size, executable, offset))
        self._padding = -size & 7
        self._left = size
        self._state = self._content
        return content

    def _link(self, name: bytes, buffer: bytes, start: int, events: list[Event]) -> int:
        length: int = _U64.unpack_from(buffer, start - 8)[0]
        if not 0 < length <= MAX_TARGET:
            raise self._error(f"link target of {length} bytes, limit {MAX_TARGET}", start, LimitError)
        if len(buffer) < start + length:
            return -1
        target = buffer[start : start + length]
        if (fault := target_fault(target)) is not None:
            raise self._error(fault, start)
        self._count(start)
        events.append(Link(name, target))
        self._padding = -length & 7
        self._state = self._tail
        return start + length

    def _content(self, buffer: bytes, at: int, events: list[Event]) -> int:
        size = min(self._left, len(buffer) - at)
        if size and self._contents:
            events.append(FileData(buffer[at : at + size]))
        self._left -= size
        if self._left:
            return at + size if size else -1
        self._state = self._tail
        return at + size

    def _tail(self, buffer: bytes, at: int, _events: list[Event]) -> int:
        """Padding and closing brackets after a file's content or a link's target."""
        tail = (_TAIL_IN_DIRECTORY if self._names else _TAIL_OF_ROOT)[self._padding]
        if len(buffer) - at < len(tail):
            return -1
        if not buffer.startswith(tail, at):
            raise self._error("content not followed by zero padding and the node's end", at)
        self._state = self._entry if self._names else self._done
        return at + len(tail)

    def _done(self, buffer: bytes, at: int, _events: list[Event]) -> int:
        if len(buffer) > at:
            raise self._error("bytes after the NAR's end", at)
        return -1

    def _failed(self, _buffer: bytes, at: int, _events: list[Event]) -> int:
        raise self._error("NAR was refused before", at)

    def _count(self, at: int) -> None:
        self._entries += 1
        if self._entries > MAX_ENTRIES:
            raise self._error(f"more than {MAX_ENTRIES} entries", at, LimitError)

    def _error(self, what: str, at: int, kind: type[FormatError] = FormatError) -> FormatError:
        return kind(what, where=f"NAR offset {self._base + at}")


class TreeBuilder:
    """A tree out of the events of a NAR, which the parser has checked. Not thread-safe."""

    def __init__(self) -> None:
        self._open: list[tuple[bytes, list[tuple[bytes, Node]]]] = [(b"", [])]

    def add(self, events: Iterable[Event]) -> None:
        """Take ``events`` in their order; FileData is ignored."""
        stack = self._open
        entries = stack[-1][1]
        for event in events:
            if isinstance(event, File):
                entries.append((event.name, RegularFile(event.size, event.executable, event.offset)))
            elif isinstance(event, Link):
                entries.append((event.name, Symlink(event.target)))
            elif isinstance(event, DirectoryStart):
                entries = []
                stack.append((event.name, entries))
            elif isinstance(event, DirectoryEnd):
                name, entries = stack.pop()
                directory = Directory(tuple(entries))
                entries = stack[-1][1]
                entries.append((name, directory))

    def tree(self) -> Node:
        """The whole tree, once its last event was added. FormatError before."""
        if len(self._open) != 1 or len(self._open[0][1]) != 1:
            raise FormatError("tree is not whole", where="NAR")
        return self._open[0][1][0][1]


def tree_of_nar(chunks: Iterable[bytes]) -> Node:
    """The tree of a whole NAR. FormatError, LimitError."""
    parser, builder = NarParser(), TreeBuilder()
    for chunk in chunks:
        builder.add(parser.feed(chunk))
    parser.finish()
    return builder.tree()


class Layout:
    """Where things lie in the NAR of a tree that is told in the NAR's order. Names: ``b""`` for the root.

    ``position`` is the offset after what was told so far; in the end it is the NAR's size.
    """

    __slots__ = ("_depth", "position")

    def __init__(self) -> None:
        self.position = len(_MAGIC)
        self._depth = 0

    def directory_start(self, name: bytes) -> None:
        self._depth += 1
        self.position += self._before(name) + len(_DIRECTORY)

    def directory_end(self) -> None:
        self._depth -= 1
        self.position += len(_CLOSE) * (2 if self._depth else 1)

    def file(self, name: bytes, size: int, executable: bool) -> int:
        """The offset of the file's first byte."""
        header = _EXECUTABLE if executable else _REGULAR
        offset = self.position + self._before(name) + len(header) + 8
        self.position = offset + (size + 7 & -8) + len(_CLOSE) * (2 if name else 1)
        return offset

    def link(self, name: bytes, target: bytes) -> None:
        self.position += self._before(name) + len(_SYMLINK) + 8 + (len(target) + 7 & -8)
        self.position += len(_CLOSE) * (2 if name else 1)

    @staticmethod
    def _before(name: bytes) -> int:
        """Bytes between an entry's beginning and its node."""
        return _ENTRY_HEADER + (len(name) + 7 & -8) + len(_NODE) if name else 0


def events_of(node: Node, layout: Layout | None = None) -> Iterator[TreeEvent]:
    """The events that parsing the NAR of ``node`` would give, with canonical offsets whatever the tree says.

    ``layout``: a fresh one, for callers who want its position. Checks nothing; does not recurse.
    """
    layout = Layout() if layout is None else layout
    open_directories: list[Iterator[tuple[bytes, Node]]] = [iter(((b"", node),))]
    while True:
        for name, child in open_directories[-1]:
            if isinstance(child, RegularFile):
                offset = layout.file(name, child.size, child.executable)
                yield File(name, child.size, child.executable, offset)
            elif isinstance(child, Symlink):
                layout.link(name, child.target)
                yield Link(name, child.target)
            else:
                layout.directory_start(name)
                yield DirectoryStart(name)
                open_directories.append(iter(child.entries))
                break
        else:
            open_directories.pop()
            if not open_directories:
                return
            layout.directory_end()
            yield _DIRECTORY_END


def with_offsets(node: Node) -> Node:
    """The same tree with every file's canonical offset."""
    builder = TreeBuilder()
    builder.add(events_of(node))
    return builder.tree()


def nar_size(node: Node) -> int:
    """The size in bytes of the NAR of ``node``."""
    layout = Layout()
    for _ in events_of(node, layout):
        pass
    return layout.position


def nar_of(node: Node, read: Callable[[RegularFile], Iterable[bytes]]) -> Iterator[bytes]:
    """The NAR of ``node`` in pieces of about 64 KiB, or as large as what ``read`` gives.

    ``read`` gives a file's content in pieces. It is asked once per file, in the NAR's order, and is given the file with
    its canonical offset, which no other file of the tree shares. FormatError when the content is not of the declared
    size, and for a tree whose NAR the parser would refuse; some pieces may have come out before.
    """
    pending = bytearray()
    for piece in _pieces(node):
        if isinstance(piece, bytes):
            pending += piece
        else:
            left = piece.size
            for data in read(piece):
                left -= len(data)
                if left < 0:
                    break
                if len(data) >= _PIECE:
                    if pending:
                        yield bytes(pending)
                        pending.clear()
                    yield data
                else:
                    pending += data
            if left:
                text = "more" if left < 0 else f"{left} bytes less"
                raise FormatError(
                    f"a file has {text} than its declared {piece.size} bytes",
                    where=f"NAR offset {piece.offset}",
                )
        if len(pending) >= _PIECE:
            yield bytes(pending)
            pending.clear()
    if pending:
        yield bytes(pending)


def _pieces(node: Node) -> Iterator[bytes | RegularFile]:
    """The NAR's bytes, with a RegularFile (its offset canonical) in place of each content. Checks names and targets."""
    yield _MAGIC
    names: list[bytes] = []
    entries = 0
    for event in events_of(node):
        if isinstance(event, DirectoryEnd):
            names.pop()
            yield _CLOSE * 2 if names else _CLOSE
            continue
        entries += 1
        if entries > MAX_ENTRIES:
            raise LimitError(f"more than {MAX_ENTRIES} entries", where="NAR")
        name, before = event.name, b""
        if names:
            if (fault := name_fault(name, names[-1])) is not None:
                raise FormatError(fault, where="NAR")
            names[-1] = name
            before = _ENTRY + _string(name) + _NODE
        if isinstance(event, DirectoryStart):
            if len(names) >= MAX_DEPTH:
                raise LimitError(f"more than {MAX_DEPTH} directories inside each other", where="NAR")
            names.append(b"")
            yield before + _DIRECTORY
            continue
        tails = _TAIL_IN_DIRECTORY if names else _TAIL_OF_ROOT
        if isinstance(event, Link):
            if (fault := target_fault(event.target)) is not None:
                raise FormatError(fault, where="NAR")
            yield (
                before
                + _SYMLINK
                + _U64.pack(len(event.target))
                + event.target
                + tails[-len(event.target) & 7]
            )
        else:
            if not 0 <= event.size <= MAX_NAR_SIZE - event.offset:
                raise LimitError(f"file of {event.size} bytes", where="NAR")
            yield before + (_EXECUTABLE if event.executable else _REGULAR) + _U64.pack(event.size)
            yield RegularFile(event.size, event.executable, event.offset)
            yield tails[-event.size & 7]
