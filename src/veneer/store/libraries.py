"""A program that starts needs its loader and libraries: they are loaded beside it, all at once, not as it comes upon one after the other.

Who reads the beginning of an ELF file or a script is about to run it, or to link it. What it is linked with is looked for as its
loader will: in the store paths that it names (RUNPATH), then by name in its own path and in those that it refers to. What
is found is loaded, and looked into in turn, so that a program's whole set comes within a few round trips.

Background work: readers go first (``Store.load``), whoever reads meets his own errors, and what goes wrong here is a story. Bounded: a
program's own files and no others, each once per session; FILES, DEPTH and BYTES per program; half of what the cache may hold per session.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from veneer.cache.cache import Cache
from veneer.cache.index import NarState
from veneer.formats import chunk_map, elf
from veneer.formats.tree_index import Entry, TreeIndex, nar_file, part_file, sparse_file
from veneer.model.errors import FormatError, VeneerError
from veneer.model.path_info import PathInfo
from veneer.model.store_path import StorePath

from . import access
from .account import Account, Stories
from .resolve import AbsentError, Resolver
from .tree_search import find_library, follow
from .views import View

PROGRAMS = 4
"""Looked into at a time."""
WAITING = 64
"""Programs that wait for it. The libraries of more come as they are read."""
LOADS = 16
"""Files of one program that are loaded at a time."""
METADATA = 8
"""Listings that are asked for at a time."""
FILES = 256
DEPTH = 16
BYTES = 64 << 20
"""Of one program's files, or of their NARs where these come whole."""
LISTINGS = 64
"""Of a path's references, that are searched for a name, at most."""
KNOWN = 4096
"""Files of a session that are known to have been looked into."""
BLOCK = 64 << 10
"""Bytes of a file that are read at once to look into it."""
TREES = 16
"""Of one program's, kept open."""
HOPS = 16
"""Links from one store path to another that are followed."""
SCRIPT = 256
"""Bytes in which the kernel looks for a script's interpreter."""


class Doer(Protocol):
    """The store's own ways to have things."""

    async def listed(self, view: View, info: PathInfo, account: Account) -> bool:
        """Whether the path's tree is published."""
        ...

    async def load(
        self, view: View, path: StorePath, ranges: Sequence[tuple[int, int]] | None, account: Account
    ) -> None: ...


