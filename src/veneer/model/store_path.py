"""Store paths: ``<store dir>/<hash part>-<name>``.

Source: Nix manual, "Store path". Hash part: 32 Nix32 characters (20 bytes). Name: 1 to 211 characters of
``A-Za-z0-9+-._?=``, not ``.`` or ``..``, and not beginning with ``.-`` or ``..-`` (Nix >= 2.21).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import FormatError

DEFAULT_STORE_DIR = "/nix/store"
HASH_PART_LENGTH = 32
_BASENAME = re.compile(r"([0-9abcdfghijklmnpqrsvwxyz]{32})-([A-Za-z0-9+\-._?=]{1,211})")
_DOTS = re.compile(r"\.\.?(-|$)")
_HASH_PART = re.compile(r"[0-9abcdfghijklmnpqrsvwxyz]{32}")


@dataclass(frozen=True, slots=True, order=True)
class StorePath:
    """One store path's base name, taken apart; the store directory is kept elsewhere."""

    hash_part: str
    name: str

    @classmethod
    def parse(cls, basename: str) -> StorePath:
        """From ``<hash part>-<name>``. FormatError when it is not one."""
        match = _BASENAME.fullmatch(basename)
        if match is None or (match[2][0] == "." and _DOTS.match(match[2])):
            raise FormatError(f"not a store path name: {basename[:300]!r}", where="store path")
        return cls(match[1], match[2])

    @classmethod
    def parse_absolute(cls, path: str, store_dir: str = DEFAULT_STORE_DIR) -> StorePath:
        """From ``<store dir>/<hash part>-<name>``, nothing after it."""
        prefix = store_dir.rstrip("/") + "/"
        if not path.startswith(prefix):
            raise FormatError(f"not below {store_dir}: {path[:300]!r}", where="store path")
        return cls.parse(path[len(prefix) :])

    @property
    def basename(self) -> str:
        return f"{self.hash_part}-{self.name}"

    def absolute(self, store_dir: str = DEFAULT_STORE_DIR) -> str:
        return f"{store_dir.rstrip('/')}/{self.basename}"

    def __str__(self) -> str:
        return self.basename


def is_hash_part(text: str) -> bool:
    """Whether ``text`` is 32 Nix32 characters."""
    return _HASH_PART.fullmatch(text) is not None
