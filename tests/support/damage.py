"""Files of binary caches, and what happens to them."""

from __future__ import annotations

from pathlib import Path

from veneer.formats.narinfo import parse_narinfo


def nar_file_of(cache: Path, hash_part: str) -> Path:
    """The file of a path's NAR, packed or not."""
    return cache / parse_narinfo((cache / f"{hash_part}.narinfo").read_bytes()).url


def flip(file: Path, at: int | None = None) -> None:
    """One bit of the byte ``at`` (the middle one) is another."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    file.write_bytes(data)
