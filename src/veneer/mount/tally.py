"""What was touched, read and waited for, per store path. Nearly free where it matters: threads count for themselves."""

from __future__ import annotations

import threading
import time
from typing import TypedDict

from veneer.formats.tree_index import split_node_id


class PathReport(TypedDict):
    name: str
    """"" for a path known by its number only."""
    first_touch: float | None
    """Seconds between the start of the mount's first server and the first LOOKUP of the name."""
    reads: int
    bytes_read: int
    waits: int
    """Requests that waited for the daemon, and how long they did, together."""
    wait_seconds: float


class Tally:
    """One per mount. ``of_thread`` gives a thread its own dictionary, path number -> [reads, bytes]."""

    def __init__(self, since: float | None = None) -> None:
        """``since``: what first touches count from, in monotonic seconds; now by default."""
        self._lock = threading.Lock()
        self._start = time.monotonic() if since is None else since
        self._threads: list[dict[int, list[int]]] = []
        self._names: dict[int, tuple[str, float]] = {}
        self._waits: dict[int, list[float]] = {}
        self._told: dict[int, int] = {}
        self.listed: set[int] = set()
        """Path numbers of which the root directory was listed: programs know where their files are, scans look."""

    def of_thread(self) -> dict[int, list[int]]:
        mine: dict[int, list[int]] = {}
        with self._lock:
            self._threads.append(mine)
        return mine

    def touched(self, number: int, name: bytes) -> None:
        if number not in self._names:
            self._names[number] = (name.decode("ascii", "replace"), time.monotonic() - self._start)

    def waited(self, number: int, seconds: float) -> None:
        with self._lock:
            row = self._waits.setdefault(number, [0, 0.0])
            row[0] += 1
            row[1] += seconds

    def describe(self, node: int) -> str:
        """A node for a story."""
        number, entry = split_node_id(node)
        return f"{self.name(number)} entry {entry}" if number else "the mount's root"

    def name(self, number: int) -> str:
        """A store path for a story."""
        known = self._names.get(number)
        return known[0] if known else f"path {number}"

    def _reads(self) -> dict[int, tuple[int, int]]:
        sums: dict[int, tuple[int, int]] = {}
        with self._lock:
            threads = list(self._threads)
        for counts in threads:
            for number, (reads, size) in list(counts.items()):
                before = sums.get(number, (0, 0))
                sums[number] = (before[0] + reads, before[1] + size)
        return sums

    def news(self) -> list[tuple[int, int, bool]]:
        """[(path number, bytes read since the last call, listed)] of the paths with any. For one thread."""
        rows = []
        for number, (_, size) in self._reads().items():
            before = self._told.get(number, 0)
            if size > before:
                self._told[number] = size
                rows.append((number, size - before, number in self.listed))
        return rows

    def report(self) -> dict[int, PathReport]:
        reads = self._reads()
        with self._lock:
            waits = {number: (row[0], row[1]) for number, row in self._waits.items()}
        result: dict[int, PathReport] = {}
        for number in sorted({*reads, *waits, *list(self._names)}):
            name, first = self._names.get(number, ("", None))
            count, size = reads.get(number, (0, 0))
            waited, seconds = waits.get(number, (0, 0.0))
            result[number] = {
                "name": name,
                "first_touch": first,
                "reads": count,
                "bytes_read": size,
                "waits": int(waited),
                "wait_seconds": seconds,
            }
        return result
