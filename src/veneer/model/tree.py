"""A store path's tree without its content: what a listing tells, what a tree index is made of.

Names and link targets are bytes: Nix allows any byte but ``/`` and NUL. Children stand in byte order of their names.
Offsets count bytes from the start of the uncompressed NAR to the first byte of a file's content.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_DEPTH = 1024
"""Deepest tree accepted; the kernel's PATH_MAX allows no more than 2048 levels."""
MAX_NAME = 255
MAX_TARGET = 4095
MAX_ENTRIES = 1 << 24
"""Entries of one store path, the root included: node ids give 24 bits to them."""


@dataclass(frozen=True, slots=True)
class RegularFile:
    size: int
    executable: bool
    offset: int


@dataclass(frozen=True, slots=True)
class Symlink:
    target: bytes


@dataclass(frozen=True, slots=True)
class Directory:
    entries: tuple[tuple[bytes, Node], ...]


Node = RegularFile | Symlink | Directory
