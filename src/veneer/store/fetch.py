"""Each NAR is moved once, however many readers wait for it.

A *download* belongs to a path number. Readers wait on it for the whole NAR (``strict``) or for a prefix (``deferred``); a
reader that goes away leaves it running for the others and for the cache. Candidates are tried in order: bad content is
quarantined per source, a source's failure goes to the next one, and only when none is left the readers get the story.

Invariants: F1: at most one download per path number. F2: bytes are announced only after they were written to the file
that the reader will open. F3: under ``strict`` nothing is announced before ``verify.receive_nar`` accepted the whole NAR;
whether a source is ``strict`` is the word of the view that began the download and of the view that reads. F4: a number of which readers
saw bytes that in the end nobody vouched for (``deferred``) does not live on: it is condemned, and opening again starts anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass

from veneer.cache.cache import Cache
from veneer.cache.index import PathRow
from veneer.cache.nars import VerifiedNar
from veneer.formats.chunk_map import is_announced
from veneer.formats.seekable_zstd import Frame
from veneer.model.errors import (
    CacheFullError,
    FormatError,
    HashMismatchError,
    SourceError,
    VeneerError,
)
from veneer.model.store_path import StorePath
from veneer.model.tree import Node
from veneer.sources.frames import TailKeeper

from . import access
from .account import Account, Stories
from .pipe import ChunkPipe
from .resolve import Candidate, doubt
from .verify import CutError, receive_nar

QUARANTINE_SECONDS = 3600.0
INDEX_ROOM = 1 << 20
"""Bytes that a full disk must have besides the NAR: its tree, and its rows."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Bytes [start, end) of a path's NAR may be read: from the final file (``whole``), or the one with ``inode``."""

    number: int
    start: int
    end: int
    whole: bool
    inode: int = 0


class Download:
    """One NAR under way, begun by the view ``owner``.

    ``prefix``: bytes of the growing file (``inode``) that readers may have who defer the verification of ``source``.
    ``deferred``: the URLs of the sources for which the owner does.
    """

    def __init__(self, row: PathRow, owner: str, deferred: frozenset[str]) -> None:
        self.row = row
        self.owner = owner
        self.deferred = deferred
        self.source = ""
        self.prefix = 0
        self.inode = 0
        self.task: asyncio.Task[int] | None = None
        self.grew = asyncio.Event()

    def announce(self, size: int) -> None:
        """The growing file holds ``size`` bytes. Event loop only."""
        self.prefix = size
        self.grew.set()
        self.grew = asyncio.Event()


Candidates = Callable[[], AsyncGenerator[Candidate, None]]
"""Asks the sources that have a path, best first; see ``resolve.Resolver.candidates``."""
Encode = Callable[[PathRow, Node], bytearray]
"""The tree index of a path; called on a worker thread."""
Admit = Callable[[PathRow, VerifiedNar, Node, bytearray], int]
"""Takes a verified NAR, its tree and the encoded tree into the cache; the path number it now has."""
Learn = Callable[[int, Candidate, tuple[Frame, ...]], object]
"""Told of a NAR that was admitted under a number, and of the frames of the file that it came from."""


