"""Lazy or eager, by evidence: when a session reads most of a closure, the rest is fetched ahead of its reads.

Reading one path after the other leaves link and processors idle in turns; a session that has asked for SHARE of the bytes
it can know of, over at least MIN_PATHS paths, will most likely ask for the rest, and gets it in parallel. Below that,
nothing is fetched that nobody read. Pure: figures in, decision out.
"""

from __future__ import annotations

MIN_PATHS = 24
"""Programs touch fewer paths than this before they do their work; readers of everything touch more."""
SHARE = 0.5
"""Of the bytes of the closures looked up. The most that a wrong guess can cost is as much again as was asked for."""


def wants_rest(*, asked_paths: int, asked_bytes: int, closure_bytes: int) -> bool:
    """Whether what a session asked for so far tells that it will ask for the rest of its closures."""
    return asked_paths >= MIN_PATHS and asked_bytes >= SHARE * closure_bytes
