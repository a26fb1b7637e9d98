"""Keeps the memory of many threads that decode large pieces small: glibc's allocator, told how this process works.

By itself it makes up to eight heaps per processor, each of which keeps the largest gap that it ever had, and learns to
take ever larger pieces from them. Measured over random reads far above the cache's limit (``./dev bench load --only churn``):
after a minute 173 MiB resident and growing without this, 90 MiB and flat with it, as many reads.
"""

from __future__ import annotations

import ctypes

HEAPS = 2
LARGE = 1_000_000
"""Bytes from which a piece is mapped by itself, and given back when it is freed: a chunk of a body, a decoded file."""
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def keep_small() -> bool:
    """Whether the C library takes the advice; to be called before threads are started."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return False
    return bool(mallopt(_M_ARENA_MAX, HEAPS)) and bool(mallopt(_M_MMAP_THRESHOLD, LARGE))
