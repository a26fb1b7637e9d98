"""Compare directory trees byte for byte, in what a NAR keeps: names, kinds, contents, executable bits, link targets."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_CHUNK = 1 << 20


def differences(expected: Path, actual: Path) -> list[str]:
    """What differs, one line each; empty when the trees are equal. Reads everything."""
    found: list[str] = []
    _compare(os.fsencode(expected), os.fsencode(actual), b".", found)
    return found


def _compare(expected: bytes, actual: bytes, where: bytes, found: list[str]) -> None:
    shown = os.fsdecode(where).encode("utf-8", "backslashreplace").decode()
    a, b = os.lstat(expected), os.lstat(actual)
    if stat.S_IFMT(a.st_mode) != stat.S_IFMT(b.st_mode):
        found.append(f"{shown}: {stat.filemode(a.st_mode)} became {stat.filemode(b.st_mode)}")
    elif stat.S_ISLNK(a.st_mode):
        one, other = os.readlink(expected), os.readlink(actual)  # noqa: PTH115 (names are bytes)
        if one != other:
            found.append(f"{shown}: link to {one!r} became {other!r}")
    elif stat.S_ISREG(a.st_mode):
        if (a.st_mode ^ b.st_mode) & stat.S_IXUSR:
            found.append(f"{shown}: executable bit {oct(a.st_mode)} became {oct(b.st_mode)}")
        if a.st_size != b.st_size:
            found.append(f"{shown}: {a.st_size} bytes became {b.st_size}")
        elif (offset := _first_difference(expected, actual)) is not None:
            found.append(f"{shown}: content differs at byte {offset}")
    elif stat.S_ISDIR(a.st_mode):
        names, others = set(os.listdir(expected)), set(os.listdir(actual))  # noqa: PTH208
        found.extend(f"{shown}: {name!r} is missing" for name in sorted(names - others))
        found.extend(f"{shown}: {name!r} is too much" for name in sorted(others - names))
        for name in sorted(names & others):
            _compare(expected + b"/" + name, actual + b"/" + name, where + b"/" + name, found)


def _first_difference(expected: bytes, actual: bytes) -> int | None:
    offset = 0
    with open(expected, "rb") as one, open(actual, "rb") as other:
        while True:
            a, b = one.read(_CHUNK), other.read(_CHUNK)
            if a != b:
                return offset + next(
                    (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
                )
            if not a:
                return None
            offset += len(a)
