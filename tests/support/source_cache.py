"""A binary cache on disk for tests of sources: narinfos, listings and NAR files whose content nobody parses."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from veneer.formats.narinfo import write_narinfo
from veneer.model.hashes import Hash
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath

ABSENT = "z" * 32
LISTING = b'{"root":{"type":"regular","size":3,"narOffset":96},"version":1}'


@dataclass(frozen=True, slots=True)
class Entry:
    """One path of the cache and the bytes of its NAR file."""

    info: UnverifiedPathInfo
    file: bytes

    @property
    def hash_part(self) -> str:
        return self.info.store_path.hash_part


def entry(
    which: int, size: int = 10_000, *, compression: str = "none", url: str = "", sized: bool = True
) -> Entry:
    """``sized``: the narinfo has FileSize and FileHash."""
    file = (hashlib.sha256(str(which).encode()).digest() * (size // 32 + 1))[:size]
    info = UnverifiedPathInfo(
        store_path=StorePath(f"{which:032d}", f"path-{which}"),
        url=url or f"nar/{which}.nar",
        compression=compression,
        nar_hash=Hash("sha256", hashlib.sha256(file).digest()),
        nar_size=size if compression == "none" else 2 * size,
        file_hash=Hash("sha256", hashlib.sha256(file).digest()) if sized else None,
        file_size=size if sized else None,
        references=(StorePath(f"{which:032d}", f"path-{which}"),),
        signatures=("key:c2ln",),
    )
    return Entry(info, file)


def write_cache(
    directory: Path, *entries: Entry, cache_info: bytes | None = b"StoreDir: /nix/store\n"
) -> Path:
    """Files of ``entries`` (those with ordinary URLs) below ``directory``."""
    (directory / "nar").mkdir(parents=True, exist_ok=True)
    if cache_info is not None:
        (directory / "nix-cache-info").write_bytes(cache_info)
    for each in entries:
        (directory / f"{each.hash_part}.narinfo").write_bytes(write_narinfo(each.info))
        (directory / f"{each.hash_part}.ls").write_bytes(LISTING)
        if "://" not in each.info.url:
            (directory / each.info.url.partition("?")[0]).write_bytes(each.file)
    return directory
