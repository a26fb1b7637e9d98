"""A directory with a Nix store and Nix's database as a source: this machine's, or another's on a network mount.

Nothing is copied here; whoever reads takes NARs, which are packed while they are read, and keeps them in the cache. The files may
be anything by now: what counts is that the NAR has the hash that the database has, which ``store.verify`` checks as for
every source. What is not like a binary cache:

- a path may go (garbage collection) and come back with another content: so nobody may remember its answers;
- a NAR cannot be read in parts: where a byte lies would have to be computed by a walk over the whole path;
- of the host's own store, what we say is there is held against its garbage collector as long as this source is open;
- it has Nix's priority for local stores (0) unless its URL says otherwise, so it goes before binary caches.
"""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path
from typing import TypeVar

from veneer.formats.cache_info import CacheInfo
from veneer.formats.listing import write_listing
from veneer.formats.nar import nar_size
from veneer.model.errors import FormatError, SourceError, SourceMissingError, UsageError
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath, is_hash_part

from .base import Meter, RangesUnsupportedError, unmetered
from .file_tree import nar_below, tree_below
from .mounts import OWN, file_system_of, open_directory
from .nix_database import NixDatabase
from .options import SourceConfig, SourceOptions
from .temporary_roots import TemporaryRoots
from .workers import Workers

T = TypeVar("T")
Tell = Callable[[str, Exception], object]
"""Takes what a failure is about, and the failure."""
DEFAULT_PRIORITY = 0
CHUNK = 1 << 20
THREADS = 8
"""More only wait for each other: the work is the interpreter's, not the network's."""


def unheard(_about: str, _failure: Exception) -> None:
    """For callers who keep no stories."""


