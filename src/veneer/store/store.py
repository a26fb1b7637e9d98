"""The store as the daemon sees it: names become path numbers with published trees, path numbers become readable bytes.

Invariants: S1: a path number is given out only after its tree file was renamed into place, or as that of a directory to
who asked for no more. S2: a listing, or the head of a NAR, only ever gives metadata, which the NAR confirms when it arrives
(``trees``), or else the number is condemned and the path lives on under a new one. S3: nothing is served in a view whose policy refuses the path info.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from veneer.cache.cache import Cache, Evicted
from veneer.cache.index import NarState, PathRow, TreeState
from veneer.cache.nars import VerifiedNar
from veneer.formats.seekable_zstd import Frame
from veneer.model.errors import FormatError, HashMismatchError, NotFoundError, SourceError, VeneerError
from veneer.model.path_info import PathInfo
from veneer.model.store_path import StorePath
from veneer.model.tree import Node
from veneer.sources.transport import CHUNK

from .account import Account, Stories
from .ahead import Ahead
from .closure import PARALLEL_REQUESTS, resolve_closure
from .fetch import Candidates, Download, Fetcher, Ready
from .libraries import Libraries
from .parts import Parts
from .pipe import PIPE_BYTES
from .resolve import AbsentError, Candidate, Resolver
from .trees import PublishedTrees
from .views import View

T = TypeVar("T")

STREAM_BYTES = PIPE_BYTES + 2 * CHUNK
"""Memory of one: what is in its pipe, a chunk that comes and one that is decoded."""
READERS_PLACES = 2
"""Of ``Limits.parallel_downloads``, those that nothing but readers takes."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the store's appetite."""

    parallel_requests: int = PARALLEL_REQUESTS
    parallel_downloads: int = 8
    prefetch: bool = True
    memory: int = 128 << 20
    """Bytes that downloads may hold, encoded and decoded, without the tables of decompressors. Half of it is for whole NARs."""

    @property
    def whole_downloads(self) -> int:
        """NARs streamed at once."""
        return max(1, min(self.parallel_downloads, self.memory // 2 // STREAM_BYTES))


@dataclass(frozen=True, slots=True)
class Notices:
    """Whom to tell. ``dropped(number)``: a NAR file was unlinked. ``condemned(number, path)``: a number is dead."""

    dropped: Callable[[int], None]
    condemned: Callable[[int, StorePath], None]
    present: Callable[[StorePath], None]


class Store:
    """One per daemon; event loop only."""

    def __init__(self, cache: Cache, clock: Callable[[], float], notices: Notices, limits: Limits) -> None:
        self.cache = cache
        self.stories = Stories(clock)
        self._clock = clock
        self._notices = notices
        self._limits = limits
        self.resolver = Resolver(self.stories, cache.index)
        self._trees = PublishedTrees(
            cache,
            clock,
            self.stories,
            self.resolver,
            row=self._row,
            is_whole=self._is_whole,
            condemn=self._condemn,
            dropped=notices.dropped,
        )
        self.fetcher = Fetcher(
            cache,
            self.stories,
            clock,
            self._trees.encode,
            self._admit,
            self._condemn,
            self.make_room,
            self._verified,
            parallel=limits.whole_downloads,
        )
        self.parts = Parts(
            cache,
            self.stories,
            self.resolver,
            cache.index,
            clock=clock,
            encode=self._trees.encode,
            admit=self._admit,
            spoilt=self._spoilt,
            make_room=self.make_room,
            parallel=limits.parallel_downloads,
            in_flight=limits.memory - limits.whole_downloads * STREAM_BYTES,
        )
        self._learning: set[asyncio.Task[None]] = set()
        self._ahead = Ahead(self, self.stories)
        self._libraries = Libraries(self, self.resolver, cache, self.stories)
        self._places = asyncio.Semaphore(max(1, limits.whole_downloads - READERS_PLACES))

    async def close(self) -> None:
        """End everything under way."""
        ahead = [*self._ahead.tasks, *self._libraries.tasks, *self._learning]
        for task in ahead:
            task.cancel()
        await asyncio.gather(*ahead, return_exceptions=True)
        await self._trees.close()
        await self.parts.close()
        await self.fetcher.close()

    async def lookup(
        self, view: View, path: StorePath, account: Account, *, root_only: bool = False
    ) -> PathRow:
        """The path's row, its tree published (S1). AbsentError when every source answered no.

        ``root_only``: that it is a directory is enough; ``is_bare`` tells.
        """
        info = await self.resolver.path_info(view, path, account)
        self._notices.present(path)
        row = await self._published(view, info, account, root_only=root_only)
        account.know(path, info.info.nar_size)
        if self._limits.prefetch:
            self._ahead.looked_up(view, info, account)
        return row

    def is_bare(self, row: PathRow) -> bool:
        """Whether no more is known of the path than that it is a directory."""
        return not self._trees.has(row) and self.cache.index.is_directory(row.number)

    def want_closure(self, view: View, path: StorePath, account: Account) -> None:
        """All that the path refers to is asked for next: ``RememberedSource.want_closure``."""
        self.resolver.want_closure(view, path, account)

    async def named(self, view: View, path: StorePath, account: Account) -> None:
        """The path may be looked up soon: have its metadata, and its tree where a listing tells it."""
        info = await self.resolver.path_info(view, path, account)
        self._notices.present(path)
        account.know(path, info.info.nar_size)
        await self.listed(view, info, account)

    async def tree(self, view: View, number: int, account: Account) -> int:
        """Publish the tree of a known number again (its file was lost)."""
        row = self._row(number)
        info = await self._known(view, row, account)
        again = await self._published(view, info, account)
        if again.number != number:
            raise HashMismatchError(
                f"{row.store_path} was replaced since it was opened", hint="open it again"
            )
        return number

    async def content(self, view: View, number: int, offset: int, size: int, account: Account) -> Ready:
        """Wait until bytes [offset, offset + size) of the NAR may be read from the cache."""
        ready = await self._content(view, number, offset, size, account)
        if self._limits.prefetch:
            self._libraries.was_read(view, ready.number, offset, account, whole=ready.whole)
        return ready

    async def _content(self, view: View, number: int, offset: int, size: int, account: Account) -> Ready:
        row = self._row(number)
        self.cache.index.touch([(number, self._clock())])
        if self._is_whole(row):
            account.ask(row.store_path, row.nar_size)
            return Ready(number, 0, row.nar_size, whole=True)
        if number not in self.fetcher.busy:
            span = await self.parts.content(view, row, offset, size, account)
            if span is not None:
                self._evidence_changed(view, account)
                return Ready(number, span[0], span[1], whole=False, inode=span[2])
            row = self._row(number)
        account.ask(row.store_path, row.nar_size)
        self._evidence_changed(view, account)
        ready = await self._fetched(
            view, row, account, lambda download: self.fetcher.part(download, offset, size, view.deferred)
        )
        if ready is None:
            return Ready(number, 0, row.nar_size, whole=True)
        if ready.number != number:
            raise HashMismatchError(
                f"the listing of {row.store_path} was not that of its NAR", hint="open it again"
            )
        return ready

    def touched(self, view: View, rows: Iterable[tuple[int, int, bool]], account: Account) -> None:
        """A mount server's word on what it has read: (path number, bytes since its last word, root directory listed)."""
        now = self._clock()
        for number, size, listed in rows:
            row = self.cache.index.path(number)
            if row is not None:
                self.cache.index.touch([(number, now)])
                account.read(row.store_path, row.nar_size, size, listed=listed)
        self._evidence_changed(view, account)

    async def whole(self, view: View, path: StorePath, account: Account) -> PathRow:
        """Have the whole NAR of ``path`` in the cache."""
        info = await self.resolver.path_info(view, path, account)
        row = self._row_of(info)
        if self._is_whole(row):
            self.cache.index.touch([(row.number, self._clock())])
            return row
        return await self._with_nar(view, row, account)

    async def ahead(self, view: View, path: StorePath, account: Account) -> bool:
        """``whole`` for somebody who asks for many paths and reads none of them now: leaves places for readers.

        False: it was here.
        """
        async with self._places:
            info = await self.resolver.path_info(view, path, account)
            was_here = self._is_whole(self._row_of(info))
            await self.whole(view, path, account)
            return not was_here

    async def load(
        self, view: View, path: StorePath, ranges: Sequence[tuple[int, int]] | None, account: Account
    ) -> None:
        """Have the bytes [(offset, size)] of the NAR in the cache, or all of it: None, or where there are no parts.

        Work that nobody waits for: readers go first.
        """
        info = await self.resolver.path_info(view, path, account)
        row = self._row_of(info)
        if self._is_whole(row):
            self.cache.index.touch([(row.number, self._clock())])
        elif ranges is None or not await self.parts.load(view, row, ranges, account):
            async with self._places:
                await self.whole(view, path, account)

    def knows_closure(self, view: View, account: Account) -> bool:
        """Whether the session's closures were asked for, and nothing of them is under way."""
        return self._limits.prefetch and self._ahead.is_complete(view, account)

    def expect_parts(self, candidate: Candidate, account: Account) -> None:
        """Parts of this path will be wanted, while its source is told of a trace (``RememberedSource.traced``)."""
        self.parts.expect(self._row_of(candidate.info), candidate, account)

    async def listed(self, view: View, info: PathInfo, account: Account) -> bool:
        """Whether the path's tree is published, after trying listings."""
        return await self._trees.without_nar(view, self._row_of(info), account)

    async def closure(
        self,
        view: View,
        roots: Iterable[StorePath],
        account: Account,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[StorePath, PathInfo]:
        """Path info of the roots' whole closure."""
        found = await resolve_closure(
            self.resolver, view, roots, account, parallel=self._limits.parallel_requests, progress=progress
        )
        for path, info in found.items():
            account.know(path, info.info.nar_size)
        return found

    @property
    def prefetches(self) -> bool:
        """Whether anything may be asked for that nobody has wanted yet."""
        return self._limits.prefetch

    @property
    def busy(self) -> set[int]:
        """Path numbers of which a file is being written: nothing may drop them."""
        return self.fetcher.busy | self.parts.busy

    @property
    def owners(self) -> set[str]:
        """Identities of the views whose sources are read from."""
        return self.fetcher.owners | self.parts.owners | self._libraries.owners | self._trees.owners

    @property
    def moved(self) -> int:
        """Encoded bytes that arrived since the start: whether downloads get on."""
        return self.fetcher.moved + self.parts.moved

    def evict(self, max_bytes: int | None = None, *, dry_run: bool = False) -> list[tuple[StorePath, int]]:
        """Make room; returns what went (or would go) with its bytes. Open readers keep what they have."""
        gone = self.cache.evict(max_bytes=max_bytes, dry_run=dry_run, busy=self.busy)
        if not dry_run:
            self._tell(gone)
        return [(evicted.store_path, evicted.size) for evicted in gone]

    def _row(self, number: int) -> PathRow:
        row = self.cache.index.path(number)
        if row is None:
            raise NotFoundError(f"path number {number:x} is not of this cache", where=str(self.cache.root))
        if row.quarantined:
            raise HashMismatchError(
                f"{row.store_path} is quarantined under this number", hint="open it again"
            )
        return row

    def _is_whole(self, row: PathRow) -> bool:
        """Whether the NAR is here. One that something cut short is fetched again."""
        return row.nar == NarState.WHOLE and self.cache.nars.has(row.number, row.nar_size)

    def _row_of(self, info: PathInfo) -> PathRow:
        unverified = info.info
        row = self.cache.index.path_of(unverified.store_path, unverified.nar_hash)
        if row is None:
            row = self.cache.index.add_path(
                unverified.store_path, unverified.nar_hash, unverified.nar_size, self._clock()
            )
        return row

    def _candidates(self, view: View, path: StorePath, account: Account) -> Candidates:
        return lambda: self.resolver.candidates(view, path, account)

    async def _known(self, view: View, row: PathRow, account: Account) -> PathInfo:
        """The path info of what was opened under ``row``. That nobody has it any more is not its absence.

        The best source may say something else than when it was opened: another build of the path, or then it was away.
        """
        path = row.store_path
        try:
            async with aclosing(self.resolver.candidates(view, path, account)) as candidates:
                async for candidate in candidates:
                    if candidate.info.info.nar_hash == row.nar_hash:
                        return candidate.info
        except AbsentError as error:
            raise SourceError(f"no source of this view has {path} any more", hint="veneer status") from error
        raise HashMismatchError(
            f"{path} has another NAR hash in this view's sources than when it was opened",
            hint="open it again",
        )

    async def _download(self, view: View, row: PathRow, account: Account) -> Download | None:
        """None: another one ended while the sources were asked, and the NAR is here."""
        await self._known(view, row, account)
        row = self._row(row.number)
        if self._is_whole(row):
            return None
        return self.fetcher.start(
            row,
            self._candidates(view, row.store_path, account),
            account,
            owner=view.identity,
            deferred=view.deferred if row.tree != TreeState.NONE else frozenset(),
        )

    async def _fetched(
        self, view: View, row: PathRow, account: Account, wait: Callable[[Download], Awaitable[T]]
    ) -> T | None:
        """What ``wait`` gives for the path's download; None when the NAR is here meanwhile.

        A download that another view's sources failed is begun anew with ours.
        """
        while True:
            download = await self._download(view, self._row(row.number), account)
            if download is None:
                return None
            try:
                return await wait(download)
            except VeneerError:
                if download.owner == view.identity:
                    raise

    async def _published(
        self, view: View, info: PathInfo, account: Account, *, root_only: bool = False
    ) -> PathRow:
        """The row of ``info`` with a published tree: from a listing if there is one, from the NAR otherwise."""
        row = self._row_of(info)
        if await self._trees.without_nar(view, row, account):
            return self._row(row.number)
        nothing_here = row.nar == NarState.NONE and row.number not in self.fetcher.busy
        if root_only and nothing_here and await self._trees.of_head(view, row, account):
            return self._row(row.number)
        return await self._with_nar(view, row, account)

    async def _with_nar(self, view: View, row: PathRow, account: Account) -> PathRow:
        """The path's row once its whole NAR is here."""
        number = None
        if row.number not in self.fetcher.busy:
            number = await self.parts.whole(view, row, account)
            # Its number may have been condemned meanwhile.
            row = self.cache.index.path_of(row.store_path, row.nar_hash) or row
        if number is None:
            number = await self._fetched(view, row, account, self.fetcher.whole)
        return self._row(row.number if number is None else number)

    def _admit(self, row: PathRow, verified: VerifiedNar, node: Node, encoded: bytearray) -> int:
        """Take a verified NAR in; compare its encoded tree with the published one (S2)."""
        if not self.parts.agree(row.number, verified.incoming.fileno):
            self._condemn(
                row, HashMismatchError(f"parts of {row.store_path} were not those of its verified NAR")
            )
        self.parts.forget(row.number)
        known = self.cache.index.path(row.number)
        if known is not None and known.quarantined:  # meanwhile; the path lives on under another number
            row = self.cache.index.add_path(row.store_path, row.nar_hash, row.nar_size, self._clock())
            encoded = self._trees.encode(row, node)
        row = self._trees.admit(self._row(row.number), node, encoded)
        self.cache.nars.admit(row.number, verified)
        self.cache.index.touch([(row.number, self._clock())])
        self.make_room()
        return row.number

    def _condemn(self, row: PathRow, error: VeneerError) -> PathRow:
        """The number is dead for good; the path gets a new one."""
        self.stories.add(str(row.store_path), error)
        self.parts.forget(row.number)
        fresh = self.cache.index.replace_path(row.number, self._clock())
        self._notices.condemned(row.number, row.store_path)
        self.cache.trees.drop(row.number)  # who has it mapped keeps it
        self.cache.nars.drop(row.number)
        return fresh

    def _spoilt(self, row: PathRow, url: str, error: VeneerError) -> None:
        """Readers had bytes of this NAR that nobody vouches for: the number is dead.

        A source of wrong ones is not asked for it for a while; one that failed is believed only once all is checked.
        """
        if isinstance(error, (FormatError, HashMismatchError)):
            self.fetcher.quarantine(row, url, error)
        else:
            self.fetcher.distrust(row, url)
        self._condemn(row, error)

    def _verified(self, number: int, candidate: Candidate, frames: tuple[Frame, ...]) -> None:
        """A NAR came whole out of a file with frames: what was learnt lets it come in parts the next time."""
        row = self.cache.index.path(number)
        if row is not None:
            task = asyncio.create_task(
                self.parts.learn(row, candidate, frames), name=f"digests of {row.store_path}"
            )
            self._learning.add(task)
            task.add_done_callback(self._learnt)

    def _learnt(self, task: asyncio.Task[None]) -> None:
        self._learning.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self.stories.add(task.get_name(), error)

    def make_room(self, need: int = 0) -> bool:
        """Evict to the cache's limit, or for ``need`` bytes on a full disk; whether anything went."""
        gone = self.cache.evict(need=need, busy=self.busy)
        self._tell(gone)
        return bool(gone)

    def _tell(self, gone: list[Evicted]) -> None:
        for evicted in gone:
            if not evicted.tree:
                self.parts.forget(evicted.path_number)
                self._notices.dropped(evicted.path_number)

    def _evidence_changed(self, view: View, account: Account) -> None:
        if self._limits.prefetch:
            self._ahead.wanted(view, account, self.cache.max_bytes)
