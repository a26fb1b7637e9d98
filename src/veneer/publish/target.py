"""The place that is published to: a directory, or a bucket of any kind that obstore knows.

Objects appear whole or not at all: in a directory by renaming, in buckets by themselves. What a killed run left of a
directory's unfinished objects lies in INCOMING and is removed by the next run there; a lock tells whose is still alive.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from veneer.model.errors import SourceError, UsageError, VeneerError
from veneer.sources.options import SourceConfig
from veneer.sources.transport import Patience

if TYPE_CHECKING:
    from obstore.store import ObjectStore

INCOMING = ".incoming"
_PATIENCE = Patience(connect=10.0, stall=30.0)
_ROOM = "what was published is whole and stays valid; make room and run the same command again"
_AGAIN = "what was published is whole and stays valid; run the same command again"


class Target(Protocol):
    """Safe for use from several threads. Names are relative. VeneerError when it fails."""

    @property
    def url(self) -> str: ...

    @property
    def scratch(self) -> Path:
        """A directory of this machine for objects in the making."""
        ...

    def read(self, name: str, limit: int) -> bytes | None:
        """A small object; None when there is none."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of an object; None when there is none."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Make or replace an object."""
        ...

    def put_file(self, name: str, file: Path) -> None:
        """Make an object of a file in ``scratch``, which may be gone afterwards."""
        ...


@contextmanager
def open_target(
    config: SourceConfig, *, fsync: bool = False, ca_file: Path | None = None
) -> Iterator[Target]:
    """The target of a parsed URL. UsageError for one that cannot be written to."""
    if config.scheme == "file":
        with _directory(Path(config.address), config.url, fsync) as target:
            yield target
    elif config.scheme in ("s3", "gs", "az"):
        with tempfile.TemporaryDirectory(prefix="veneer-publish-") as scratch:
            yield BucketTarget(config, Path(scratch), ca_file)
    else:
        raise UsageError(
            f"cannot publish to {config.scheme}", where=config.url, hint="publish to a file, s3, gs or az URL"
        )


class DirectoryTarget:
    """``fsync``: objects are on disk before they have their name, and their names before the next object's."""

    def __init__(self, directory: Path, scratch: Path, url: str, fsync: bool) -> None:
        self._directory = directory
        self._fsync = fsync
        self.scratch = scratch
        self.url = url

    def read(self, name: str, limit: int) -> bytes | None:
        try:
            with open(self._directory / name, "rb") as file:
                return file.read(limit)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise write_failed(error, f"{self.url}/{name}") from error

    def size(self, name: str) -> int | None:
        try:
            return (self._directory / name).stat().st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise write_failed(error, f"{self.url}/{name}") from error

    def put(self, name: str, data: bytes) -> None:
        file = self.scratch / secrets.token_hex(8)
        try:
            file.write_bytes(data)
        except OSError as error:
            raise write_failed(error, f"{self.url}/{name}") from error
        self.put_file(name, file)

    def put_file(self, name: str, file: Path) -> None:
        place = self._directory / name
        try:
            place.parent.mkdir(exist_ok=True)
            if self._fsync:
                _sync(file)
            file.rename(place)
            if self._fsync:
                _sync(place.parent)
        except OSError as error:
            raise write_failed(error, f"{self.url}/{name}") from error


class BucketTarget:
    """An s3, gs or az place. obstore tries again what may work later, and uploads big files in parts."""

    def __init__(self, config: SourceConfig, scratch: Path, ca_file: Path | None) -> None:
        from veneer.sources.object_store import read_ca
        from veneer.sources.stored_objects import open_bucket

        self._store: ObjectStore = open_bucket(config, _PATIENCE, read_ca(ca_file))
        self.scratch = scratch
        self.url = config.url.partition("?")[0]

    def read(self, name: str, limit: int) -> bytes | None:
        import obstore

        with self._told(name):
            try:
                answer = obstore.get(self._store, name)
            except FileNotFoundError:
                return None
            return bytes(answer.bytes()) if answer.meta["size"] <= limit else b""

    def size(self, name: str) -> int | None:
        import obstore

        with self._told(name):
            try:
                return obstore.head(self._store, name)["size"]
            except FileNotFoundError:
                return None

    def put(self, name: str, data: bytes) -> None:
        import obstore

        with self._told(name):
            obstore.put(self._store, name, data)

    def put_file(self, name: str, file: Path) -> None:
        import obstore

        with self._told(name):
            obstore.put(self._store, name, file)
        file.unlink()

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        from obstore.exceptions import BaseError

        from veneer.sources.stored_objects import reason_of

        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            # Its own text holds whole URLs and what the server said: not for messages.
            raise SourceError(reason_of(error, _PATIENCE), where=f"{self.url}/{name}", hint=_AGAIN) from None


@contextmanager
def _directory(directory: Path, url: str, fsync: bool) -> Iterator[DirectoryTarget]:
    try:
        (directory / INCOMING).mkdir(parents=True, exist_ok=True)
        _remove_abandoned(directory / INCOMING)
        scratch, lock = _own_scratch(directory / INCOMING)
    except OSError as error:
        raise write_failed(error, error.filename or url) from error
    try:
        yield DirectoryTarget(directory, scratch, url, fsync)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)
        with suppress(OSError):  # others are publishing, too
            (directory / INCOMING).rmdir()


def _own_scratch(incoming: Path) -> tuple[Path, int]:
    """(a new directory, descriptor of its lock). Whoever removes abandoned ones may take it before it is locked."""
    while True:
        incoming.mkdir(exist_ok=True)
        scratch = incoming / secrets.token_hex(8)
        try:
            scratch.mkdir()
            lock = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if scratch.is_dir():
            return scratch, lock
        os.close(lock)


def _remove_abandoned(incoming: Path) -> None:
    for left in incoming.iterdir():
        with suppress(OSError):  # a live one is locked: BlockingIOError
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(lock)


def write_failed(error: OSError, where: str) -> VeneerError:
    """What the user is told of an OSError while something is written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return VeneerError("no space left where it is published to", where=where, hint=_ROOM)
    return VeneerError(f"cannot publish: {error.strerror}", where=where, hint=_AGAIN)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