class StoreDirectory:
    """Implements ``sources.base.Source``."""

    def __init__(
        self, config: SourceConfig, options: SourceOptions | None = None, *, tell: Tell = unheard
    ) -> None:
        """UsageError: it is not of our store directory. Touches no file yet.

        ``tell`` is told once, on a worker thread, when paths cannot be held.
        """
        self._tell = tell
        self._config = config
        self._options = options = options or SourceOptions()
        if config.store_dir not in ("", options.store_dir):
            raise UsageError(
                f"a store of the store directory {config.store_dir}; ours is {options.store_dir}",
                where=config.url,
                hint="paths cannot be moved to another store directory; use a store of the same one",
            )
        self._directory = Path(config.address)
        self._database = NixDatabase(Path(config.state_dir), options.store_dir)
        self._workers = Workers(min(options.in_flight, THREADS), "store directory")
        in_place = config.address == options.store_dir
        self._roots = TemporaryRoots(Path(config.state_dir)) if in_place else None

    @property
    def url(self) -> str:
        return self._config.url

    @property
    def priority(self) -> int:
        return DEFAULT_PRIORITY if self._config.priority is None else self._config.priority

    async def nix_cache_info(self) -> CacheInfo:
        """Nix's values for a local store. SourceError when it cannot be used."""
        await self._run(self._check)
        return CacheInfo(self._options.store_dir, want_mass_query=True, priority=DEFAULT_PRIORITY)

    async def path_info(self, hash_part: str, meter: Meter = unmetered) -> UnverifiedPathInfo | None:
        """None also when the path is valid there, but its files are gone."""
        return await self._run(self._path_info, _checked(hash_part))

    async def listing(self, hash_part: str, meter: Meter = unmetered) -> bytes | None:
        """Made by a walk; None also when a name in it is not UTF-8, as Nix cannot write such a listing."""
        return await self._run(self._listing, _checked(hash_part))

    async def nar(self, info: UnverifiedPathInfo, meter: Meter = unmetered) -> AsyncGenerator[bytes, None]:
        packing = _Packing(self._pieces(info))
        try:
            while chunk := await self._run(packing.chunk):
                meter(len(chunk))
                yield chunk
        finally:
            packing.close()

    async def part(self, info: UnverifiedPathInfo, offset: int, size: int, meter: Meter = unmetered) -> bytes:
        raise RangesUnsupportedError

    async def sidecar(
        self, hash_part: str, suffix: str, limit: int, meter: Meter = unmetered
    ) -> bytes | None:
        return None

    async def close(self) -> None:
        self._workers.close()
        if self._roots is not None:
            self._roots.close()

    async def _run(self, function: Callable[..., T], *args: object) -> T:
        """On a thread; a file system that does not answer keeps the thread, but not whoever asked."""
        try:
            async with asyncio.timeout(self._options.stall_seconds):
                return await self._workers.run(function, *args)
        except TimeoutError:
            raise SourceError(
                f"no answer for {self._options.stall_seconds:g} s",
                where=str(self._directory),
                hint="is the machine that it is mounted from reachable?",
            ) from None

    def _check(self) -> None:
        os.close(self._opened())
        self._database.check()

    def _path_info(self, hash_part: str) -> UnverifiedPathInfo | None:
        directory = self._opened()
        try:
            info = self._database.path_info(hash_part)
            if info is None:
                return None
            self._hold(info.store_path)
            os.stat(info.store_path.basename, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failure(hash_part, error) from error
        finally:
            os.close(directory)
        return info

    def _hold(self, path: StorePath) -> None:
        """Keep the host's own garbage collector from a path of which we say that it is there.

        Where neither the state directory nor a nix-daemon can be used, the path is used all the same: it is there.
        """
        if self._roots is None:
            return
        try:
            self._roots.hold(path.absolute(self._options.store_dir))
        except SourceError as error:
            tell, self._tell = self._tell, unheard
            tell(str(path), error)

    def _listing(self, hash_part: str) -> bytes | None:
        info = self._path_info(hash_part)
        if info is None:
            return None
        directory = self._opened()
        try:
            tree = tree_below(directory, os.fsencode(info.store_path.basename))
        except FormatError as error:
            raise self._placed(info.store_path, error) from error
        except OSError as error:
            raise self._failure(info.store_path.basename, error) from error
        finally:
            os.close(directory)
        try:
            return write_listing(tree)
        except FormatError:
            return None

    def _pieces(self, info: UnverifiedPathInfo) -> Generator[bytes, None, None]:
        name = os.fsencode(info.store_path.basename)
        directory = self._opened()
        try:
            tree = tree_below(directory, name)
            size = nar_size(tree)
            if size != info.nar_size:
                raise FormatError(f"its files make a NAR of {size} bytes; {info.nar_size} are registered")
            yield from nar_below(directory, name, tree)
        except FormatError as error:
            raise self._placed(info.store_path, error) from error
        except OSError as error:
            raise self._failure(info.store_path.basename, error) from error
        finally:
            os.close(directory)

    def _opened(self) -> int:
        """A descriptor of the store's directory."""
        try:
            directory = open_directory(self._directory)
        except OSError as error:
            raise SourceError(
                f"cannot open the store: {error.strerror}",
                where=str(self._directory),
                hint="is it mounted? The store is ROOT/nix/store, or where ?real= says",
            ) from error
        if file_system_of(directory) == OWN:
            os.close(directory)
            raise SourceError(
                "this store is a mount of ours: reading it would wait for ourselves",
                where=str(self._directory),
                hint="mount somewhere else, or leave this source out",
            )
        return directory

    def _failure(self, name: str, error: OSError) -> SourceError:
        gone = isinstance(error, FileNotFoundError | NotADirectoryError)
        kind = SourceMissingError if gone else SourceError
        what = "it, or a file of it, is gone" if gone else f"cannot read it: {error.strerror}"
        return kind(what, where=str(self._directory / name))

    def _placed(self, path: StorePath, error: FormatError) -> FormatError:
        return type(error)(
            f"not what Nix's database says: {error.what}",
            where=str(self._directory / path.basename),
            hint="nix-store --verify-path, and --repair-path, on the machine that owns it",
        )


def is_trusted(config: SourceConfig) -> bool:
    """Whether paths count without a signature: the URL says so, or it is this machine's own store and of root or of us.

    Who can write the host's store or its database can already choose what every program of that Nix does; as our user
    or root they could also change our cache. With anybody else among its owners its word is worth no more than a cache's.
    """
    if config.trusted or not config.own_store:
        return config.trusted
    database = Path(config.state_dir) / "db"
    return all(_is_ours(place) for place in (Path(config.address), database, database / "db.sqlite"))


def _is_ours(place: Path) -> bool:
    """A store is writable for its builders' group, with the sticky bit; that is Nix's own arrangement."""
    try:
        status = place.stat()
    except OSError:
        return False
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & stat.S_IWOTH


class _Packing:
    """A NAR's pieces as chunks. Descriptors are never closed under a thread that reads: then closing is left to it."""

    def __init__(self, pieces: Generator[bytes, None, None]) -> None:
        self._pieces = pieces
        self._reading = threading.Lock()
        self._abandoned = False

    def chunk(self) -> bytes:
        """At least 1 MiB, except for the last; b"" at the end. On a worker thread."""
        parts: list[bytes] = []
        size = 0
        try:
            with self._reading:
                while size < CHUNK and not self._abandoned and (piece := next(self._pieces, b"")):
                    parts.append(piece)
                    size += len(piece)
        finally:
            if self._abandoned:
                self.close()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        self._abandoned = True
        if self._reading.acquire(blocking=False):
            self._pieces.close()
            self._reading.release()


def _checked(hash_part: str) -> str:
    if not is_hash_part(hash_part):
        raise ValueError(f"not a hash part: {hash_part[:100]!r}")
    return hash_part
