"""A second NAR parser, written from the Nix manual's grammar alone: slow, recursive, whole input in memory.

The fuzz targets compare it with ``veneer.formats.nar``, which works on pieces and shares no line with it.
"""

from __future__ import annotations

from veneer.model.tree import MAX_NAME, MAX_TARGET, Directory, Node, RegularFile, Symlink

MAX_DEPTH = 200
"""Deeper ones are not compared: this parser recurses."""


class RefusedError(Exception):
    """Not a NAR as the manual describes it."""


class TooDeepError(Exception):
    """Beyond what this parser can tell."""


def parse(data: bytes) -> Node:
    """The tree of a whole NAR, files with their offsets."""
    reader = _Reader(data)
    reader.expect(b"nix-archive-1")
    node = reader.node(0)
    if reader.at != len(data):
        raise RefusedError("something follows")
    return node


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        piece = self.data[self.at : self.at + size]
        if len(piece) != size:
            raise RefusedError("too short")
        self.at += size
        return piece

    def string(self) -> bytes:
        size = int.from_bytes(self.take(8), "little")
        text = self.take(size)
        if any(self.take(-size % 8)):
            raise RefusedError("padding")
        return text

    def expect(self, word: bytes) -> None:
        if self.string() != word:
            raise RefusedError(f"no {word!r}")

    def node(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise TooDeepError
        self.expect(b"(")
        self.expect(b"type")
        made: Node
        match self.string():
            case b"regular":
                word = self.string()
                if executable := word == b"executable":
                    self.expect(b"")
                    word = self.string()
                if word != b"contents":
                    raise RefusedError("no contents")
                offset = self.at + 8
                made = RegularFile(len(self.string()), executable, offset)
                self.expect(b")")
            case b"symlink":
                self.expect(b"target")
                target = self.string()
                if not 0 < len(target) <= MAX_TARGET or b"\0" in target:
                    raise RefusedError("target")
                made = Symlink(target)
                self.expect(b")")
            case b"directory":
                made = self.directory(depth)
            case _:
                raise RefusedError("type")
        return made

    def directory(self, depth: int) -> Directory:
        entries: list[tuple[bytes, Node]] = []
        while (word := self.string()) == b"entry":
            self.expect(b"(")
            self.expect(b"name")
            name = self.string()
            if not 0 < len(name) <= MAX_NAME or name in (b".", b"..") or b"/" in name or b"\0" in name:
                raise RefusedError("name")
            if entries and name <= entries[-1][0]:
                raise RefusedError("order")
            self.expect(b"node")
            entries.append((name, self.node(depth + 1)))
            self.expect(b")")
        if word != b")":
            raise RefusedError("neither entry nor end")
        return Directory(tuple(entries))
