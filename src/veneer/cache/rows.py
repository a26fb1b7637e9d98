"""The values that the index gives out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from veneer.model.hashes import Hash
from veneer.model.store_path import StorePath


class TreeState(IntEnum):
    NONE = 0
    LISTED = 1
    """Made from a listing that nothing vouches for yet."""
    CHECKED = 2
    """Made from, or compared with, the verified NAR."""


class NarState(IntEnum):
    NONE = 0
    WHOLE = 1
    SPARSE = 2
    """Some chunks of it are there, each verified by itself."""


@dataclass(frozen=True, slots=True)
class NarinfoRow:
    """What a source answered. ``body`` None: that it has none. ``fetched_at``: seconds, as the daemon's clock."""

    body: bytes | None
    fetched_at: float


@dataclass(frozen=True, slots=True)
class PathRow:
    """One revision of one store path's tree. Sizes in bytes; ``disk_size`` is the NAR file's, 0 without one."""

    number: int
    store_path: StorePath
    nar_hash: Hash
    nar_size: int
    tree: TreeState
    nar: NarState
    last_used: float
    quarantined: bool
    disk_size: int
    tree_size: int


class FileRow(NamedTuple):
    """What a row says about its files, for recovery (a tuple: every start makes one per path)."""

    number: int
    tree: int
    """A TreeState."""
    nar: int
    """A NarState."""
    tree_size: int
    nar_size: int
    quarantined: bool


@dataclass(frozen=True, slots=True)
class Unsynced:
    """A file that a power loss may still empty. ``kind``: "nar", "sparse" or "tree"."""

    number: int
    kind: str
    serial: int


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts of rows and files; bytes on disk."""

    paths: int
    trees: int
    nars: int
    nar_bytes: int
    tree_bytes: int
    narinfos: int
