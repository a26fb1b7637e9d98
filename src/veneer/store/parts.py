"""Parts of NARs: what a reader wants is fetched chunk by chunk, in a sparse file, and each chunk is checked by itself.

Where chunks come from, in this order: a chunk map that a key of the view signed; digests that are known because the NAR was verified
whole before; and for a view that defers the verification of the source, the frames that the file itself tells of. Where there
is none of these, or anything is wrong with a part, the NAR is read whole (``fetch``), which asks every source and checks all.

Invariants: P1: under ``strict`` a chunk is present only after ``verify.check_chunk`` accepted it, against digests that the view has
reason to believe: whether it has is asked for every view. P2: a chunk is asked for once at a time, however many wait for
it, and a chunk that another NAR holds is copied. P3: a NAR whose chunks are all here becomes whole only by ``verify.check_sparse``.
P4: what deferred readers saw is checked as soon as the rest is here, which is fetched at once; a NAR that turns out wrong, or
whose rest cannot be had there, is condemned.
P5: requests that a reader waits for go before all others.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from typing import Any

from veneer.cache.cache import Cache
from veneer.cache.chunk_maps import ChunkMap, ChunkMaps
from veneer.cache.index import NarState, PathRow
from veneer.cache.nars import VerifiedNar
from veneer.cache.sparse import SparseNar
from veneer.formats.chunk_map import Chunk, place_chunks
from veneer.formats.seekable_zstd import Frame
from veneer.formats.tree_index import Kind
from veneer.model.errors import (
    CacheError,
    CacheFullError,
    FormatError,
    HashMismatchError,
    SourceError,
    TrustError,
    VeneerError,
)
from veneer.model.store_path import StorePath
from veneer.model.tasks import tell_bugs
from veneer.model.tree import Node
from veneer.sources.base import RangesUnsupportedError
from veneer.sources.nar_stream import expected_size

from . import access
from .account import Account, Stories
from .chunk_fetch import ChunkFetcher, Part
from .chunk_finder import MAX_CHUNKS, ChunkFinder
from .in_flight import InFlight
from .resolve import AbsentError, Candidate, Resolver
from .verify import SignatureMemory, check_sparse
from .views import View

MAX_OPEN = 64
"""Sparse NARs kept open, with their chunk maps in memory (some 200 bytes per chunk)."""
REFUSED_SECONDS = 60.0
"""For which a NAR is not asked for in parts after something was wrong with them."""
MAX_REFUSED = 4096
MAX_ENTRIES = 20_000
"""Of a tree, that are looked at for large files."""
ONE_CHUNK = 128 << 10
"""Bytes of a file that lies in one chunk or two: nothing more of it is asked for."""
SHARED = 0.25
"""Of a NAR's bytes: when other NARs hold as much, it is put together from them instead of being streamed."""

Admit = Callable[[PathRow, VerifiedNar, Node, bytearray], int]


class _DroppedError(SourceError):
    """The part was closed while it was completed: it is whole or condemned by now, or to be begun anew."""