class Fetcher:
    """Downloads of one daemon. Event loop only, except where said."""

    def __init__(
        self,
        cache: Cache,
        stories: Stories,
        clock: Callable[[], float],
        encode: Encode,
        admit: Admit,
        condemn: Callable[[PathRow, VeneerError], object],
        make_room: Callable[[int], bool],
        learn: Learn,
        *,
        parallel: int,
    ) -> None:
        self._cache = cache
        self._condemn = condemn
        self._make_room = make_room
        self._learn = learn
        self._stories = stories
        self._clock = clock
        self._encode = encode
        self._admit = admit
        self._downloads: dict[int, Download] = {}
        self._broke: set[tuple[StorePath, str]] = set()
        """Path and source URL of deferred downloads that failed after readers had bytes: the next one from there is strict, so
        that another source can take over (F4)."""
        self.moved = 0
        """Encoded bytes that arrived since the start: whether downloads get on."""
        self._slots = asyncio.Semaphore(parallel)
        self._threads = ThreadPoolExecutor(parallel, thread_name_prefix="nar")

    @property
    def busy(self) -> set[int]:
        """Path numbers being written; eviction leaves them alone."""
        return set(self._downloads)

    @property
    def rows(self) -> list[PathRow]:
        """What is being downloaded."""
        return [download.row for download in self._downloads.values()]

    @property
    def owners(self) -> set[str]:
        """Identities of the views whose sources are read from."""
        return {download.owner for download in self._downloads.values()}

    async def close(self) -> None:
        """Cancel everything and wait for the threads."""
        tasks = [d.task for d in self._downloads.values() if d.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown)

    def start(
        self,
        row: PathRow,
        candidates: Candidates,
        account: Account,
        *,
        owner: str,
        deferred: frozenset[str],
    ) -> Download:
        """The path's download, begun if there is none (F1)."""
        download = self._downloads.get(row.number)
        if download is None:
            download = Download(row, owner, deferred)
            self._downloads[row.number] = download
            download.task = asyncio.create_task(
                self._run(download, candidates, account), name=f"fetch {row.store_path}"
            )
            download.task.add_done_callback(lambda task: self._done(download, task))
        return download

    async def whole(self, download: Download) -> int:
        """Wait for the end; the path number under which the verified NAR lies. Cancelling leaves it running."""
        assert download.task is not None
        return await asyncio.shield(download.task)

    async def part(self, download: Download, offset: int, size: int, deferred: frozenset[str]) -> Ready:
        """Wait until [offset, offset + size) may be read by somebody who reads ``deferred`` sources before they are verified."""
        task = download.task
        assert task is not None
        end = min(offset + size, download.row.nar_size)
        while deferred & download.deferred and not task.done():
            if download.prefix >= end and download.source in deferred:
                return Ready(download.row.number, 0, download.prefix, whole=False, inode=download.inode)
            grew = asyncio.create_task(download.grew.wait())
            try:
                await asyncio.wait({grew, task}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                grew.cancel()
        number = await asyncio.shield(task)
        return Ready(number, 0, download.row.nar_size, whole=True)

    async def _run(self, download: Download, candidates: Candidates, account: Account) -> int:
        row = download.row
        failures: list[VeneerError] = []
        async with self._slots, aclosing(candidates()) as offers:
            async for candidate in offers:
                if candidate.info.info.nar_hash != row.nar_hash:
                    continue
                url = candidate.source.url
                reason = self._cache.index.quarantined(row.store_path, row.nar_hash, url, self._clock())
                if reason is not None:
                    failures.append(HashMismatchError(f"quarantined: {reason}", where=url))
                    continue
                try:
                    return await self._from(download, candidate, account)
                except (FormatError, HashMismatchError) as error:
                    self.quarantine(row, url, error)
                    doubt(candidate.source, row.store_path)
                    failures.append(error)
                except SourceError as error:
                    doubt(candidate.source, row.store_path)
                    failures.append(error)
                except VeneerError as error:
                    if download.prefix:  # F4
                        self._condemn(row, error)
                    raise
                self._stories.add(str(row.store_path), failures[-1])
                if download.prefix:  # F4
                    self.distrust(row, url)
                    self._condemn(row, failures[-1])
                    break
        raise _story(row.store_path, failures)

    async def _from(self, download: Download, candidate: Candidate, account: Account) -> int:
        """One attempt, with one more after making room when the disk is full, or when the body was cut.

        (Where the body's length is known the source itself has tried again.)
        """
        try:
            return await self._attempt(download, candidate, account)
        except CutError:
            if download.prefix:
                raise
        except CacheFullError:
            if download.prefix or not self._make_room(download.row.nar_size + INDEX_ROOM):
                raise  # F4: what was shown of the first attempt would not be verified by the second
        return await self._attempt(download, candidate, account)

    async def _attempt(self, download: Download, candidate: Candidate, account: Account) -> int:
        row, loop = download.row, asyncio.get_running_loop()
        nars = self._cache.nars
        broke = (row.store_path, candidate.source.url)
        deferred = candidate.source.url in download.deferred and broke not in self._broke
        make = nars.partial if deferred else nars.incoming
        incoming = make(row.number, row.nar_size)
        download.source = candidate.source.url
        download.inode = incoming.inode
        pipe = ChunkPipe()

        def progress(size: int) -> None:  # worker thread
            if deferred:
                loop.call_soon_threadsafe(download.announce, size)

        tail = TailKeeper(pipe, candidate.info.info.compression)

        def receive() -> tuple[VerifiedNar, Node, bytearray]:  # worker thread
            try:
                verified, tree = receive_nar(
                    candidate.info, tail, incoming, progress, where=candidate.source.url
                )
                return verified, tree, self._encode(row, tree)
            finally:
                pipe.abandon()

        receiving = loop.run_in_executor(self._threads, receive)
        try:
            meter = account.meter(row.store_path)
            count = account.paths[row.store_path]
            try:
                async with aclosing(candidate.source.nar(candidate.info.info, meter)) as chunks:
                    async for chunk in chunks:
                        self.moved += len(chunk)
                        if not await pipe.put(chunk):
                            break
                pipe.end()
            except BaseException as error:
                pipe.fail(error)
                if not isinstance(error, Exception):
                    raise
            verified, tree, encoded = await asyncio.shield(receiving)  # its thread cannot be cancelled
        except (FormatError, HashMismatchError):
            nars.set_aside(incoming)
            raise
        except BaseException:
            await self._settle(receiving)
            incoming.discard()
            raise
        count.nar += verified.nar_size
        self._broke.discard(broke)
        try:
            number = self._admit(row, verified, tree, encoded)
        finally:
            incoming.discard()  # what was not admitted
        if tail.length > access.SMALL and not is_announced(candidate.info.info):
            with suppress(FormatError):  # it can be fetched whole only, as it was
                info = candidate.info.info
                if (frames := tail.frames(info.compression, info.nar_size)) is not None:
                    self._learn(number, candidate, frames)
        return number

    async def _settle(self, receiving: asyncio.Future[tuple[VerifiedNar, Node, bytearray]]) -> None:
        """The thread has let go of the file; its error was raised by whoever awaited it first."""
        await asyncio.wait({receiving})
        if not receiving.cancelled():
            receiving.exception()

    def distrust(self, row: PathRow, url: str) -> None:
        """Of this content, nothing from the source is shown any more before all of it was verified (F4)."""
        self._broke.add((row.store_path, url))

    def quarantine(self, row: PathRow, url: str, error: VeneerError) -> None:
        """Bar a source from serving this content for QUARANTINE_SECONDS."""
        now = self._clock()
        self._cache.index.quarantine(row.number, error.story(), url, now + QUARANTINE_SECONDS, now)

    def _done(self, download: Download, task: asyncio.Task[int]) -> None:
        del self._downloads[download.row.number]
        if not task.cancelled() and (error := task.exception()) is not None and isinstance(error, Exception):
            self._stories.add(str(download.row.store_path), error)


def _story(path: StorePath, failures: list[VeneerError]) -> VeneerError:
    """One error that tells what each source did."""
    if not failures:
        return SourceError(f"no source has the content of {path} any more", hint="veneer status")
    if len(failures) == 1:
        return failures[0]
    told = "; ".join(failure.story() for failure in failures)
    return type(failures[0])(f"no source gave the content of {path}: {told}", hint="veneer status")
