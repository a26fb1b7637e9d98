"""Paths, NARs and trees with known content, for tests that need a filled cache."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from veneer.cache.cache import Cache
from veneer.cache.chunk_maps import ChunkMaps
from veneer.cache.index import PathRow, TreeState
from veneer.cache.nars import IncomingNar, VerifiedNar
from veneer.formats.tree_index import encode_tree, part_file
from veneer.model.hashes import Hash
from veneer.model.store_path import StorePath
from veneer.model.tree import RegularFile
from veneer.store.fetch import Ready

NAR_SIZE = 10_000
BLOCKS = 12_288
"""What a NAR of NAR_SIZE is counted with on disk."""


class Clock:
    """Seconds that pass when told to."""

    def __init__(self, now: float = 1_000_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def open_cache(
    root: Path, clock: Clock | None = None, *, max_bytes: int | None = None, boot: str = "boot-1"
) -> Cache:
    """A cache whose clock and boot id are the test's."""
    return Cache.open(root, clock=clock or Clock(), max_bytes=max_bytes, boot_id=lambda: boot)


def store_path(which: int) -> StorePath:
    return StorePath(f"{which:032d}", f"path-{which}")


def nar_bytes(which: int, size: int = NAR_SIZE) -> bytes:
    """Not a NAR inside: the cache does not look."""
    return (f"nar of {which} ".encode() * (size // 8 + 1))[:size]


def nar_hash(which: int, size: int = NAR_SIZE) -> Hash:
    return Hash("sha256", hashlib.sha256(nar_bytes(which, size)).digest())


def add_row(cache: Cache, which: int, now: float = 1.0, size: int = NAR_SIZE) -> PathRow:
    return cache.index.add_path(store_path(which), nar_hash(which, size), size, now)


def verified(incoming: IncomingNar, which: int, size: int = NAR_SIZE) -> VerifiedNar:
    return VerifiedNar(incoming, nar_hash(which, size), size)


def add_nar(cache: Cache, which: int, now: float = 1.0, size: int = NAR_SIZE) -> PathRow:
    """A path with its whole NAR."""
    number = add_row(cache, which, now, size).number
    incoming = cache.nars.incoming(number, size)
    incoming.write(nar_bytes(which, size))
    cache.nars.admit(number, verified(incoming, which, size))
    return row(cache, number)


def tree_bytes(cache: Cache, path: PathRow) -> bytes:
    return bytes(
        encode_tree(
            RegularFile(100, executable=False, offset=96),
            path_number=path.number,
            generation=cache.generation,
            nar_hash=path.nar_hash.digest,
            nar_size=path.nar_size,
        )
    )


def add_tree(cache: Cache, which: int, now: float = 1.0, state: TreeState = TreeState.LISTED) -> PathRow:
    """A path with its tree."""
    path = add_row(cache, which, now)
    cache.trees.publish(path.number, [tree_bytes(cache, path)], state)
    return row(cache, path.number)


def row(cache: Cache, number: int) -> PathRow:
    found = cache.index.path(number)
    assert found is not None
    return found


async def until_learnt(cache: Cache, number: int) -> None:
    """Until the digests of a NAR's chunks are known, which a store looks after once it has the NAR."""
    while ChunkMaps(cache.index).get(number) is None:  # noqa: ASYNC110 - nobody announces it
        await asyncio.sleep(0.01)


def files(root: Path) -> set[str]:
    """Names of all published and incoming files."""
    tops = ("trees", "nars", "incoming")
    return {str(f.relative_to(root)) for top in tops for f in (root / top).rglob("*") if not f.is_dir()}


def ready_file(cache: Cache, ready: Ready) -> Path:
    """The file that READY speaks of: the whole one, or the growing or sparse one that has its inode."""
    whole, sparse = cache.nars.files(ready.number)
    if ready.whole:
        return whole
    files = (sparse, cache.root / part_file(ready.number), whole)
    return next(file for file in files if file.exists() and file.stat().st_ino == ready.inode)


def read_ready(cache: Cache, ready: Ready, offset: int, size: int) -> bytes:
    """What a mount server reads after READY: of the file that it speaks of, within the span."""
    assert ready.start <= offset and offset + size <= ready.end
    with ready_file(cache, ready).open("rb") as file:
        file.seek(offset)
        return file.read(size)
