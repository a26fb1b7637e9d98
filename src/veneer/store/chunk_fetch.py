"""Brings chunks into sparse NARs: asks for each once, checks it, copies what another NAR holds, and lets readers go first.

Invariants P1, P2 and P5 of ``parts`` are kept here.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from veneer.cache.cache import Cache
from veneer.cache.chunk_maps import ChunkMap, ChunkMaps
from veneer.cache.index import NarState, PathRow
from veneer.cache.sparse import SparseNar
from veneer.model.errors import CacheFullError, HashMismatchError
from veneer.model.path_info import PathInfo
from veneer.model.tasks import tell_bugs
from veneer.sources.base import RangesUnsupportedError, Source
from veneer.sources.frames import decode_frame

from . import access
from .account import Account
from .in_flight import InFlight
from .verify import check_chunk
from .views import View

P = ParamSpec("P")
T = TypeVar("T")

REQUEST = 4 << 20
"""Bytes of one request, at most, or one chunk: what is held in memory for each."""
GAP = 64 << 10
"""Bytes between two wanted parts that are fetched with them rather than asked for twice."""
BACKGROUND = 4
"""Requests at a time that nobody waits for."""
IDLE = 0.5
"""Seconds without a reader's request after which what is mostly here is completed."""
ASSUMED_RATE = 25e6
"""Bytes per second before anything was measured: 200 Mbit/s."""
MEASURED = 256 << 10
"""Bytes of a request that tell something of the link's rate."""
RATE_SHARE = 0.3
"""Weight of the newest one."""
NO_ROOM_SECONDS = 1.0
"""Between attempts to evict when nothing could go."""
PATIENCE = 0.05
"""Seconds for which each of those lets readers go first: a link that is never idle must not stop it for ever."""


@dataclass(eq=False)
class _Request:
    """Chunks asked for together, of a source of the view ``owner``. ``begun``: the question is out; before that, whoever waits for one asks by himself."""

    owner: str
    demanded: bool
    task: asyncio.Task[None] | None = None
    begun: bool = False


@dataclass(eq=False)
class Part:
    """A sparse NAR at work. ``verified``: chunks have digests; else they are served to ``deferred`` readers only."""

    row: PathRow
    nar: SparseNar
    chunk_map: ChunkMap
    info: PathInfo
    verified: bool
    views: dict[str, str]
    """Identity of each view that may use it (P1) -> URL of its source that has the file."""
    fetching: dict[int, _Request] = field(default_factory=dict)
    """Ordinal -> the request that brings it."""
    sequences: access.Sequences = field(default_factory=access.Sequences)
    files: list[tuple[int, int]] = field(default_factory=list)
    """(start, end) in the NAR of its larger files, ascending."""
    waited: float = 0.0
    waits: int = 0
    """Seconds that readers waited for parts, and how often they did."""
    file_waited: dict[int, float] = field(default_factory=dict)
    """The same of single files, by where they start."""
    rest: asyncio.Task[int] | None = None
    rest_owner: str = ""
    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the rest is wanted now, not when nobody wants anything else."""
    shown: bool = False
    """Whether a reader had parts of it that were to be verified later."""
    working: int = 0
    """Threads and requests that use the file; it is closed after them."""
    closed: bool = False

    def source(self, view: View) -> Source:
        """The view's source that has the file."""
        url = self.views[view.identity]
        return next(source for source in view.chain.sources if source.url == url)

    @property
    def busy(self) -> bool:
        """Whether the file is being written."""
        return bool(self.working or self.fetching or self.rest)

    def leave(self) -> None:
        """Whoever added to ``working`` is done."""
        self.working -= 1
        if self.closed and not self.working:
            self.nar.finish()

    def close(self) -> None:
        self.closed = True
        if not self.working:
            self.nar.finish()


