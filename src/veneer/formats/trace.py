r"""Trace: which parts of which store paths a command read, in order. Our own format, version 1.

Lines of JSON (UTF-8; what is not ASCII stands as ``\u…``), each ended by a newline:

    {"veneer-trace": 1}
    {"path": base name, "nar_hash": "sha256-…", "nar_size": n, "files": [file, ...]}

The first line begins a trace. Each other one is a store path, in order of first touch. A file is

    [name, size]                                  read whole
    [name, size, offset, length, offset, length…]  these parts of it, in order of offset, apart from each other

in order of first touch; name: relative to the store path, "" when the path itself is a file. Bytes that are no UTF-8 stand
as surrogates (``os.fsdecode``). ``nar_size``, ``size``: of the NAR and of the file when they were read. A path without
files was looked up by name and no more. Links and directories are not there: they cost nothing that a path's name did not.

Merging: two traces one after another are a trace: first lines may stand anywhere, and what is said of one path, and of one
file, twice, counts together. So ``cat`` joins traces, and a version control system may join their lines.

Deterministic: the same reads give the same bytes. Nothing of the machine or of the time is in it.

Limits, enforced here: MAX_SIZE bytes, names possible in a NAR and MAX_NAME bytes long, sizes and offsets below 2^63, parts inside
their file. Unknown keys are refused: a later version has another number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from veneer.model.errors import FormatError, LimitError
from veneer.model.hashes import Hash
from veneer.model.store_path import StorePath

VERSION = 1
MAX_SIZE = 12 << 20
"""Less than a message of the request protocol."""
MAX_NAME = 4095
_END = 1 << 63
_HEADER = "veneer-trace"
_FIELDS = {"path", "nar_hash", "nar_size", "files"}
_WHERE = "trace"

Ranges = tuple[tuple[int, int], ...]
"""(offset, size), in order, apart from each other."""


@dataclass(frozen=True, slots=True)
class TracedFile:
    """A regular file of which ``ranges`` were read; ``size``: the whole file's."""

    name: bytes
    size: int
    ranges: Ranges

    @property
    def bytes(self) -> int:
        return sum(length for _, length in self.ranges)

    @property
    def is_whole(self) -> bool:
        return self.ranges == ((0, self.size),)