class Libraries:
    """One per store; event loop only."""

    def __init__(self, doer: Doer, resolver: Resolver, cache: Cache, stories: Stories) -> None:
        self._doer = doer
        self._resolver = resolver
        self._cache = cache
        self._stories = stories
        self._root = str(cache.root)
        self._programs = asyncio.Semaphore(PROGRAMS)
        self._metadata = asyncio.Semaphore(METADATA)
        self._running: dict[asyncio.Task[None], str] = {}
        """With the identity of the view that it asks."""

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        return list(self._running)

    @property
    def owners(self) -> set[str]:
        """Identities of the views whose sources are asked."""
        return set(self._running.values())

    def was_read(self, view: View, number: int, offset: int, account: Account, *, whole: bool) -> None:
        """A reader has what begins at ``offset`` of this NAR. Where no program begins there, this costs 4 bytes out of memory."""
        if len(self._running) >= WAITING or (number, offset) in account.linked:
            return
        row = None if account.postponed is None else self._cache.index.path(number)
        if row is not None and row.store_path in account.traced:
            return  # what it needs is in the trace as well
        if not self._is_program(number, offset, whole=whole):
            return
        task = asyncio.create_task(
            self._load_linked(view, number, offset, account), name=f"libraries of {number:x}"
        )
        self._running[task] = view.identity
        task.add_done_callback(self._ended)

    def _is_program(self, number: int, offset: int, *, whole: bool) -> bool:
        """Whether these bytes look like a program's first ones. What has left memory was read long ago, and its libraries with it."""
        for file in (nar_file(number),) if whole else (sparse_file(number), part_file(number)):
            try:
                fd = os.open(f"{self._root}/{file}", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            magic = bytearray(4)
            try:
                _peek(fd, magic, offset)
            except OSError:
                return False
            finally:
                os.close(fd)
            return magic == elf.MAGIC or magic[:2] == b"#!"
        return False

    async def _load_linked(self, view: View, number: int, offset: int, account: Account) -> None:
        async with self._programs:
            program = _Program(
                self._doer, self._resolver, self._cache, self._stories, self._metadata, view, account
            )
            await program.load_linked(number, offset)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            failure = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
            if isinstance(failure, Exception):
                self._stories.add(task.get_name(), failure)


# --- one program --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Known:
    """A store path with its published tree."""

    info: PathInfo
    number: int


@dataclass(frozen=True, slots=True)
class _File:
    of: _Known
    entry: Entry
    directory: bytes
    """Where it stands below its store path."""


class _Program:
    """What one program is linked with."""

    def __init__(
        self,
        doer: Doer,
        resolver: Resolver,
        cache: Cache,
        stories: Stories,
        metadata: asyncio.Semaphore,
        view: View,
        account: Account,
    ) -> None:
        self._doer = doer
        self._resolver = resolver
        self._cache = cache
        self._stories = stories
        self._metadata = metadata
        self._view = view
        self._account = account
        self._trees: dict[int, TreeIndex] = {}
        self._loads = asyncio.Semaphore(LOADS)
        self._group = asyncio.TaskGroup()
        self._known: dict[StorePath, asyncio.Task[_Known | None]] = {}
        self._names: set[bytes] = set()
        """Of libraries that were found: a loader takes each once."""
        self._files = 0
        self._bytes = 0
        self._has_failed = False

    async def load_linked(self, number: int, offset: int) -> None:
        row = self._cache.index.path(number)
        if row is None:
            return
        async with self._group:
            of = await self._listed(row.store_path)
            if of is None or of.number != number:
                return
            file = await asyncio.to_thread(self._file_at, of, offset)
            if file is not None and self._remember(file):
                await self._look_into(file, 0)

    # -- what is loaded

    async def _load(self, file: _File, depth: int) -> None:
        """The file, or the beginning of a large one, and what that is linked with."""
        size = _eager(file.entry.size)
        try:
            async with self._loads:
                await self._have(file, 0, size)
        except VeneerError as error:
            self._failed(file.of, error)
        else:
            if depth < DEPTH:
                await self._look_into(file, depth)

    async def _have(self, file: _File, start: int, size: int) -> None:
        span = (file.entry.offset + start, size)
        await self._doer.load(self._view, file.of.info.store_path, [span], self._account)

    def _begin(self, file: _File, depth: int) -> None:
        """Load it if nobody did, and if there is room for it."""
        row = self._cache.index.path(file.of.number)
        if row is None or self._files >= FILES:
            return
        cost = _eager(file.entry.size)
        if row.nar == NarState.WHOLE:
            cost = 0
        elif not chunk_map.is_announced(file.of.info.info):
            cost = row.nar_size
        limit = self._cache.max_bytes
        if self._bytes + cost > BYTES or (
            limit is not None and self._account.linked_bytes + cost > limit // 2
        ):
            return
        if self._remember(file):
            self._files += 1
            self._bytes += cost
            self._account.linked_bytes += cost
            self._group.create_task(self._load(file, depth))

    def _remember(self, file: _File) -> bool:
        """Whether it is new to the session."""
        linked = self._account.linked
        key = (file.of.number, file.entry.offset)
        if key in linked:
            return False
        if len(linked) >= KNOWN:
            linked.clear()
        linked[key] = None
        return True

    def _failed(self, of: _Known, error: VeneerError) -> None:
        """One story for each program."""
        if not self._has_failed and not isinstance(error, AbsentError):
            self._has_failed = True
            self._stories.add(f"libraries in {of.info.store_path}", error)

    # -- what a file is linked with

    async def _look_into(self, file: _File, depth: int) -> None:
        try:
            await self._follow(file, depth)
        except FormatError:
            return  # of no use to its loader either
        except VeneerError as error:
            if depth:  # else it is the program's own, and its reader's
                self._failed(file.of, error)

    async def _follow(self, file: _File, depth: int) -> None:
        blocks: dict[int, bytes] = {}
        head = await self._bytes_of(file, blocks, 0, min(SCRIPT, file.entry.size))
        if head.startswith(b"#!"):
            words = head[2:].partition(b"\n")[0].split()
            if words and (found := await self._at(file.of, words[0])):
                self._begin(found, depth + 1)
            return
        linked = await self._linked(file, blocks)
        if linked is None:
            return
        blocks.clear()
        if linked.interpreter and (found := await self._at(file.of, linked.interpreter)):
            self._begin(found, depth + 1)
        await self._begin_libraries(file, linked, depth + 1)

    async def _linked(self, file: _File, blocks: dict[int, bytes]) -> elf.Linked | None:
        asking = elf.questions(file.entry.size)
        try:
            wanted = next(asking)
            while True:
                wanted = asking.send(await self._bytes_of(file, blocks, *wanted))
        except StopIteration as end:
            linked: elf.Linked | None = end.value
            return linked

    async def _bytes_of(self, file: _File, blocks: dict[int, bytes], start: int, size: int) -> bytes:
        """A part of the file, loaded block by block where it is not here. ``blocks``: those that were read."""
        first, last = start // BLOCK, (start + size - 1) // BLOCK
        for at in range(first, last + 1):
            if at not in blocks:
                length = min(BLOCK, file.entry.size - at * BLOCK)
                await self._have(file, at * BLOCK, length)
                blocks[at] = await asyncio.to_thread(
                    self._pread, file.of.number, file.entry.offset + at * BLOCK, length
                )
        data = b"".join(blocks[at] for at in range(first, last + 1))
        return data[start - first * BLOCK :][:size]

    def _pread(self, number: int, offset: int, size: int) -> bytes:
        """Of a NAR, whole or sparse; b"" when it was dropped. On a worker thread."""
        for file in self._cache.nars.files(number):
            try:
                fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                return os.pread(fd, size, offset)
            except OSError:
                return b""
            finally:
                os.close(fd)
        return b""

    # -- where its libraries are

    async def _begin_libraries(self, file: _File, linked: elf.Linked, depth: int) -> None:
        """As glibc's loader looks for them, except that nothing is known of the environment here."""
        own = file.of.info.store_path
        for name in linked.needed:
            if b"/" in name and (found := await self._at(file.of, name)):
                self._begin(found, depth)
        names = {name for name in linked.needed if name and b"/" not in name} - self._names
        if not names:
            return
        directories = [_expanded(directory, file, self._view.store_dir) for directory in linked.search]
        places = [place for d in directories if (place := self._place(file.of, d)) is not None]
        await asyncio.gather(*map(self._listed, {path for path, _ in places}))
        for path, directory in places:
            await self._begin_named(path, names, directory, depth)
        if names:
            references = [r for r in file.of.info.info.references if r != own][:LISTINGS]
            await asyncio.gather(*map(self._listed, references))
            for path in (own, *references):
                await self._begin_named(path, names, None, depth)

    async def _begin_named(
        self, path: StorePath, names: set[bytes], directory: bytes | None, depth: int
    ) -> None:
        """Begin those of ``names`` that are in a directory of ``path``, or anywhere in it, and take them out of ``names``."""
        of = await self._listed(path) if names else None
        if of is None:
            return
        found = await asyncio.to_thread(self._search, of, sorted(names), directory)
        for name, where in found.items():
            file = await self._at(of, where) if isinstance(where, bytes) else where
            if file is not None:
                names.discard(name)
                self._names.add(name)
                self._begin(file, depth)

    async def _at(self, of: _Known, absolute: bytes) -> _File | None:
        """The file at an absolute path that something in ``of`` names, links followed; None when it leads elsewhere."""
        for _ in range(HOPS):
            place = self._place(of, absolute)
            if place is None or (there := await self._listed(place[0])) is None:
                return None
            of = there
            where = (await asyncio.to_thread(self._search, of, [place[1]], b"")).get(place[1])
            if not isinstance(where, bytes):
                return where
            absolute = where
        return None

    def _place(self, of: _Known, absolute: bytes) -> tuple[StorePath, bytes] | None:
        """(store path, what is below it) of a path that something in ``of`` names, as far as ``of`` refers to it."""
        store = self._view.store_dir.rstrip("/").encode() + b"/"
        if not absolute.startswith(store):
            return None
        basename, _, below = absolute[len(store) :].lstrip(b"/").partition(b"/")
        try:
            path = StorePath.parse(basename.decode("ascii"))
        except (FormatError, UnicodeDecodeError):
            return None
        if path != of.info.store_path and path not in of.info.info.references:
            return None
        return path, below

    # -- trees

    async def _listed(self, path: StorePath) -> _Known | None:
        """The path, when its tree is published or a listing tells it: no NAR is fetched for that."""
        task = self._known.get(path)
        if task is None:
            task = self._known[path] = self._group.create_task(self._publish(path))
        return await task

    async def _publish(self, path: StorePath) -> _Known | None:
        try:
            async with self._metadata:
                info = await self._resolver.path_info(self._view, path, self._account)
                if not await self._doer.listed(self._view, info, self._account):
                    return None
        except VeneerError:
            return None  # whoever looks it up is told
        row = self._cache.index.path_of(path, info.info.nar_hash)
        return None if row is None else _Known(info, row.number)

    def _search(self, of: _Known, names: list[bytes], directory: bytes | None) -> dict[bytes, _File | bytes]:
        """Name -> file, or the absolute path that it is a link to; without those that are not there. On a worker thread."""
        files: dict[bytes, _File | bytes] = {}
        try:
            tree = self._tree(of.number)
            for name in names:
                found = (
                    find_library(tree, name) if directory is None else follow(tree, directory + b"/" + name)
                )
                if found is not None:
                    files[name] = found if isinstance(found, bytes) else _file(of, tree, found)
        except FormatError:
            return {}
        return files

    def _tree(self, number: int) -> TreeIndex:
        """On a worker thread. FormatError."""
        tree = self._trees.get(number)
        if tree is None:
            if len(self._trees) >= TREES:
                self._trees.clear()
            tree = self._trees[number] = self._cache.trees.open(number)
        return tree

    def _file_at(self, of: _Known, offset: int) -> _File | None:
        """On a worker thread."""
        try:
            tree = self._tree(of.number)
            entry = tree.file_at(offset)
            return None if entry is None else _file(of, tree, entry)
        except FormatError:
            return None


def _peek(fd: int, into: bytearray, offset: int) -> None:
    """Read what is in memory. OSError, EAGAIN when it is not."""
    try:
        os.preadv(fd, [into], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        os.preadv(fd, [into], offset)  # this file system cannot tell


def _file(of: _Known, tree: TreeIndex, entry: Entry) -> _File:
    return _File(of, entry, tree.path(entry.number).rpartition(b"/")[0])


def _eager(size: int) -> int:
    """Bytes of a library that are loaded before anybody reads it: all, or of a large one the beginning, with its tables."""
    return size if size <= access.FILE else access.FIRST_WINDOW


def _expanded(directory: bytes, file: _File, store_dir: str) -> bytes:
    """A directory of a search path with the directory of the file in place of "$ORIGIN"."""
    if b"$" not in directory:
        return directory
    origin = file.of.info.store_path.absolute(store_dir).encode() + b"/" + file.directory
    return directory.replace(b"${ORIGIN}", origin).replace(b"$ORIGIN", origin)
