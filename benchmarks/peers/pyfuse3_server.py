"""The tree of ``floor.c`` served with pyfuse3, as its documentation would have it done. Runs in a virtual environment of
its own: pyfuse3 is no dependency of this project.

usage: pyfuse3_server.py MANIFEST CONTENT MOUNTPOINT        serves until unmounted

Entries and attributes (absent names too) are valid for ever, pages are kept between opens, attributes are made once at
the start. What floor.c can and this cannot: refuse OPEN and OPENDIR for good, have more than one thread.
"""

from __future__ import annotations

import os
import stat
import sys

import pyfuse3  # type: ignore[import-not-found]
import trio  # type: ignore[import-not-found]

FOR_EVER = 1e9


class Tree(pyfuse3.Operations):  # type: ignore[misc]
    """Node id of an entry = number of its line in the manifest + 1."""

    def __init__(self, manifest: str, content: int) -> None:
        super().__init__()
        self._content = content
        self._attributes = []
        self._offsets = []
        self._children: list[list[tuple[bytes, int]]] = []
        self._entries = {}
        with open(manifest, "rb") as lines:
            for number, line in enumerate(lines):
                parent, kind, offset, size, name = line.rstrip(b"\n").split(b" ", 4)
                self._attributes.append(_attributes(number + 1, kind, int(size)))
                self._offsets.append(int(offset))
                self._children.append([])
                if number:
                    self._children[int(parent)].append((name, number))
                    self._entries[int(parent) + 1, name] = self._attributes[number]
        self._absent = pyfuse3.EntryAttributes()
        self._absent.st_ino = 0
        self._absent.entry_timeout = FOR_EVER

    async def lookup(self, parent, name, context):  # type: ignore[no-untyped-def]
        return self._entries.get((parent, name), self._absent)

    async def getattr(self, node, context):  # type: ignore[no-untyped-def]
        return self._attributes[node - 1]

    async def open(self, node, flags, context):  # type: ignore[no-untyped-def]
        return pyfuse3.FileInfo(fh=node, keep_cache=True)

    async def opendir(self, node, context):  # type: ignore[no-untyped-def]
        return node

    async def readdir(self, node, start, token):  # type: ignore[no-untyped-def]
        children = self._children[node - 1]
        for place in range(start, len(children)):
            name, number = children[place]
            if not pyfuse3.readdir_reply(token, name, self._attributes[number], place + 1):
                break

    async def statfs(self, context):  # type: ignore[no-untyped-def]
        """overlayfs asks when it is mounted."""
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = 4096
        answer.f_namemax = 255
        return answer

    async def read(self, node, offset, size):  # type: ignore[no-untyped-def]
        left = self._attributes[node - 1].st_size - offset
        return os.pread(self._content, max(0, min(size, left)), self._offsets[node - 1] + offset)


def _attributes(node: int, kind: bytes, size: int) -> pyfuse3.EntryAttributes:
    made = pyfuse3.EntryAttributes()
    made.st_ino = node
    made.st_mode = {b"d": stat.S_IFDIR | 0o555, b"f": stat.S_IFREG | 0o444, b"x": stat.S_IFREG | 0o555}[kind]
    made.st_nlink = 1
    made.st_size = size
    made.st_blocks = (size + 511) // 512
    made.st_blksize = 4096
    made.st_atime_ns = made.st_mtime_ns = made.st_ctime_ns = 1_000_000_000
    made.entry_timeout = made.attr_timeout = FOR_EVER
    return made


def main() -> int:
    if len(sys.argv) != 4:
        print(__doc__, file=sys.stderr)
        return 2
    manifest, content, mountpoint = sys.argv[1:]
    tree = Tree(manifest, os.open(content, os.O_RDONLY | os.O_CLOEXEC))
    pyfuse3.init(tree, mountpoint, {"fsname=pyfuse3", "ro", "allow_other", "default_permissions"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
