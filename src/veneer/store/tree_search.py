"""Finds files in a tree index as programs do: by a path with links in it, or a library by its name. Pure."""

from __future__ import annotations

from itertools import islice

from veneer.formats.tree_index import Entry, Kind, TreeIndex

LINKS = 16
"""That are followed in one tree."""
MAX_SEARCHED = 16 << 20
"""Bytes of a tree index in which names are searched for."""
SHORTEST = 4
"""Bytes of a name that is searched for: shorter ones are in every tree."""
SAME = 8
"""Entries of the same name that are looked at."""
_USUAL = (b"lib", b"lib64")


def follow(tree: TreeIndex, below: bytes) -> Entry | bytes | None:
    """The file at a path below the root, links followed; the absolute path that a link leads to; None: there is no file. FormatError."""
    done: list[bytes] = []
    left = _names(below)
    links = 0
    while True:
        entry = tree.find(b"/".join(done))
        if entry is None:
            return None
        if entry.kind is Kind.LINK:
            links += 1
            target = tree.target(entry.number)
            if target.startswith(b"/"):
                return b"/".join([target, *reversed(left)])
            if links > LINKS or not done:
                return None
            done.pop()
            left += _names(target)
        elif not left:
            return entry if entry.kind <= Kind.EXECUTABLE else None
        while left:
            name = left.pop()
            if name != b"..":
                done.append(name)
                break
            if not done:
                return None  # out of the store path
            done.pop()


def find_library(tree: TreeIndex, name: bytes) -> Entry | bytes | None:
    """The library ``name``, wherever it stands, as in ``follow``: where libraries usually are, or else next to the root. FormatError."""
    for directory in _USUAL:
        found = follow(tree, directory + b"/" + name)
        if found is not None:
            return found
    if len(name) < SHORTEST or len(tree.buffer) > MAX_SEARCHED:
        return None
    for entry in islice(tree.named(name), SAME):
        found = follow(tree, tree.path(entry.number))
        if found is not None:
            return found
    return None


def _names(path: bytes) -> list[bytes]:
    """The last one first."""
    return [name for name in reversed(path.split(b"/")) if name not in (b"", b".")]
