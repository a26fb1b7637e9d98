"""A Nix store with its database, made without Nix: single files, registered in Nix's schema."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.support.source_cache import Entry
from veneer.environment.nix.database import Registration, fill
from veneer.formats.nar import nar_of, with_offsets
from veneer.model.hashes import Hash
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath
from veneer.model.tree import RegularFile


def file_entry(which: int, size: int) -> Entry:
    """A store path that is one file of ``size`` bytes, and refers to itself."""
    content = _content(which, size)
    nar = b"".join(nar_of(with_offsets(RegularFile(size, False, 0)), lambda _: [content]))
    path = StorePath(f"{which:032d}", f"path-{which}")
    info = UnverifiedPathInfo(
        store_path=path,
        url=path.basename,
        compression="none",
        nar_hash=Hash("sha256", hashlib.sha256(nar).digest()),
        nar_size=len(nar),
        references=(path,),
        signatures=("key:c2ln",),
    )
    return Entry(info, nar)


def write_store(root: Path, sizes: dict[int, int]) -> list[Entry]:
    """The paths ``which`` -> size of file, as a store below ``root``."""
    store = root / "nix/store"
    store.mkdir(parents=True)
    entries = []
    for which, size in sizes.items():
        entries.append(file_entry(which, size))
        (store / entries[-1].info.store_path.basename).write_bytes(_content(which, size))
    infos = [each.info for each in entries]
    rows = [
        Registration(i.store_path, i.nar_hash, i.nar_size, i.references, signatures=i.signatures)
        for i in infos
    ]
    fill(root / "nix/var/nix", rows, now=0)
    return entries


def _content(which: int, size: int) -> bytes:
    return (hashlib.sha256(str(which).encode()).digest() * (size // 32 + 1))[:size]
