"""What the mount servers of one environment told about reads, added up. Pure.

A server may be killed at any moment, so it says now and then what has changed, and a successor begins at nothing. A word is
one line of JSON between two newlines (a killed server's cut-off word thus ends where the next begins):

    {"server": n (the first: 1), "last": true in its final one, "paths": {number: row of PathReport}, ...}

with the rows and the other fields of ``veneer.mount.server.Report`` that have changed, each in full. What a killed server
read since its last word is lost.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

Report = dict[str, Any]
KEPT_FAILURES = 256


class Words:
    """Of one server: what is new."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._paths: dict[int, Any] = {}
        self._others: Report = {}

    def news(self, report: Report) -> bytes:
        """The word; empty when nothing has changed."""
        paths = report.pop("paths")
        rows = {number: row for number, row in paths.items() if self._paths.get(number) != row}
        others = {name: value for name, value in report.items() if self._others.get(name) != value}
        self._paths, self._others = paths, report
        return _word({"server": self._number, "paths": rows, **others}) if rows or others else b""


def last_word(number: int, report: Report) -> bytes:
    return _word({"server": number, "last": True, **report})


def _word(fields: Report) -> bytes:
    return b"\n" + json.dumps(fields).encode() + b"\n"


class Figures:
    """Takes all servers' words in, in any pieces. Holds one row per path, however many words there were."""

    def __init__(self) -> None:
        self._rest = b""
        self._number = 0
        self._before: Report = {}
        self._now: Report = {}
        self._ended = True

    def feed(self, piece: bytes) -> None:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):  # cut off
                if line:
                    self._take(json.loads(line))

    @property
    def ended(self) -> bool:
        """Whether the last server that spoke had its last word."""
        return self._ended

    def report(self) -> Report:
        """All servers together; ``session``, ``waiting`` and ``error`` are the last one's."""
        return _sum(self._before, self._now)

    def _take(self, word: Report) -> None:
        number = word.pop("server")
        if number != self._number:
            self._before, self._now, self._number = self.report(), {}, number
        self._ended = word.pop("last", False)
        paths = {**self._now.get("paths", {}), **word.pop("paths", {})}
        self._now = {**self._now, **word}
        if paths:
            self._now["paths"] = paths


def _sum(before: Report, now: Report) -> Report:
    if not before or not now:
        return now or before
    paths = dict(before.get("paths", {}))
    for number, row in now.get("paths", {}).items():
        paths[number] = _add(paths[number], row) if number in paths else row
    return {
        **now,
        "paths": paths,
        "failures": [*before.get("failures", ()), *now.get("failures", ())][-KEPT_FAILURES:],
        "failure_count": before.get("failure_count", 0) + now.get("failure_count", 0),
    }


def _add(one: Report, other: Report) -> Report:
    firsts = [row["first_touch"] for row in (one, other) if row["first_touch"] is not None]
    sums = {name: one[name] + other[name] for name in ("reads", "bytes_read", "waits", "wait_seconds")}
    return {"name": one["name"] or other["name"], "first_touch": min(firsts, default=None), **sums}
