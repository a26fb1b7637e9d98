"""What a root's bundle holds: the small objects of its closure, as far as the target has them.

They are read from the target, where they are to be found later: paths of this run and paths that were there before are
treated alike. What this run wrote is remembered, so that a bucket is not asked for it again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from veneer.formats import bundle, chunk_map
from veneer.formats.bundle import CHUNKS, LISTING, NARINFO, Entry
from veneer.formats.narinfo import parse_narinfo
from veneer.model.errors import FormatError
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath

from .target import Target

ROOM = 64 << 20
"""Bytes of objects in a bundle. The smallest come first: each of them saves a request as well as a large one does."""
MAX_PATHS = 30_000
_KEPT = 256 << 20
_ASKED_AT_ONCE = 16


class SmallObjects:
    """A target's narinfos, listings and chunk maps. Any thread. Up to _KEPT bytes of them are remembered."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._known: dict[str, bytes] = {}
        self._room = _KEPT

    def put(self, name: str, data: bytes) -> None:
        self._target.put(name, data)
        self._keep(name, data)

    def read(self, name: str, limit: int) -> bytes | None:
        """None also for one of more than ``limit`` bytes, or of none."""
        data = self._known.get(name)
        if data is None:
            data = self._target.read(name, limit + 1) or b""
            self._keep(name, data)
        return data if 0 < len(data) <= limit else None

    def _keep(self, name: str, data: bytes) -> None:
        with self._lock:
            self._room += len(self._known.pop(name, b""))
            if len(data) <= self._room:
                self._known[name] = data
                self._room -= len(data)


def collect(objects: SmallObjects, info: UnverifiedPathInfo, narinfo: bytes) -> list[Entry]:
    """The bundle of ``info``, whose narinfo is to be ``narinfo``; empty when there is nothing of its closure but itself."""
    with ThreadPoolExecutor(_ASKED_AT_ONCE, "bundle") as pool:
        closure = {info.store_path: (info, narinfo)}
        ring = _beyond(closure, [info])
        while ring and len(closure) < MAX_PATHS:
            found = pool.map(lambda path: _narinfo(objects, path, info.store_dir), ring)
            new = {told[0].store_path: told for told in found if told is not None}
            closure |= new
            ring = _beyond(closure, (told[0] for told in new.values()))
        if len(closure) == 1:
            return []
        members = list(closure.values())[:MAX_PATHS]
        entries = [Entry(told.store_path.hash_part, NARINFO, data) for told, data in members]
        names = [name for told, _ in members for name in _beside(told)]
        bodies = pool.map(lambda name: objects.read("".join(name), bundle.MAX_OTHER), names)
        beside = [Entry(*name, body) for name, body in zip(names, bodies, strict=True) if body is not None]
    return _fitting(entries, beside)


def _beyond(
    closure: dict[StorePath, tuple[UnverifiedPathInfo, bytes]], infos: Iterable[UnverifiedPathInfo]
) -> list[StorePath]:
    """What ``infos`` refer to and is not in ``closure``, in order."""
    return sorted({path for info in infos for path in info.references if path not in closure})


def _narinfo(
    objects: SmallObjects, path: StorePath, store_dir: str
) -> tuple[UnverifiedPathInfo, bytes] | None:
    """What the target says of ``path``; None when it has nothing that is of use."""
    data = objects.read(path.hash_part + NARINFO, bundle.MAX_NARINFO)
    if data is None:
        return None
    try:
        info = parse_narinfo(data, store_dir=store_dir)
    except FormatError:
        return None
    return (info, data) if info.store_path == path else None


def _beside(info: UnverifiedPathInfo) -> Iterator[tuple[str, str]]:
    yield info.store_path.hash_part, LISTING
    if chunk_map.is_announced(info):
        yield info.store_path.hash_part, CHUNKS


def _fitting(narinfos: list[Entry], beside: list[Entry]) -> list[Entry]:
    """As many as there is ROOM for; the root's narinfo first, then the others', then the rest in order of names."""
    room = ROOM
    kept = []
    for entry in [*narinfos, *sorted(beside, key=lambda entry: (len(entry.body), entry.hash_part))]:
        room -= len(entry.body)
        if room < 0:
            break
        kept.append(entry)
    count = sum(entry.suffix == NARINFO for entry in kept)
    return kept[:count] + sorted(kept[count:], key=lambda entry: (entry.suffix, entry.hash_part))
