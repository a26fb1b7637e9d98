"""Carries a plan out: paths in parallel, each object whole, narinfos in the plan's order (P1, P2 of ``plan``).

A run that fails or is killed leaves a valid cache: what has a narinfo has everything that it refers to in the plan. The
next run finds those paths there, and makes the bundles that are missing; NAR files are named by their content, so one that is there with the right size is not
sent again. A NAR is uploaded only after its hash and size were those of its path.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

from veneer.formats import bundle, cache_info, narinfo
from veneer.formats.bundle import write_bundle
from veneer.formats.cache_info import CacheInfo, parse_cache_info, write_cache_info
from veneer.formats.chunk_map import NARINFO_KEY, SUFFIX, UnverifiedChunkMap, write_chunk_map
from veneer.formats.listing import write_listing
from veneer.formats.narinfo import parse_narinfo, write_narinfo
from veneer.formats.signature import SecretKey, fingerprint
from veneer.model.errors import FormatError, HashMismatchError, UsageError, VeneerError
from veneer.model.hashes import nix32_encode
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath
from veneer.model.tree import Node

from .bundles import SmallObjects, collect
from .contents import Contents
from .encode import Encoded, Encoder
from .plan import Plan, Upload
from .target import Target, write_failed

_ASKED_AT_ONCE = 16
_CACHE_INFO = "nix-cache-info"

Advance = Callable[[dict[str, object]], None]
"""Told paths_done, paths, bytes_done, bytes; from one thread at a time."""


@dataclass(slots=True)
class Done:
    """What a run did. Sizes in bytes; ``sent`` counts NAR files that were not there. ``bundles``: whose were written."""

    paths: list[StorePath] = field(default_factory=list)
    bundles: list[StorePath] = field(default_factory=list)
    nar_size: int = 0
    file_size: int = 0
    sent: int = 0


def check_cache(target: Target, store_dir: str) -> bool:
    """Whether the target is a cache already. UsageError when it is one of another store."""
    data = target.read(_CACHE_INFO, cache_info.MAX_SIZE + 1)
    if data is None:
        return False
    found = parse_cache_info(data)
    if found.store_dir != store_dir:
        raise UsageError(
            f"this is a cache of {found.store_dir}, not of {store_dir}",
            where=target.url,
            hint="publish to another place",
        )
    return True


def begin_cache(target: Target, store_dir: str) -> None:
    """Make the target a cache, if it is none."""
    if not check_cache(target, store_dir):
        target.put(_CACHE_INFO, write_cache_info(CacheInfo(store_dir, want_mass_query=True)))


def present(target: Target, wanted: Iterable[UnverifiedPathInfo]) -> dict[StorePath, UnverifiedPathInfo]:
    """What the target says of those of the wanted paths that it has. A narinfo that cannot be read counts as none."""

    def ask(info: UnverifiedPathInfo) -> UnverifiedPathInfo | None:
        data = target.read(f"{info.store_path.hash_part}.narinfo", narinfo.MAX_SIZE)
        if data is None:
            return None
        try:
            found = parse_narinfo(data, store_dir=info.store_dir)
        except FormatError:
            return None
        return found if found.store_path == info.store_path else None

    with ThreadPoolExecutor(_ASKED_AT_ONCE, "ask") as pool:
        return {info.store_path: info for info in pool.map(ask, wanted) if info is not None}


class Publisher:
    """Uploads to one target. ``key`` signs narinfos and chunk maps; without one there are no chunk maps."""

    def __init__(
        self, target: Target, encoder: Encoder, contents: Contents, *, key: SecretKey | None, jobs: int
    ) -> None:
        self._target = target
        self._objects = SmallObjects(target)
        self._encoder = encoder
        self._contents = contents
        self._key = key
        self._jobs = jobs
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def run(self, plan: Plan, advance: Advance) -> Done:
        """Upload everything. The first failure ends it, after the objects under way; VeneerError."""
        done = Done()
        futures: dict[StorePath, Future[None]] = {}
        pool = ThreadPoolExecutor(self._jobs, "publish")
        try:
            for upload in plan.uploads:
                # Those it waits for were submitted before: the first one unfinished waits for nobody.
                before = [futures[path] for path in upload.after]
                futures[upload.info.store_path] = pool.submit(self._one, upload, before, plan, done, advance)
            wait(futures.values(), return_when=FIRST_EXCEPTION)
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
        failures = [
            f.exception() for f in futures.values() if not f.cancelled() and f.exception() is not None
        ]
        first = next((error for error in failures if not isinstance(error, _StoppedError)), None)
        if first is not None:
            raise first
        for root in plan.bundles:
            self._add_bundle(root, done)
        return done

    def _one(
        self, upload: Upload, before: Sequence[Future[None]], plan: Plan, done: Done, advance: Advance
    ) -> None:
        if self._stop.is_set():
            raise _StoppedError
        info, sent = self._store_content(upload.info)
        for future in before:
            if future.exception() is not None:
                raise _StoppedError
        text = write_narinfo(info)
        if upload.bundled:
            text = self._store_bundle(info, text, done)
        self._objects.put(f"{info.store_path.hash_part}.narinfo", text)
        with self._lock:
            done.paths.append(info.store_path)
            done.nar_size += info.nar_size
            done.file_size += info.file_size or 0
            done.sent += sent
            advance(
                {
                    "paths_done": len(done.paths),
                    "paths": len(plan.uploads),
                    "bytes_done": done.nar_size,
                    "bytes": plan.nar_size,
                }
            )

    def _store_content(self, info: UnverifiedPathInfo) -> tuple[UnverifiedPathInfo, int]:
        """(the narinfo to write, bytes of the NAR file if it had to be sent) after all but the narinfo is there."""
        file = self._target.scratch / secrets.token_hex(8)
        try:
            tree, encoded = self._encode(info, file)
            named = self._described(info, encoded)
            sent = 0
            if self._target.size(named.url) != encoded.file_size:
                self._target.put_file(named.url, file)
                sent = encoded.file_size
        finally:
            file.unlink(missing_ok=True)
        part = info.store_path.hash_part
        listing = _listing(tree)
        if listing is not None:
            self._objects.put(f"{part}.ls", listing)
        if self._key is not None:
            self._objects.put(f"{part}{SUFFIX}", write_chunk_map(_chunk_map(named, encoded, self._key)))
        return named, sent

    def _store_bundle(self, info: UnverifiedPathInfo, text: bytes, done: Done) -> bytes:
        """The narinfo to write, after the bundle is there that it announces: ``text`` when there is nothing to bundle."""
        part = info.store_path.hash_part
        said = text if bundle.is_announced(info) else bundle.announced(text, part)
        entries = collect(self._objects, info, said)
        if not entries:
            return text
        self._target.put(part + bundle.SUFFIX, write_bundle(part, entries))
        with self._lock:
            done.bundles.append(info.store_path)
        return said

    def _add_bundle(self, root: UnverifiedPathInfo, done: Done) -> None:
        """For a root that was there: its narinfo stays byte for byte, but for the line that announces the bundle."""
        name = f"{root.store_path.hash_part}.narinfo"
        text = self._target.read(name, narinfo.MAX_SIZE)
        if text is None:
            return  # somebody removed it meanwhile
        info = parse_narinfo(text, store_dir=root.store_dir)
        said = self._store_bundle(info, text, done)
        if said != text:
            self._target.put(name, said)

    def _encode(self, info: UnverifiedPathInfo, file: Path) -> tuple[Node, Encoded]:
        where = info.store_path.absolute(info.store_dir)
        try:
            with self._contents(info) as (tree, nar), open(file, "xb") as out:
                encoded = self._encoder.encode(tree, nar, out)
        except OSError as error:
            raise write_failed(error, error.filename or self._target.url) from error
        except FormatError as error:
            raise VeneerError(f"its content cannot be published: {error.what}", where=where) from error
        if (encoded.nar_hash, encoded.nar_size) != (info.nar_hash, info.nar_size):
            raise HashMismatchError(
                f"its content is not what is registered: expected {info.nar_hash} and {info.nar_size} bytes,"
                f" got {encoded.nar_hash} and {encoded.nar_size} bytes",
                where=where,
                hint="nothing of it was published",
            )
        return tree, encoded

    def _described(self, info: UnverifiedPathInfo, encoded: Encoded) -> UnverifiedPathInfo:
        signatures, extra = info.signatures, info.extra
        if self._key is not None:
            signatures = tuple(dict.fromkeys((*signatures, self._key.sign(fingerprint(info)))))
            extra = (*extra, (NARINFO_KEY, info.store_path.hash_part + SUFFIX))
        return replace(
            info,
            url=f"nar/{nix32_encode(encoded.file_hash.digest)}.nar.zst",
            compression="zstd",
            file_hash=encoded.file_hash,
            file_size=encoded.file_size,
            signatures=signatures,
            extra=extra,
        )


class _StoppedError(Exception):
    """Not begun, or not finished, because another path failed."""


def _listing(tree: Node) -> bytes | None:
    """None for a tree with names that are not UTF-8: its listing cannot be written."""
    try:
        return write_listing(tree)
    except FormatError:
        return None


def _chunk_map(info: UnverifiedPathInfo, encoded: Encoded, key: SecretKey) -> UnverifiedChunkMap:
    chunk_map = UnverifiedChunkMap(
        store_path=info.store_path,
        nar_hash=info.nar_hash,
        nar_size=info.nar_size,
        url=info.url,
        chunks=encoded.chunks,
        store_dir=info.store_dir,
    )
    return replace(chunk_map, signatures=(key.sign(chunk_map.fingerprint()),))