class Parts:
    """Of one store; event loop only."""

    def __init__(
        self,
        cache: Cache,
        stories: Stories,
        resolver: Resolver,
        memory: SignatureMemory,
        *,
        clock: Callable[[], float],
        encode: Callable[[PathRow, Node], bytearray],
        admit: Admit,
        spoilt: Callable[[PathRow, str, VeneerError], None],
        make_room: Callable[[int], bool],
        parallel: int,
        in_flight: int,
    ) -> None:
        """``in_flight``: bytes that requests may hold in memory. ``spoilt``: told of a NAR of which bytes were read that nobody vouches for, the source that they came from, and why."""
        self._cache = cache
        self._maps = ChunkMaps(cache.index)
        self._stories = stories
        self._resolver = resolver
        self._clock = clock
        self._encode = encode
        self._admit = admit
        self._spoilt = spoilt
        self._open: OrderedDict[int, Part] = OrderedDict()
        self._opening: dict[tuple[int, str], asyncio.Task[Part | None]] = {}
        self._unchecked: dict[int, Part] = {}
        """Parts that were shown, of sources that give none any more: compared with the NAR when it comes whole (P4)."""
        self._refused: OrderedDict[tuple[StorePath, str], float] = OrderedDict()
        """(path, source URL) of which no parts are asked for until then."""
        self._finder = ChunkFinder(memory)
        self._fetch = ChunkFetcher(
            cache, self._maps, self._open, make_room, parallel=parallel, in_flight=InFlight(in_flight)
        )

    @property
    def busy(self) -> set[int]:
        """Path numbers whose sparse file is written, or has no row yet; eviction and checks leave them alone."""
        return {
            number
            for number, part in self._open.items()
            if part.busy or not part.verified or not part.nar.held
        }

    @property
    def moved(self) -> int:
        """Bytes that arrived since the start."""
        return self._fetch.moved

    @property
    def owners(self) -> set[str]:
        """Identities of the views whose sources are read from."""
        owners = {identity for _, identity in self._opening}
        for part in self._open.values():
            owners.update(request.owner for request in part.fetching.values())
            if part.rest is not None:
                owners.add(part.rest_owner)
        return owners

    async def close(self) -> None:
        """Cancel everything and wait for the threads."""
        tasks: list[asyncio.Task[Any]] = list(self._opening.values())
        tasks += [part.rest for part in self._open.values() if part.rest is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._fetch.close()
        for part in (*self._open.values(), *self._unchecked.values()):
            part.close()

    def agree(self, number: int, verified: int) -> bool:
        """Whether the parts that were shown unchecked, if any, are those of the verified NAR in this descriptor."""
        part = self._unchecked.pop(number, None)
        if part is None:
            return True
        try:
            here = [
                chunk for chunk, present in zip(part.nar.chunks, part.nar.present, strict=True) if present
            ]
            mine = part.nar.fileno
            return all(os.pread(mine, c.size, c.offset) == os.pread(verified, c.size, c.offset) for c in here)
        except OSError:
            return False
        finally:
            part.close()

    def forget(self, number: int) -> None:
        """The sparse file is gone, or the number is: whoever has it open in another process keeps what was there."""
        if (unchecked := self._unchecked.pop(number, None)) is not None:
            unchecked.close()
        part = self._open.pop(number, None)
        if part is not None:
            part.close()
            if not part.verified:  # no row tells of it
                with suppress(OSError):
                    part.nar.path.unlink(missing_ok=True)

    async def content(
        self, view: View, row: PathRow, offset: int, size: int, account: Account
    ) -> tuple[int, int, int] | None:
        """(start, end, inode): bytes of the sparse file around [offset, offset + size) that may be read, once they are here.

        None: this NAR has to be read whole.
        """
        part = await self._opened(view, row, account)
        if part is None:
            return None
        end = min(offset + size, row.nar_size)
        wanted = part.nar.covering(offset, end)
        account.ask_part(row.store_path, end - offset)
        loop = asyncio.get_running_loop()
        began = loop.time()
        waits = not all(part.nar.present[at] for at in wanted)
        guided = account.is_guided(row.store_path)
        try:
            self._fetch.ask(view, part, wanted, account, demanded=True)
            if not guided:
                self._read_ahead(view, part, offset, end, account)
            await self._fetch.have(view, part, wanted, account, demanded=True)
        except VeneerError as error:
            self._give_up(part, error)
            return None
        except RangesUnsupportedError:
            self._refuse(part, without_ranges=True)
            return None
        found = part.nar.around(offset, end)
        if found is None:
            return None  # dropped meanwhile
        if self._is_deferred(view, part):
            part.shown = True
        if waits and not guided:
            self._waited(view, part, offset, loop.time() - began, account)
        self._complete_if_worth(view, part, account, guided=guided)
        return (*found, part.nar.inode)

    async def load(
        self,
        view: View,
        row: PathRow,
        ranges: Sequence[tuple[int, int]],
        account: Account,
    ) -> bool:
        """Have the bytes [(offset, size)] of the NAR here; nobody waits for them. False: it has to be read whole."""
        part = await self._opened(view, row, account)
        if part is None:
            return False
        wanted = sorted({at for start, size in ranges for at in part.nar.covering(start, start + size)})
        try:
            await self._fetch.have(view, part, wanted, account, demanded=False)
        except VeneerError as error:
            self._give_up(part, error)
            return False
        except RangesUnsupportedError:
            self._refuse(part, without_ranges=True)
            return False
        if part.closed:
            return False
        self._complete_if_worth(view, part, account, guided=account.is_guided(row.store_path))
        return True

    def expect(self, row: PathRow, candidate: Candidate, account: Account) -> None:
        """Have what tells of the candidate's chunks on its way, where it will be asked for."""
        size = expected_size(candidate.info.info)
        is_small = size is None or size <= access.SMALL
        if row.nar == NarState.NONE and not is_small and self._maps.get(row.number) is None:
            self._finder.expect(candidate, account)

    async def whole(self, view: View, row: PathRow, account: Account) -> int | None:
        """Complete a NAR of which something is here, or in other NARs; the path number that it has then. None: stream it."""
        if row.number not in self._open and row.nar != NarState.SPARSE and not self._maps.any():
            return None
        part = await self._opened(view, row, account)
        if part is None or (not part.nar.held and self._fetch.shared(part) < SHARED * row.nar_size):
            return None
        try:
            return await asyncio.shield(self._completing(view, part, account))
        except VeneerError:
            return None  # told by ``_completed``
        except RangesUnsupportedError:
            self._refuse(part, without_ranges=True)
            return None

    async def learn(self, row: PathRow, candidate: Candidate, frames: tuple[Frame, ...]) -> None:
        """Keep the digests of a NAR that was verified whole just now, by the frames of the file that it came from."""
        if len(frames) > MAX_CHUNKS or self._cache.index.path(row.number) is None:
            return
        digests = await asyncio.get_running_loop().run_in_executor(
            self._fetch.threads, self._digests, row.number, frames
        )
        if digests is None or self._maps.get(row.number) is not None:
            return
        info = candidate.info.info
        chunks = tuple(
            Chunk(f.compressed_offset, f.compressed_size, f.offset, f.size, digest)
            for f, digest in zip(frames, digests, strict=True)
        )
        rows = [(c.compressed_size, c.size, c.digest) for c in chunks]
        if chunks != place_chunks(rows, chunks[0].compressed_offset):
            return  # with other things between its frames
        source = candidate.source.url
        self._maps.put(row.number, ChunkMap(source, info.url, info.compression, chunks, learnt=True))

    # -- which chunks

    async def _opened(self, view: View, row: PathRow, account: Account) -> Part | None:
        part = self._open.get(row.number)
        if part is not None and not part.nar.is_in_place():
            self.forget(row.number)  # somebody removed it, whose readers would look for it in vain
            self._cache.nars.drop(row.number)
            part = None
        if part is not None and view.identity in part.views:
            self._open.move_to_end(row.number)
            return part
        key = (row.number, view.identity)
        task = self._opening.get(key)
        if task is None:
            task = asyncio.create_task(self._begin(view, row, account), name=f"parts of {row.store_path}")
            self._opening[key] = task
            task.add_done_callback(lambda _: self._opening.pop(key, None))
            task.add_done_callback(tell_bugs)
        return await asyncio.shield(task)

    async def _begin(self, view: View, row: PathRow, account: Account) -> Part | None:
        part = self._open.get(row.number)
        if (
            part is not None
            and not part.verified
            and part.chunk_map.source not in view.deferred
            and part.rest
        ):
            part.hurry.set()  # P4: what others saw is checked before it comes another way
            await asyncio.wait({part.rest})
        try:
            return await self._of_candidates(view, row, account)
        except AbsentError:
            return None  # who reads it whole finds out as well, and says it better
        except CacheError as error:
            self._stories.add(str(row.store_path), error)
            return None  # reading whole makes room

    async def _of_candidates(self, view: View, row: PathRow, account: Account) -> Part | None:
        kept = self._maps.get(row.number)
        async with aclosing(self._resolver.candidates(view, row.store_path, account)) as candidates:
            async for candidate in candidates:
                info, source = candidate.info.info, candidate.source
                if info.nar_hash != row.nar_hash:
                    continue
                size = expected_size(info)
                if size is None or size <= access.SMALL or self._is_refused(row, source.url):
                    return None
                if self._cache.index.quarantined(row.store_path, row.nar_hash, source.url, self._clock()):
                    continue
                try:
                    found = await self._finder.find(view, row, candidate, kept, account)
                except RangesUnsupportedError:
                    found = None
                except (SourceError, FormatError, TrustError) as error:
                    self._stories.add(str(row.store_path), error)
                    self._refused_until(row, source.url)
                    return None
                if found is None:
                    return None
                files = await asyncio.to_thread(self._files, row.number)
                part = self._use(view, row, candidate, *found)
                if part is not None:
                    part.files = files
                return part
        return None

    def _files(self, number: int) -> list[tuple[int, int]]:
        """(start, end) of the files that are larger than a chunk usually is, ascending; of the tree, where there is one."""
        try:
            tree = self._cache.trees.open(number)
            entries = map(tree.entry, range(min(tree.count, MAX_ENTRIES)))
            spans = [(e.offset, e.offset + e.size) for e in entries if e.kind <= Kind.EXECUTABLE]
        except FormatError:
            return []
        return sorted(span for span in spans if span[1] - span[0] > ONE_CHUNK)

    def _use(
        self, view: View, row: PathRow, candidate: Candidate, chunk_map: ChunkMap, verified: bool
    ) -> Part | None:
        """Open the sparse file for it; None when another one is in use, or the NAR is here by now."""
        now = self._cache.index.path(row.number)
        if now is None or now.quarantined or now.nar == NarState.WHOLE:
            return None
        part = self._open.get(row.number)
        if part is not None:
            same = part.chunk_map.url == chunk_map.url and part.chunk_map.chunks == chunk_map.chunks
            same_source = part.chunk_map.source == candidate.source.url
            if part.verified != verified or not same or not (verified or same_source):
                return None
            part.views[view.identity] = candidate.source.url
            return part
        nar = self._sparse(now, chunk_map, verified=verified)
        views = {view.identity: candidate.source.url}
        part = Part(row, nar, chunk_map, candidate.info, verified, views)
        self._open[row.number] = part
        self._close_unused()
        return part

    def _sparse(self, row: PathRow, chunk_map: ChunkMap, *, verified: bool) -> SparseNar:
        """The file that holds what is present, or a new one."""
        nars = self._cache.nars
        if row.nar == NarState.SPARSE:
            now = self._maps.get(row.number)  # others were at work while ours was looked for
            if verified and now is not None and now.present is not None and now.chunks == chunk_map.chunks:
                try:
                    return nars.sparse(row.number, chunk_map.chunks, now.present)
                except CacheError as error:
                    self._stories.add(str(row.store_path), error)
            nars.drop(row.number)  # chunks of another map, or a file that was lost
        if verified:
            self._maps.put(row.number, chunk_map)
        return nars.sparse(row.number, chunk_map.chunks, None)

    def _close_unused(self) -> None:
        for number in list(self._open)[:-1]:  # the last one was opened just now
            if len(self._open) <= MAX_OPEN:
                return
            part = self._open[number]
            if not part.busy:
                self.forget(number)

    # -- more than was asked for

    def _read_ahead(self, view: View, part: Part, start: int, end: int, account: Account) -> None:
        """The rest of a file that is not large; or what a reader that goes on wants next."""
        file = _file_at(part.files, start)
        if file is not None and file[1] - file[0] <= access.FILE:
            part.sequences.ahead(start, end)
            self._fetch.ask(view, part, part.nar.covering(*file), account, demanded=True)
        elif window := part.sequences.ahead(start, end):
            self._fetch.read_ahead(view, part, end, window, account)

    def _waited(self, view: View, part: Part, start: int, seconds: float, account: Account) -> None:
        """A reader had to wait for a part of a large file: perhaps all of it pays."""
        part.waited += seconds
        part.waits += 1
        file = _file_at(part.files, start)
        if file is None or file[1] - file[0] <= access.FILE:
            return
        waited = part.file_waited[file[0]] = part.file_waited.get(file[0], 0.0) + seconds
        chunks = part.nar.covering(*file)
        missing = sum(part.nar.chunks[at].compressed_size for at in chunks if not part.nar.present[at])
        if missing and access.rest_pays(waited, missing, self._fetch.rate, times=1):
            self._fetch.ask(view, part, chunks, account, demanded=False)

    # -- all of it

    def _complete_if_worth(self, view: View, part: Part, account: Account, *, guided: bool) -> None:
        if part.closed:
            return
        nar = part.nar
        if guided and not self._is_deferred(view, part):
            return
        missing = (1 - nar.held / nar.nar_size) * (expected_size(part.info.info) or nar.nar_size)
        pays = access.rest_pays(part.waited, missing, self._fetch.rate, times=part.waits)
        if self._is_deferred(view, part) or pays:
            self._completing(view, part, account)
        elif access.completes(nar.held, nar.nar_size):
            self._completing(view, part, account, when_idle=True)

    def _completing(
        self, view: View, part: Part, account: Account, *, when_idle: bool = False
    ) -> asyncio.Task[int]:
        if not when_idle:
            part.hurry.set()
        if part.rest is None:
            part.rest_owner = view.identity
            part.rest = asyncio.create_task(
                self._rest(view, part, account), name=f"rest of {part.row.store_path}"
            )
            part.rest.add_done_callback(lambda task: self._completed(part, task))
        return part.rest

    def _completed(self, part: Part, task: asyncio.Task[int]) -> None:
        part.rest = None
        part.hurry.clear()
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, _DroppedError):
            return
        if isinstance(error, VeneerError):
            self._give_up(part, error)
        elif isinstance(error, RangesUnsupportedError):
            self._refuse(part, without_ranges=True)
        elif isinstance(error, Exception):
            self._stories.add(str(part.row.store_path), error)

    async def _rest(self, view: View, part: Part, account: Account) -> int:
        """Everything that is missing, then the check of the whole (P3); the path number that it has then."""
        await self._fetch.idle(part.hurry)
        await self._fetch.have(view, part, range(len(part.nar.chunks)), account, demanded=False)
        self._require_open(part)
        verified, tree, encoded = await self._fetch.on_thread(part, self._checked, part)
        self._require_open(part)
        del self._open[part.row.number]
        part.closed = True  # ``admit`` ends the file
        try:
            self._cache.nars.set_off(part.nar)
            return self._admit(part.row, verified, tree, encoded)
        except BaseException:
            part.nar.discard()
            self._cache.nars.drop(part.row.number)  # what was not admitted
            raise

    def _require_open(self, part: Part) -> None:
        if part.closed:
            raise _DroppedError(f"the content of {part.row.store_path} was dropped while it was completed")

    def _is_deferred(self, view: View, part: Part) -> bool:
        """Whether the view reads what will be checked later (P4)."""
        return not part.verified and part.views[view.identity] not in view.trusted

    def _checked(self, part: Part) -> tuple[VerifiedNar, Node, bytearray]:
        """On a worker thread. HashMismatchError, FormatError."""
        verified, tree = check_sparse(part.info, part.nar, where=part.chunk_map.source)
        return verified, tree, self._encode(part.row, tree)

    def _digests(self, number: int, frames: tuple[Frame, ...]) -> list[bytes] | None:
        """Of a whole NAR that is here; None when it is not any more. On a worker thread."""
        try:
            with open(self._cache.nars.path(number), "rb", buffering=0) as file:
                parts = (os.pread(file.fileno(), frame.size, frame.offset) for frame in frames)
                return [hashlib.sha256(data).digest() for data in parts]
        except OSError:
            return None

    # -- what goes wrong

    def _give_up(self, part: Part, error: VeneerError) -> None:
        """Parts of this file are of no use: it is read whole, from whatever source has it."""
        path = part.row.store_path
        self._stories.add(str(path), error)
        if isinstance(error, CacheFullError) and not part.shown:
            return
        if isinstance(error, (FormatError, HashMismatchError)) and (not part.verified or part.nar.is_whole):
            self._refused_until(part.row, part.chunk_map.source)
            if self._open.get(part.row.number) is part:
                self.forget(part.row.number)
            self._spoilt(part.row, part.chunk_map.source, error)
        else:
            self._refuse(part)

    def _refuse(self, part: Part, *, without_ranges: bool = False) -> None:
        self._refused_until(part.row, part.chunk_map.source)
        if self._open.get(part.row.number) is part and not part.verified:
            if without_ranges and part.shown:
                self._unchecked[part.row.number] = self._open.pop(part.row.number)
                return
            self.forget(part.row.number)
            if part.shown:
                error = SourceError(
                    f"parts of {part.row.store_path} were read, and the rest cannot be had to check them",
                    where=part.chunk_map.source,
                )
                self._spoilt(part.row, part.chunk_map.source, error)

    def _refused_until(self, row: PathRow, url: str) -> None:
        self._refused[row.store_path, url] = self._clock() + REFUSED_SECONDS
        self._refused.move_to_end((row.store_path, url))
        if len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)

    def _is_refused(self, row: PathRow, url: str) -> bool:
        until = self._refused.get((row.store_path, url))
        return until is not None and 0 < until - self._clock() <= REFUSED_SECONDS


def _file_at(files: list[tuple[int, int]], offset: int) -> tuple[int, int] | None:
    at = bisect_right(files, (offset, 1 << 63)) - 1
    return files[at] if at >= 0 and offset < files[at][1] else None