@dataclass(frozen=True, slots=True)
class TracedPath:
    """A store path that was touched. No files: by name alone."""

    path: StorePath
    nar_hash: Hash
    nar_size: int
    files: tuple[TracedFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


Trace = tuple[TracedPath, ...]
"""In order of first touch, each store path once."""


def coalesce(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """(offset, size) in any order, made one where they overlap or touch; empty ones are left out."""
    joined: list[tuple[int, int]] = []
    for offset, size in sorted(ranges):
        if not size:
            continue
        if joined and offset <= joined[-1][0] + joined[-1][1]:
            start, length = joined[-1]
            joined[-1] = (start, max(length, offset + size - start))
        else:
            joined.append((offset, size))
    return tuple(joined)


def clip(ranges: Iterable[tuple[int, int]], size: int) -> Ranges:
    """What of the ranges lies within a file of ``size`` bytes."""
    return coalesce((offset, min(length, size - offset)) for offset, length in ranges if offset < size)


def to_rows(trace: Trace) -> list[dict[str, object]]:
    """The lines' objects, without the first."""
    return [
        {
            "path": traced.path.basename,
            "nar_hash": traced.nar_hash.sri,
            "nar_size": traced.nar_size,
            "files": [_file_row(file) for file in traced.files],
        }
        for traced in trace
    ]


def from_rows(rows: Sequence[object]) -> Trace:
    """From ``to_rows``, or several traces' rows after another. FormatError."""
    paths: dict[StorePath, tuple[TracedPath, dict[bytes, list[TracedFile]]]] = {}
    for row in rows:
        traced = _path(row)
        files = paths.setdefault(traced.path, (traced, {}))[1]
        for file in traced.files:
            files.setdefault(file.name, []).append(file)
    return tuple(
        TracedPath(first.path, first.nar_hash, first.nar_size, tuple(map(_joined, files.values())))
        for first, files in paths.values()
    )


def encode(trace: Trace) -> bytes:
    """The trace's file. LimitError when it is larger than MAX_SIZE."""
    lines = [{_HEADER: VERSION}, *to_rows(trace)]
    data = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode("ascii")
    if len(data) > MAX_SIZE:
        raise LimitError(f"{len(data)} bytes, more than {MAX_SIZE}", where=_WHERE)
    return data


def decode(data: bytes) -> Trace:
    """From a file's bytes. FormatError, LimitError."""
    if len(data) > MAX_SIZE:
        raise LimitError(f"{len(data)} bytes, more than {MAX_SIZE}", where=_WHERE)
    rows: list[object] = []
    begun = False
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        row = _json(line, number)
        if isinstance(row, dict) and _HEADER in row:
            if row != {_HEADER: VERSION} or row[_HEADER] is True:
                raise FormatError(f"version {row[_HEADER]!r:.40} is not known", where=_WHERE)
            begun = True
        elif begun:
            rows.append(row)
        else:
            break
    if not begun:
        raise FormatError("not a trace", where=_WHERE, hint="veneer run --trace FILE writes one")
    return from_rows(rows)


def _json(line: bytes, number: int) -> object:
    try:
        found: object = json.loads(line.decode())  # bytes might be taken for UTF-16
    except (ValueError, RecursionError):
        raise FormatError("not a line of a trace", where=f"{_WHERE}, line {number}") from None
    return found


def _file_row(file: TracedFile) -> list[object]:
    row: list[object] = [file.name.decode("utf-8", "surrogateescape"), file.size]
    if not file.is_whole:
        row += [number for one in file.ranges for number in one]
    return row


def _path(row: object) -> TracedPath:
    if not isinstance(row, dict) or row.keys() != _FIELDS:
        raise FormatError("not a store path's row", where=_WHERE)
    name, nar_hash, files = row["path"], row["nar_hash"], row["files"]
    if not isinstance(name, str) or not isinstance(nar_hash, str) or not isinstance(files, list):
        raise FormatError("not a store path's row", where=_WHERE)
    parsed = Hash.parse(nar_hash)
    if parsed.algorithm != "sha256":
        raise FormatError(f"NAR hash of the kind {parsed.algorithm}", where=_WHERE)
    return TracedPath(
        StorePath.parse(name), parsed, _size(row["nar_size"]), tuple(_file(file) for file in files)
    )


def _file(row: object) -> TracedFile:
    if not isinstance(row, list) or len(row) < 2 or len(row) % 2 or not isinstance(row[0], str):
        raise FormatError("not a file's row", where=_WHERE)
    size = _size(row[1])
    name = _name(row[0])
    if len(row) == 2:
        return TracedFile(name, size, ((0, size),))
    numbers = [_size(number) for number in row[2:]]
    ranges = coalesce(zip(numbers[::2], numbers[1::2], strict=True))
    if not ranges or ranges[-1][0] + ranges[-1][1] > size:
        raise FormatError("parts outside of their file", where=_WHERE)
    return TracedFile(name, size, ranges)


def _name(text: str) -> bytes:
    try:
        name = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise FormatError("impossible file name", where=_WHERE) from None
    parts = name.split(b"/")
    if len(name) > MAX_NAME or b"\0" in name or (name and any(part in (b"", b".", b"..") for part in parts)):
        raise FormatError(f"impossible file name {name[:100]!r}", where=_WHERE)
    return name


def _size(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _END:
        raise FormatError(f"not a size: {value!r:.40}", where=_WHERE)
    return value


def _joined(told: list[TracedFile]) -> TracedFile:
    """What all of them say of one file, together: one by one would take the square of the time. Whole in any is whole."""
    if len(told) == 1:
        return told[0]
    name, size = told[0].name, max(file.size for file in told)
    if any(file.is_whole for file in told):
        return TracedFile(name, size, ((0, size),))
    return TracedFile(name, size, coalesce(part for file in told for part in file.ranges))
