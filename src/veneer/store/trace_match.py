"""Which store path of today stands for one of a trace, when its own is not there any more. Pure.

A rebuild changes the hash part, an update the version too. So: the same name; else the same name up to the version, and the
same output. Each path of today stands for one at most, and none of the trace's own for another.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence

from veneer.formats.trace import Ranges, TracedFile, clip, coalesce
from veneer.formats.tree_index import Kind, TreeIndex
from veneer.model.store_path import StorePath

_VERSION = re.compile(r"-(?=[^A-Za-z])")
"""Where the version begins, as Nix has it (builtins.parseDrvName)."""
_OUTPUT = re.compile(r"-([a-z]+)$")


def stem(name: str) -> tuple[str, str]:
    """(name up to the version, output) of a store path's name: ``openssl-3.0.7-dev`` gives ``("openssl", "dev")``."""
    base, *version = _VERSION.split(name, maxsplit=1)
    output = _OUTPUT.search(version[0]) if version else None
    return base, output[1] if output else ""


def successors(
    changed: Sequence[StorePath], closure: Iterable[StorePath], kept: Iterable[StorePath]
) -> dict[StorePath, StorePath]:
    """Path of the trace -> path of the closure. ``kept``: paths of the trace that stand for themselves."""
    free = sorted(set(closure) - set(kept))
    found: dict[StorePath, StorePath] = {}
    for alike in (_name, _stem):
        taken = set(found.values())
        left: dict[tuple[str, str], deque[StorePath]] = {}
        for path in free:
            if path not in taken:
                left.setdefault(alike(path), deque()).append(path)
        for path in changed:
            if path not in found and left.get(alike(path)):
                found[path] = left[alike(path)].popleft()
    return found


def _name(path: StorePath) -> tuple[str, str]:
    return path.name, ""


def _stem(path: StorePath) -> tuple[str, str]:
    return stem(path.name)


def nar_ranges(files: Iterable[TracedFile], tree: TreeIndex) -> Ranges:
    """Where in the NAR the files' parts lie, in order. Files that the tree has not are left out, parts beyond a file's end as well.

    A file that was read whole is wanted whole, whatever its size is now.
    """
    return coalesce(
        (entry.offset + offset, size)
        for file in files
        if (entry := tree.find(file.name)) is not None and entry.kind <= Kind.EXECUTABLE
        for offset, size in (((0, entry.size),) if file.is_whole else clip(file.ranges, entry.size))
    )