class ChunkFetcher:
    """Of one store; event loop only, except where said. ``open_parts``: those in use, by path number."""

    def __init__(
        self,
        cache: Cache,
        maps: ChunkMaps,
        open_parts: Mapping[int, Part],
        make_room: Callable[[int], bool],
        *,
        parallel: int,
        in_flight: InFlight,
    ) -> None:
        self._cache = cache
        self._maps = maps
        self._open = open_parts
        self._make_room = make_room
        self._memory = in_flight
        self._wanted = asyncio.Semaphore(2 * parallel)
        self._unasked = asyncio.Semaphore(BACKGROUND)
        self._demands = 0
        self._asked = 0
        """Requests that a reader waited for, since the start."""
        self._quiet = asyncio.Event()
        self._quiet.set()
        self.threads = ThreadPoolExecutor(max(2, parallel // 2), thread_name_prefix="chunk")
        self._tasks: set[asyncio.Task[None]] = set()
        self.moved = 0
        """Bytes that arrived since the start."""
        self.rate = ASSUMED_RATE
        """Bytes per second that the link gives, as far as it is known."""
        self._in_flight = 0
        self._no_room_until = 0.0

    async def close(self) -> None:
        """Cancel every request and wait for the threads."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self.threads.shutdown)

    async def have(
        self, view: View, part: Part, wanted: Iterable[int], account: Account, *, demanded: bool
    ) -> None:
        """Wait until these chunks are present, or the part is closed. Whatever a request raises."""
        missing = [at for at in wanted if not part.nar.present[at]]
        if not missing:
            return
        part.working += 1
        try:
            while missing and not part.closed:
                self.ask(view, part, missing, account, demanded=demanded)
                waits = {part.fetching[at].task for at in missing if at in part.fetching}
                await asyncio.gather(*(asyncio.shield(task) for task in waits if task is not None))
                # What a reader asked for meanwhile is another request's by now.
                missing = [at for at in missing if not part.nar.present[at]]
        finally:
            part.leave()

    def ask(
        self, view: View, part: Part, missing: Sequence[int], account: Account, *, demanded: bool
    ) -> None:
        """Begin requests for what nobody asks for yet (P2)."""
        unasked = [
            at
            for at in missing
            if not part.nar.present[at]
            and (
                (request := part.fetching.get(at)) is None
                or (demanded and not request.begun and not request.demanded)
            )
        ]
        for group in self._grouped(part, unasked):
            request = _Request(view.identity, demanded)
            for at in group:
                part.fetching[at] = request
            request.task = asyncio.create_task(
                self._request(part.source(view), part, request, group, account),
                name=f"part of {part.row.store_path}",
            )
            self._tasks.add(request.task)
            request.task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        tell_bugs(task, RangesUnsupportedError)  # without anybody who waits, the next reader asks again

    def _grouped(self, part: Part, ordinals: Sequence[int]) -> list[list[int]]:
        """Ordinals in requests: neighbours together, with small gaps between them, up to REQUEST bytes each."""
        chunks = part.nar.chunks
        groups: list[list[int]] = []
        size = 0
        for at in ordinals:
            if groups:
                last = groups[-1][-1]
                between = range(last + 1, at)
                gap = sum(chunks[i].compressed_size for i in between)
                free = not any(part.nar.present[i] or i in part.fetching for i in between)
                added = gap + chunks[at].compressed_size
                if gap <= GAP and free and size + added <= REQUEST:
                    groups[-1] += [*between, at]
                    size += added
                    continue
            groups.append([at])
            size = chunks[at].compressed_size
        return groups

    async def _request(
        self,
        source: Source,
        part: Part,
        request: _Request,
        ordinals: list[int],
        account: Account,
    ) -> None:
        """Ask for chunks that lie one after the other, check and keep them."""
        part.working += 1
        try:
            if request.demanded:
                self._asked += 1
                self._demands += 1
                self._quiet.clear()
                try:
                    left = await self._without_copies(part, ordinals)
                    async with self._wanted:
                        request.begun = True
                        for group in _runs(left):
                            async with self._memory.hold(_needed(part, group), urgent=True):
                                await self._fetch(source, part, group, account)
                finally:
                    self._demands -= 1
                    if not self._demands:
                        self._quiet.set()
                return
            async with self._unasked:
                await self._let_readers_go_first()
                async with self._memory.hold(_needed(part, ordinals), urgent=False):
                    # Not before: readers would wait for room that they need not wait for.
                    request.begun = True
                    mine = [at for at in ordinals if part.fetching.get(at) is request]
                    for group in _runs(await self._without_copies(part, mine)):
                        await self._fetch(source, part, group, account)
        finally:
            for at in ordinals:
                if part.fetching.get(at) is request:
                    del part.fetching[at]
            part.leave()

    async def idle(self, hurry: asyncio.Event) -> None:
        """Wait until no reader has waited for IDLE seconds, or ``hurry`` is set."""
        while not hurry.is_set():
            asked = self._asked
            try:
                async with asyncio.timeout(IDLE):
                    await hurry.wait()
            except TimeoutError:
                if asked == self._asked and not self._demands:
                    return

    async def _let_readers_go_first(self) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                await self._quiet.wait()
        except TimeoutError:
            return

    async def _fetch(self, source: Source, part: Part, ordinals: list[int], account: Account) -> None:
        if part.closed:
            return  # whoever waits for it sees that
        first, last = part.nar.chunks[ordinals[0]], part.nar.chunks[ordinals[-1]]
        start = first.compressed_offset
        size = last.compressed_offset + last.compressed_size - start
        path = part.row.store_path
        self._in_flight += 1
        began = asyncio.get_running_loop().time()
        try:
            data = await source.part(part.info.info, start, size, account.meter(path))
            if size >= MEASURED:
                seconds = asyncio.get_running_loop().time() - began
                self.rate += RATE_SHARE * (self._in_flight * size / max(seconds, 1e-6) - self.rate)
        finally:
            self._in_flight -= 1
        self.moved += len(data)
        held = part.nar.held
        try:
            await self.on_thread(part, self._take_in, part, source.url, ordinals, data)
        except CacheFullError:
            if not self._make_room(sum(part.nar.chunks[at].size for at in ordinals)):
                raise
            await self.on_thread(part, self._take_in, part, source.url, ordinals, data)
        self._landed(part, ordinals)
        account.paths[path].nar += part.nar.held - held

    async def on_thread(self, part: Part, do: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """``do`` on a worker thread, which uses the part's file: that is closed after it, also when nobody waits any more."""
        loop = asyncio.get_running_loop()
        part.working += 1
        work = self.threads.submit(do, *args, **named)
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(part.leave))
        return await asyncio.wrap_future(work)

    def _take_in(self, part: Part, url: str, ordinals: list[int], data: bytes) -> None:
        """Decode, check (P1) and write; on a worker thread. FormatError, HashMismatchError, CacheFullError."""
        view = memoryview(data)
        start = part.nar.chunks[ordinals[0]].compressed_offset
        for at in ordinals:
            chunk = part.nar.chunks[at]
            begin = chunk.compressed_offset - start
            encoded = bytes(view[begin : begin + chunk.compressed_size])
            decoded = decode_frame(part.chunk_map.compression, encoded, chunk.size)
            if part.verified:
                check_chunk(chunk, decoded, where=url)
            part.nar.write(at, decoded)

    def _landed(self, part: Part, ordinals: list[int]) -> None:
        if part.closed:
            return
        part.nar.landed(ordinals)
        if part.verified:
            nar = part.nar
            self._cache.index.set_nar(nar.number, NarState.SPARSE, nar.disk_size, bytes(nar.present))
            self._keep_to_limit()

    def _keep_to_limit(self) -> None:
        """Evict, but do not look through the whole cache for each chunk where nothing may go."""
        limit, totals, now = (
            self._cache.max_bytes,
            self._cache.index.totals(),
            asyncio.get_running_loop().time(),
        )
        if limit is not None and totals.nar_bytes + totals.tree_bytes > limit and now >= self._no_room_until:
            self._no_room_until = 0.0 if self._make_room(0) else now + NO_ROOM_SECONDS

    def read_ahead(self, view: View, part: Part, end: int, window: int, account: Account) -> None:
        """Ask for what the reader wants next, in big pieces: nothing while half of the window is here or under way."""
        nar = part.nar
        near = nar.covering(end, min(end + window // 2, nar.nar_size)) if end < nar.nar_size else range(0)
        if all(nar.present[at] or at in part.fetching for at in near):
            return
        self.ask(view, part, nar.covering(end, min(end + window, nar.nar_size)), account, demanded=True)

    async def _without_copies(self, part: Part, missing: list[int]) -> list[int]:
        """``missing`` without what other NARs held, which is present now (P2)."""
        if not part.verified:
            return missing
        plan = []
        maps: dict[int, ChunkMap | None] = {}
        for at in missing:
            if (place := self._holder(part, at, maps)) is not None:
                plan.append((at, *place))  # noqa: PERF401 - a comprehension would hide the two conditions
        if not plan:
            return missing
        done = await self.on_thread(part, self._copy, part, plan)
        self._landed(part, done)
        return [at for at in missing if not part.nar.present[at]]

    def _holder(self, part: Part, at: int, maps: dict[int, ChunkMap | None]) -> tuple[str, int] | None:
        """(file, offset) of a chunk with the same digest. ``maps``: chunk maps that were read already."""
        chunk = part.nar.chunks[at]
        for number, ordinal in self._maps.holders(chunk.digest, but=part.row.number):
            held = self._open.get(number)
            if held is None and number not in maps:
                maps[number] = self._maps.get(number)
            chunk_map = maps[number] if held is None else held.chunk_map
            if chunk_map is None or chunk_map.chunks[ordinal].digest != chunk.digest:
                continue
            whole, sparse = self._cache.nars.files(number)
            present = chunk_map.present if held is None else held.nar.present
            if present is None or present[ordinal]:
                return str(whole if present is None else sparse), chunk_map.chunks[ordinal].offset
        return None

    def _copy(self, part: Part, plan: list[tuple[int, str, int]]) -> list[int]:
        """Ordinals that were copied; on a worker thread. What cannot be read or is not right is fetched instead."""
        done = []
        for at, file, offset in plan:
            chunk = part.nar.chunks[at]
            try:
                fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    data = os.pread(fd, chunk.size, offset)
                finally:
                    os.close(fd)
                check_chunk(chunk, data, where=file)
            except (OSError, HashMismatchError):
                continue  # evicted meanwhile, or of another file by now
            part.nar.write(at, data)
            done.append(at)
        return done

    def shared(self, part: Part) -> int:
        """Bytes of the NAR that others may hold."""
        return sum(part.nar.chunks[at].size for at in self._maps.elsewhere(part.row.number))


def _needed(part: Part, ordinals: list[int]) -> int:
    """Bytes in memory: all of them as they come, one as it is decoded."""
    chunks = [part.nar.chunks[at] for at in ordinals]
    return sum(chunk.compressed_size for chunk in chunks) + max(chunk.size for chunk in chunks)


def _runs(ordinals: list[int]) -> list[list[int]]:
    """Consecutive ones together."""
    runs: list[list[int]] = []
    for at in ordinals:
        if runs and runs[-1][-1] == at - 1:
            runs[-1].append(at)
        else:
            runs.append([at])
    return runs
