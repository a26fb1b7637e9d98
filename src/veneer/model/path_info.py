"""What is known about a store path. Two kinds, so that trust shows in the type.

``UnverifiedPathInfo`` is what a source said. ``PathInfo`` was made by ``store.verify`` (signature or trusted source) and
is the only kind that the cache keeps as valid and that the mount serves.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .hashes import Hash
from .store_path import DEFAULT_STORE_DIR, StorePath


@dataclass(frozen=True, slots=True)
class UnverifiedPathInfo:
    """The fields of a narinfo. Sizes in bytes. ``signatures`` are "key name:base64" texts as they stood."""

    store_path: StorePath
    url: str
    """Relative to the cache's root (or absolute); where the compressed NAR lies."""
    compression: str
    """none, xz, zstd, br, bzip2, gzip, lz4; "" means bzip2, as in Nix."""
    nar_hash: Hash
    nar_size: int
    references: tuple[StorePath, ...] = ()
    file_hash: Hash | None = None
    file_size: int | None = None
    deriver: str = ""
    """Base name of the .drv, "" when unknown."""
    signatures: tuple[str, ...] = ()
    ca: str = ""
    store_dir: str = DEFAULT_STORE_DIR
    extra: tuple[tuple[str, str], ...] = field(default=())
    """Unknown keys in their order, kept for writing."""


@dataclass(frozen=True, slots=True)
class PathInfo:
    """A path's facts after verification. ``signed_by``: names of the trusted keys whose signatures are valid."""

    info: UnverifiedPathInfo
    signed_by: tuple[str, ...]

    @property
    def store_path(self) -> StorePath:
        return self.info.store_path
