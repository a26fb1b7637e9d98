"""One SQLite file, its transactions and what its failures mean. No table is known here: see ``index`` and ``chunk_maps``.

WAL mode with ``synchronous=NORMAL``, one connection, used from one thread (the daemon's event loop; SQLite refuses others).

D1  ``change`` is committed when its block ends, with everything that waited, or undone by an exception.
D2  What ``remember`` writes waits for ``flush``, for the next commit, or until MAX_PENDING of it wait.
D3  After a failure no transaction is open, and ``rolled_back`` was called where one was undone.

Errors: CacheFullError when the disk is full, UnavailableIndexError for what may be over at the next try, CacheError else.
When SQLite finds the file broken, a mark is left beside it (``damage_mark``) for the next start, which makes a new one.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from veneer.model.errors import CacheError, CacheFullError

from . import migrations
from .directory import cache_error

MAX_PENDING = 2000
"""Remembered rows after which a commit does not wait for ``flush``."""
_FOR_NOW = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR)
_PRAGMAS = (
    "journal_mode = WAL",
    "synchronous = NORMAL",
    "cache_size = -16384",  # KiB: bounds memory whatever the index's size
    "temp_store = MEMORY",
    "wal_autocheckpoint = 16384",  # pages; normally Cache's sync does it earlier, off the event loop
    "journal_size_limit = 67108864",
)


class DamagedIndexError(CacheError):
    """SQLite cannot read the index. ``Cache.open`` moves it aside and begins anew; elsewhere a restart is needed."""


class UnavailableIndexError(CacheError):
    """Another program holds the index, or its disk fails. It may be over at the next try."""


def damage_mark(path: Path) -> Path:
    """The file that tells the next start that the index at ``path`` is broken."""
    return path.with_name(path.name + ".damaged")


def checkpoint(path: Path) -> None:
    """Moves what the WAL holds into the file at ``path``, with its fsyncs. From any thread, beside the open database."""
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=2.0, isolation_level=None)) as db:
            db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    except sqlite3.Error as error:
        kind = UnavailableIndexError if _code(error) in _FOR_NOW else CacheError
        raise kind(f"cannot write back the cache's index: {error}", where=str(path)) from error


class Database:
    """See the module. ``before_commit``: writes what waits elsewhere. ``fault``: told the step before each commit (for crash tests)."""

    def __init__(
        self,
        path: Path,
        *,
        before_commit: Callable[[], None],
        rolled_back: Callable[[], None],
        fault: Callable[[str], None],
    ) -> None:
        """Opens or makes the file, at the last schema. DamagedIndexError when it must be made anew, CacheError for other troubles."""
        self.path = path
        self._before_commit = before_commit
        self._rolled_back = rolled_back
        self._fault = fault
        self._pending = 0
        if damage_mark(path).exists():
            raise DamagedIndexError("the cache's index was found damaged", where=str(path))
        try:
            os.close(
                os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            )  # -wal and -shm take its mode
            self.connection = sqlite3.connect(path, timeout=2.0, isolation_level=None, cached_statements=256)
        except OSError as error:
            raise cache_error(error, path, "open the index of") from error
        except sqlite3.Error as error:
            raise CacheError(f"cannot open the cache's index: {error}", where=str(path)) from error
        try:
            for pragma in _PRAGMAS:
                self.connection.execute(f"PRAGMA {pragma}")
            migrations.migrate(self.connection, str(path))
        except sqlite3.Error as error:
            failure = self._failure(error)
            self.connection.close()
            raise failure from error
        except BaseException:
            self.connection.close()
            raise

    def run(self, sql: str, args: Sequence[object] = ()) -> sqlite3.Cursor:
        try:
            return self.connection.execute(sql, args)
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def run_many(self, sql: str, rows: Sequence[Sequence[object]]) -> None:
        try:
            self.connection.executemany(sql, rows)
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def one(self, sql: str, args: Sequence[object] = ()) -> Any:
        return self.run(sql, args).fetchone()

    def all(self, sql: str, args: Sequence[object] = ()) -> list[Any]:
        try:
            return self.run(sql, args).fetchall()
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def each(self, sql: str, args: Sequence[object] = ()) -> Iterator[Any]:
        try:
            yield from self.run(sql, args)
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def remember(self, sql: str, args: Sequence[object]) -> int:
        """Rows changed; committed later (D2)."""
        self.begin()
        count = self.run(sql, args).rowcount
        self._pending += 1
        if self._pending >= MAX_PENDING:
            self.flush()
        return count

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """A transaction (D1)."""
        self.begin()
        try:
            yield
        except BaseException:
            self._roll_back()
            raise
        self.flush()

    @property
    def in_transaction(self) -> bool:
        return self.connection.in_transaction

    def begin(self) -> None:
        if not self.connection.in_transaction:
            self.run("BEGIN IMMEDIATE")

    def flush(self) -> None:
        """Commits what waits."""
        self._before_commit()
        if self.connection.in_transaction:
            self._fault("index.before_commit")
            self.run("COMMIT")
        self._pending = 0

    def close(self) -> None:
        """Closes without committing."""
        self.connection.close()

    def _roll_back(self) -> None:
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK")
            self._pending = 0
            self._rolled_back()

    def _failure(self, error: sqlite3.Error) -> CacheError:
        """What to raise for ``error`` (D3)."""
        code = _code(error)
        where = str(self.path)
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            with contextlib.suppress(
                OSError
            ):  # a full disk: the next start finds the damage by itself, or later
                damage_mark(self.path).touch()
            hint = "restart the daemon: it begins a new index"
            return DamagedIndexError(f"the cache's index is damaged: {error}", where=where, hint=hint)
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK")
        self._pending = 0
        self._rolled_back()  # SQLite may have rolled back by itself
        if code == sqlite3.SQLITE_FULL:
            hint = "make room, or lower the cache's limit: veneer gc --max-size"
            return CacheFullError("no space left for the cache's index", where=where, hint=hint)
        hints = {
            sqlite3.SQLITE_READONLY: "the index or its file system is read-only",
            sqlite3.SQLITE_CANTOPEN: "was the cache directory deleted? restart the daemon",
            sqlite3.SQLITE_PROTOCOL: "locks do not work here (NFS?); choose a cache directory on a local disk",
            sqlite3.SQLITE_BUSY: "another program has the index open and locked",
            sqlite3.SQLITE_IOERR: "the disk of the cache directory fails; choose another one, or look at dmesg",
        }
        kind = UnavailableIndexError if code in _FOR_NOW else CacheError
        return kind(f"cannot use the cache's index: {error}", where=where, hint=hints.get(code, ""))


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0: unknown."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
