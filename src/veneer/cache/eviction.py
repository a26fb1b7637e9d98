"""What to drop when space is wanted: a pure plan. ``Cache.evict`` carries it out.

Whole NARs go first, least recently used first; never pinned ones, never ``busy`` ones. Trees are small and make
``stat`` free, so they stay, except those unused for TREE_REST seconds and only when the NARs were not enough.
Once the limit is passed, eviction goes on to FLOOR of it, so that it does not run again for the next NAR.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

from veneer.model.store_path import StorePath

FLOOR = 0.9
TREE_REST = 30 * 86400.0
"""Seconds without use after which a tree may go."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that could go. ``size``: bytes on disk."""

    number: int
    store_path: StorePath
    size: int


@dataclass(frozen=True, slots=True)
class Drop:
    """One step: unlink this path's tree file, or else its NAR file."""

    number: int
    store_path: StorePath
    size: int
    tree: bool


def excess(used: int, limit: int | None, need: int, free: int | None) -> int:
    """Bytes to drop so that ``need`` more fit into the limit and into the ``free`` bytes of the disk (None: unknown)."""
    bytes_over = 0
    if limit is not None and used + need > limit:
        bytes_over = used - max(0, min(int(limit * FLOOR), limit - need))
    if free is not None and need > free:
        bytes_over = max(bytes_over, need - free)
    return max(0, min(bytes_over, used))


def plan(
    nars: Iterable[Candidate],
    trees: Iterable[Candidate],
    *,
    excess: int,
    pinned: Set[StorePath],
    busy: Set[int],
) -> list[Drop]:
    """Steps that free ``excess`` bytes, or as many as may be freed.

    ``nars`` and ``trees``: least recently used first, read only as far as needed.
    """
    steps: list[Drop] = []
    for tree, candidates in ((False, nars), (True, trees)):
        if excess <= 0:
            break
        for candidate in candidates:
            if candidate.number in busy or candidate.store_path in pinned:
                continue
            steps.append(Drop(candidate.number, candidate.store_path, candidate.size, tree))
            excess -= candidate.size
            if excess <= 0:
                break
    return steps
