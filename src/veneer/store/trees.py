"""Publishes trees: from a listing while only metadata is wanted, from the NAR once that is here.

S2 is kept here: a listing only ever gives metadata; the tree made from the verified NAR must be byte for byte the
published one, otherwise the number is condemned and no listing of the path is believed any more. It is the same with the
head of a NAR, which tells what the root is where nobody has a listing: the whole tree of a file or a link, of a
directory no more than that it is one.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import aclosing
from itertools import chain
from typing import IO

from veneer.cache.cache import Cache
from veneer.cache.directory import cache_error
from veneer.cache.index import PathRow, TreeState
from veneer.formats.listing import parse_listing
from veneer.formats.nar import tree_of_nar
from veneer.formats.tree_index import Kind, encode_tree, root_kind
from veneer.model.errors import FormatError, HashMismatchError, SourceError, VeneerError
from veneer.model.tree import Directory, Node

from .account import Account, Stories
from .big_listings import BIG, BigListings
from .heads import root_of_head
from .resolve import Candidate, Resolver
from .verify import PIECE
from .views import View

HEADS = 16
"""Of NARs, asked for at once."""
LISTINGS = "listing"
"""In place of a source's URL in the quarantine: no listing of this path is believed, whoever has it."""
LISTINGS_SECONDS = 10 * 365 * 86400.0


