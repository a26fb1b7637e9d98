"""Lazy or eager, by evidence: when a session reads most of a closure, the rest is fetched ahead of its reads.

Reading one path after the other leaves link and processors idle in turns, so what will be read is better fetched in
parallel. Two things tell: a session *asked* for half of all the bytes that it can know of; or it *scans*, as tar, cp and
grep -r do: it read the paths that it asked for from end to end, which programs that use a store never do. Below
that, nothing is fetched that nobody read. Pure: figures in, decision out.
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
        return AHEAD * evidence.scanned_bytes
    return 0
