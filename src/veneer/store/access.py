"""Lazy or eager, by evidence: when a session reads most of a closure, the rest is fetched ahead of its reads.

Reading one path after the other leaves link and processors idle in turns, so what will be read is better fetched in
parallel. Two things tell: a session *asked* for half of all the bytes that it can know of; or it *scans*, as tar, cp and
grep -r do: it listed paths from their roots and read them from end to end, which programs that use a store never do. Below
that, nothing is fetched that nobody read.

Within one NAR that can be had in parts it is the same question. Below ``SMALL`` it is fetched whole, and so is a file below
``FILE``; a reader that goes on where it was before gets a growing window ahead of it; what is mostly here is completed; and the rest
of a file or a NAR is fetched when its readers have waited for parts of it as long as that takes: whatever they do next, they
wait at most twice as long as was needed. A small rest is fetched the second time that somebody waits. No part is fetched twice, so all that this can cost above reading everything is its
requests. Pure: figures in, decision out.
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_PATHS = 24
"""Programs touch fewer paths than this before they do their work; readers of everything touch more."""
SHARE = 0.5
"""Of the bytes of the closures looked up. The most that a wrong guess can cost is as much again as was asked for."""

SCANNED = 0.75
"""Of a NAR's bytes: who read as much read it all. The rest is names, and files that the kernel had already."""
MIN_SCANNED = 6
"""Paths read from end to end before it is called a scan: a script and its data are fewer."""
AHEAD = 6
"""Bytes fetched ahead of a scan for each byte that it has read: what it costs when the scan ends there."""

SMALL = 1 << 20
"""Bytes of a NAR's file that are fetched at once: a usual link moves as much in the time of two questions."""
FILE = 4 << 20
"""Bytes of a file that are fetched when any of it is read: programs and libraries are read all over."""
LITTLE = 5 << 19
"""Encoded bytes of a rest that is fetched when somebody waits a second time."""
COMPLETE = 0.75
"""Of a NAR's bytes: when they are here, the rest is fetched once nobody wants anything else: whole files are read faster."""
FIRST_WINDOW, LAST_WINDOW = 512 << 10, 8 << 20
"""Bytes ahead of a reader that goes on: doubled each time it does."""
NEAR = 256 << 10
"""From where a reader was, that still counts as going on: kernels skip what they have."""
READERS = 8
"""Of one NAR, that are told apart."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a session did so far; bytes are of NARs. ``scanned``: read from end to end, and part of ``asked``."""

    asked_paths: int
    asked_bytes: int
    scanned_paths: int
    scanned_bytes: int
    closure_bytes: int


def allowance(evidence: Evidence) -> int:
    """Bytes that may be fetched for the session unasked, altogether; 0 when nothing tells that it will read them."""
    if evidence.asked_paths >= MIN_PATHS and evidence.asked_bytes >= SHARE * evidence.closure_bytes:
        return evidence.closure_bytes
    if evidence.scanned_paths >= MIN_SCANNED and 2 * evidence.scanned_bytes >= evidence.asked_bytes:
        ahead = AHEAD * evidence.scanned_bytes
        return evidence.closure_bytes if ahead >= SHARE * evidence.closure_bytes else ahead
    return 0


class Sequences:
    """The readers of one NAR: who goes on where it was before, and how far ahead of it to fetch."""

    def __init__(self) -> None:
        self._ends: list[tuple[int, int]] = []
        """(where a reader was, its window) of the last READERS, newest last."""

    def ahead(self, start: int, end: int) -> int:
        """Bytes to fetch after ``end`` for whoever reads [start, end) now; 0 where nothing tells that it will go on."""
        window = 0
        for at, (last, before) in enumerate(self._ends):
            if last - NEAR <= start <= last + NEAR + before:
                if end <= last:
                    return 0  # another reader of the same
                window = min(max(2 * before, FIRST_WINDOW), LAST_WINDOW)
                del self._ends[at]
                break
        self._ends = [*self._ends[1 - READERS :], (end, window)]
        return window


def completes(held: int, nar_size: int) -> bool:
    """Whether to fetch the rest of a NAR of which ``held`` bytes are here."""
    return held >= COMPLETE * nar_size


def rest_pays(waited: float, missing: float, rate: float, *, times: int) -> bool:
    """Whether readers who have waited so many ``times``, ``waited`` seconds together, are better served with the ``missing`` bytes.

    ``missing``: as they come over the link, which gives ``rate`` bytes per second.
    """
    return waited * rate >= missing or (missing <= LITTLE and times > 1)
