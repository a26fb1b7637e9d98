"""Closure bundles of one source: fetched once, taken apart off the event loop, and what of them is kept in memory.

A bundle is the source's word about many paths at once and counts no more than its word about each: its narinfos go where
answers are remembered and are verified when they are used, listings and chunk maps wait here until somebody asks for them,
who gets each once: it becomes a tree index or verified parts. Whatever is wrong with a bundle is told, and then nothing of
it is used: everything is asked for by itself, as if there were none.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import zstandard

from veneer.formats import bundle, listing
from veneer.formats.listing import decode_listing_bytes
from veneer.formats.narinfo import parse_narinfo
from veneer.model.errors import FormatError, VeneerError
from veneer.model.path_info import UnverifiedPathInfo
from veneer.sources.base import Meter, Source
from veneer.sources.opening import Tell

KEPT = 64 << 20
"""Bytes of listings (compressed) and chunk maps that wait in memory, for each source."""
WAIT_SECONDS = 15.0
"""For how long those that could ask by themselves wait for a bundle."""
_AT_ONCE = 200
"""Paths remembered in one turn of the event loop: some 5 ms."""


@dataclass(frozen=True, slots=True)
class BundledPath:
    """What a bundle says of a path. ``beside``: suffix -> listing or chunk map; a listing may be compressed."""

    info: UnverifiedPathInfo
    narinfo: bytes
    beside: dict[str, bytes]


class Bundles:
    """One per source; event loop only. ``taken``: told what a good bundle says, bit by bit; may raise VeneerError."""

    def __init__(
        self, source: Source, store_dir: str, taken: Callable[[list[BundledPath]], None], tell: Tell
    ) -> None:
        self._source = source
        self._store_dir = store_dir
        self._taken = taken
        self._tell = tell
        self._under_way: dict[str, asyncio.Task[None]] = {}
        """Hash part of a root's reference -> the bundle that is to have it."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._roots: set[str] = set()
        """Whose bundles were fetched or are: what was of no use once is not asked for again."""
        self._kept: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._size = 0

    def begin(self, root: UnverifiedPathInfo, meter: Meter) -> None:
        """Fetch the root's bundle in the background, unless that was done before."""
        if root.store_path.hash_part in self._roots:
            return
        self._roots.add(root.store_path.hash_part)
        task = asyncio.create_task(self._fetch(root, meter), name=f"bundle of {root.store_path}")
        self._tasks.add(task)
        references = [path.hash_part for path in root.references if path != root.store_path]
        self._under_way |= dict.fromkeys(references, task)
        task.add_done_callback(lambda done: self._ended(references, done))

    def under_way(self, hash_part: str) -> asyncio.Task[None] | None:
        """The bundle that is being fetched and is to have the path; it does not fail."""
        return self._under_way.get(hash_part) if self._under_way else None

    async def arrived(self, hash_part: str) -> None:
        """Wait for the bundle that is to have the path, if one is under way, though not for ever."""
        task = self.under_way(hash_part)
        if task is not None:
            await asyncio.wait({task}, timeout=WAIT_SECONDS)

    def keep(self, hash_part: str, beside: dict[str, bytes]) -> None:
        """Keep a path's listing and chunk map until they are asked for, or there is no room."""
        for suffix, data in beside.items():
            self._size += len(data) - len(self._kept.pop((hash_part, suffix), b""))
            self._kept[hash_part, suffix] = data
        while self._size > KEPT:
            self._size -= len(self._kept.popitem(last=False)[1])

    def has(self, hash_part: str, suffix: str) -> bool:
        return (hash_part, suffix) in self._kept

    def take(self, hash_part: str, suffix: str) -> bytes | None:
        """A listing (plain) or chunk map, once; None: ask the source."""
        data = self._kept.pop((hash_part, suffix), None)
        if data is None:
            return None
        self._size -= len(data)
        if suffix != bundle.LISTING:
            return data
        try:
            return decode_listing_bytes(data, listing.MAX_SIZE)
        except FormatError:
            return None  # the source says the same, or better

    def drop(self, hash_part: str) -> None:
        """Nothing of this path is believed any more."""
        for suffix in (bundle.LISTING, bundle.CHUNKS):
            self._size -= len(self._kept.pop((hash_part, suffix), b""))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _fetch(self, root: UnverifiedPathInfo, meter: Meter) -> None:
        part = root.store_path.hash_part
        where = f"{self._source.url}/{part}{bundle.SUFFIX}"
        try:
            data = await self._source.sidecar(part, bundle.SUFFIX, bundle.MAX_SIZE, meter)
            if data is None:
                raise FormatError("the narinfo announces a bundle, and there is none", where=where)
            try:
                paths = await asyncio.to_thread(read_paths, data, root, self._store_dir)
            except FormatError as error:
                raise FormatError(f"{error.where}: {error.what}", where=where) from error
            for start in range(0, len(paths), _AT_ONCE):
                self._taken(paths[start : start + _AT_ONCE])
                await asyncio.sleep(0)  # for the others on the event loop
        except VeneerError as error:
            self._tell(str(root.store_path), error)

    def _ended(self, references: list[str], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        for reference in references:
            if self._under_way.get(reference) is task:
                del self._under_way[reference]
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._tell(task.get_name(), error)


def read_paths(data: bytes, root: UnverifiedPathInfo, store_dir: str) -> list[BundledPath]:
    """The paths of the bundle of ``root``. FormatError when anything in it is not what its name says. Any thread."""
    paths: dict[str, BundledPath] = {}
    for entry in bundle.parse_bundle(data, root.store_path.hash_part):
        if entry.suffix == bundle.NARINFO:
            info = parse_narinfo(entry.body, store_dir=store_dir)
            if info.store_path.hash_part != entry.hash_part:
                raise FormatError(
                    f"a narinfo of another path: {info.store_path}", where=f"{entry.hash_part}{entry.suffix}"
                )
            paths[entry.hash_part] = BundledPath(info, entry.body, {})
        elif (path := paths.get(entry.hash_part)) is not None:
            path.beside[entry.suffix] = _packed(entry)
    told = paths[root.store_path.hash_part].info
    if (told.store_path, told.nar_hash) != (root.store_path, root.nar_hash):
        raise FormatError(f"a bundle of another build of {root.store_path}", where="bundle")
    return list(paths.values())


def _packed(entry: bundle.Entry) -> bytes:
    """Listings shrink to a fifth, and ``decode_listing_bytes`` undoes it; those that came compressed stay so."""
    if entry.suffix == bundle.LISTING and entry.body[:1] == b"{":
        return zstandard.ZstdCompressor(level=1).compress(entry.body)
    return entry.body