class PublishedTrees:
    """One per store; event loop only, except ``encode``.

    ``row``: the row of a living path number, read anew. ``is_whole``: whether its NAR is here. ``condemn``: ends a number
    and gives the path's new row. ``dropped``: told of a number whose NAR file was unlinked.
    """

    def __init__(
        self,
        cache: Cache,
        clock: Callable[[], float],
        stories: Stories,
        resolver: Resolver,
        *,
        row: Callable[[int], PathRow],
        is_whole: Callable[[PathRow], bool],
        condemn: Callable[[PathRow, VeneerError], PathRow],
        dropped: Callable[[int], None],
    ) -> None:
        self._cache = cache
        self._clock = clock
        self._stories = stories
        self._resolver = resolver
        self._row = row
        self._is_whole = is_whole
        self._condemn = condemn
        self._dropped = dropped
        self._big = BigListings(cache.generation)
        self._open: dict[tuple[int, str], asyncio.Task[bool]] = {}
        """By path number and what is tried."""
        self._owners: dict[tuple[int, str], str] = {}
        """Identities of the views whose sources those ask."""
        self._heads = asyncio.Semaphore(HEADS)

    @property
    def owners(self) -> set[str]:
        """Identities of the views whose sources are asked."""
        return set(self._owners.values())

    async def close(self) -> None:
        """End everything under way."""
        tasks = list(self._open.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def without_nar(self, view: View, row: PathRow, account: Account) -> bool:
        """Whether the path's tree is published, after trying listings; concurrent callers share the work."""
        return self.has(row) or await self._shared(row, "listing", self._publish, view, account)

    async def of_head(self, view: View, row: PathRow, account: Account) -> bool:
        """Whether it is known what the path's root is, after asking for its NAR's head: a published tree, or a directory."""
        if self.has(row) or self._cache.index.is_directory(row.number):
            return True
        return await self._shared(row, "head", self._publish_of_head, view, account)

    def admit(self, row: PathRow, node: Node, encoded: bytearray) -> PathRow:
        """Publish the tree of a NAR that was verified just now, and compare it with the published one (S2).

        The row that the path has now: another one when they differ.
        """
        trees, index = self._cache.trees, self._cache.index
        if self.has(row):
            agrees = trees.path(row.number).read_bytes() == encoded
            if agrees:
                index.set_tree(row.number, TreeState.CHECKED)
        else:
            agrees = isinstance(node, Directory) or not index.is_directory(row.number)
            if agrees:
                trees.publish(row.number, [encoded], TreeState.CHECKED)
        if not agrees:
            error = HashMismatchError(
                f"the listing of {row.store_path}, or a NAR's head in its place, differs from its verified NAR"
            )
            now = self._clock()
            index.quarantine(row.number, error.story(), LISTINGS, now + LISTINGS_SECONDS, now)
            row = self._condemn(row, error)
            trees.publish(row.number, [self.encode(row, node)], TreeState.CHECKED)
        return row

    def encode(self, row: PathRow, node: Node) -> bytearray:
        """The tree's file. Any thread."""
        return encode_tree(
            node,
            path_number=row.number,
            generation=self._cache.generation,
            nar_hash=row.nar_hash.digest,
            nar_size=row.nar_size,
        )

    def has(self, row: PathRow) -> bool:
        """Whether the path's tree is published."""
        return row.tree != TreeState.NONE and self._cache.trees.has(row.number)

    # -- details

    async def _shared(
        self,
        row: PathRow,
        what: str,
        work: Callable[[View, PathRow, Account], Coroutine[None, None, bool]],
        view: View,
        account: Account,
    ) -> bool:
        key = (row.number, what)
        task = self._open.get(key)
        if task is None:
            task = asyncio.create_task(work(view, row, account), name=f"tree {row.store_path} of {what}")
            self._open[key] = task
            self._owners[key] = view.identity
            task.add_done_callback(lambda done: self._closed(key, done))
        return await asyncio.shield(task)

    async def _publish(self, view: View, row: PathRow, account: Account) -> bool:
        """Where the NAR is here, nothing else says what its tree is (S2)."""
        if self._is_whole(row) and await self._publish_of_nar(row):
            return True
        hash_part = row.store_path.hash_part
        async with aclosing(self._believed(view, row, account)) as candidates:
            async for candidate in candidates:
                source = candidate.source
                if self._cache.index.listing_absent(source.url, hash_part) is not None:
                    continue
                try:
                    data = await source.listing(hash_part, account.meter(row.store_path))
                    if data is None:
                        self._cache.index.put_listing_absent(source.url, hash_part, self._clock())
                        continue
                    await self._publish_of_listing(row, data)
                    return True
                except SourceError as error:
                    self._stories.add(str(row.store_path), error)
                except FormatError as error:
                    self._stories.add(str(row.store_path), _of_source(source.url, error))
        return False

    async def _publish_of_head(self, view: View, row: PathRow, account: Account) -> bool:
        async with aclosing(self._believed(view, row, account)) as candidates:
            async for candidate in candidates:
                source = candidate.source
                try:
                    async with self._heads:
                        root = await root_of_head(source, candidate.info.info, account.meter(row.store_path))
                    if isinstance(root, Directory):
                        if not self.has(self._row(row.number)):  # else the NAR was faster
                            self._cache.index.put_directory(row.number)
                    elif root is not None:
                        self._publish_listed(row, [self.encode(row, root)])
                except SourceError as error:
                    self._stories.add(str(row.store_path), error)
                except FormatError as error:
                    self._stories.add(str(row.store_path), _of_source(source.url, error))
                else:
                    return root is not None
        return False

    async def _publish_of_nar(self, row: PathRow) -> bool:
        """From the NAR that is here; False when it is not any more, or cannot be read."""
        try:
            encoded = await asyncio.to_thread(self._encoded_of_nar, row)
        except FileNotFoundError:
            return False  # evicted meanwhile
        except FormatError as error:
            self._stories.add(str(row.store_path), error)
            self._cache.nars.drop(row.number)
            self._dropped(row.number)
            return False
        self._cache.trees.publish(self._row(row.number).number, [encoded], TreeState.CHECKED)
        return True

    def _encoded_of_nar(self, row: PathRow) -> bytearray:
        """The tree of a NAR that was verified when it was admitted. FormatError, OSError. On a worker thread."""
        with open(self._cache.nars.path(row.number), "rb", buffering=0) as file:
            return self.encode(row, tree_of_nar(iter(lambda: file.read(PIECE), b"")))

    async def _publish_of_listing(self, row: PathRow, data: bytes) -> None:
        """FormatError: the listing is of no use."""
        if len(data) > BIG:
            with self._temporary() as file:
                await self._big.encode(row, data, file)
                file.seek(0)
                self._publish_listed(row, iter(lambda: file.read(PIECE), b""))
        else:
            node = await asyncio.to_thread(parse_listing, data, nar_size=row.nar_size)
            self._publish_listed(row, [await asyncio.to_thread(self.encode, row, node)])

    def _temporary(self) -> IO[bytes]:
        place = self._cache.root / "incoming"
        try:
            return tempfile.TemporaryFile(dir=place)
        except OSError as error:
            raise cache_error(error, place, "write to") from error

    def _publish_listed(self, row: PathRow, encoded: Iterable[bytes | bytearray]) -> None:
        """FormatError: its root is not what was shown."""
        if self.has(self._row(row.number)):
            return  # the NAR was faster
        pieces = iter(encoded)
        first = next(pieces, b"")
        if root_kind(first) is not Kind.DIRECTORY and self._cache.index.is_directory(row.number):
            raise FormatError("its root is not a directory, as was told before")
        self._cache.trees.publish(row.number, chain([first], pieces), TreeState.LISTED)

    async def _believed(self, view: View, row: PathRow, account: Account) -> AsyncGenerator[Candidate, None]:
        """Who may be asked for what the path looks like: nobody after somebody lied about it."""
        reason = self._cache.index.quarantined(row.store_path, row.nar_hash, LISTINGS, self._clock())
        if reason is not None:
            return
        async with aclosing(self._resolver.candidates(view, row.store_path, account)) as candidates:
            async for candidate in candidates:
                if candidate.info.info.nar_hash == row.nar_hash:
                    yield candidate

    def _closed(self, key: tuple[int, str], task: asyncio.Task[bool]) -> None:
        del self._open[key], self._owners[key]
        if not task.cancelled() and (error := task.exception()) is not None and isinstance(error, Exception):
            self._stories.add(f"tree {key[0]:x}", error)


def _of_source(url: str, error: FormatError) -> FormatError:
    """The same, with the source that it concerns."""
    if url in error.where:
        return error
    what = f"{error.where}: {error.what}" if error.where else error.what
    return FormatError(what, where=url, hint=error.hint)
