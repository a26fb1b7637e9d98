"""Notes what is touched for the first time, for a trace. Made when one is wanted; the workers then have handlers of their own for it.

The mount server alone can: it sees reads that nobody else is asked for. The file outlives it (``formats.touches``).
"""

from __future__ import annotations

import contextlib
import os
import threading

from veneer.formats import touches
from veneer.formats.tree_index import node_id


class Recording:
    """One per mount server. Threads share it. ``fd``: the file, opened with O_APPEND, of this mount alone."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._left = max(0, touches.MAX_SIZE - os.fstat(fd).st_size)
        self._names: set[int] = set()
        self._reads: dict[tuple[int, int], int] = {}
        """(node, offset) -> the largest size read there. The kernel keeps what it got, so few come twice."""

    def looked_up(self, number: int, name: bytes) -> None:
        """A store path's name has this number."""
        if number not in self._names:
            self._names.add(number)
            self._append(touches.name_row(node_id(number, 0), name))

    def read(self, node: int, offset: int, size: int) -> None:
        """A READ came."""
        key = (node, offset)
        if self._reads.get(key, 0) < size and self._left:
            self._reads[key] = size
            self._append(touches.read_row(node, offset, size))

    def _append(self, rows: bytes) -> None:
        """Never fails: a trace must not cost a reader anything."""
        with self._lock:
            if len(rows) > self._left:
                self._left = 0
                return
            self._left -= len(rows)
        with contextlib.suppress(OSError):  # no memory left
            os.write(self._fd, rows)
