"""The cache's index: every row that Veneer keeps, and all SQL that touches them.

One SQLite file in WAL mode with ``synchronous=NORMAL``, one connection, used from one thread (the daemon's event
loop; SQLite refuses others). A read costs some 10 µs; 1,000,000 narinfos stay on disk.

I1  A path number, once given out, never means another store path or another tree: numbers come from AUTOINCREMENT,
    and ``add_path`` and ``replace_path`` return after their commit. A new index starts at a random number, because
    mount servers may outlive the old one.
I2  Rows about files, pins and quarantines are committed when the call returns. Remembered answers (narinfos, absent
    listings, last use) wait for ``flush`` or for the next commit; losing them costs a question to a source.
I3  A row says that a file is there only after the file has its final name (``nars``, ``trees`` see to it).
I4  The row of a file and its ``unsynced`` row are written in one transaction, and the latter goes only after fdatasync.

Errors: CacheFullError when the disk is full (the transaction is rolled back, remembered answers with it), CacheError
else. When SQLite finds the file broken, ``index.sqlite.damaged`` is left for the next start, which makes a new one.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from veneer.model.errors import CacheError, CacheFullError
from veneer.model.hashes import Hash
from veneer.model.store_path import StorePath

from . import migrations
from .directory import cache_error
from .rows import FileRow, NarinfoRow, NarState, PathRow, Totals, TreeState, Unsynced

__all__ = ["FileRow", "Index", "NarState", "NarinfoRow", "PathRow", "Totals", "TreeState", "Unsynced"]

BASES = (1 << 20, 1 << 31)
"""Range of a new index's first path number; numbers stay below 2^32."""
MAX_PENDING = 2000
"""Remembered answers after which a commit does not wait for ``flush``."""
_LOOKUP_BATCH = 256
_FORGET_BATCH = 10_000


_COLUMNS = (
    "number, hash_part, name, nar_hash, nar_size, tree, nar, last_used, quarantined, disk_size, tree_size"
)
_TREES = tuple(TreeState)
_NARS = tuple(NarState)


def _row(c: Any) -> PathRow:
    return PathRow(
        c[0],
        StorePath(c[1], c[2]),
        _unpack_hash(c[3]),
        c[4],
        _TREES[c[5]],
        _NARS[c[6]],
        c[7],
        c[8] != 0,
        c[9],
        c[10],
    )


def _new_row(number: int, store_path: StorePath, nar_hash: Hash, nar_size: int, now: float) -> PathRow:
    return PathRow(number, store_path, nar_hash, nar_size, TreeState.NONE, NarState.NONE, now, False, 0, 0)


def _pack_hash(value: Hash) -> bytes:
    return value.algorithm.encode("ascii") + b":" + value.digest


def _unpack_hash(data: bytes) -> Hash:
    algorithm, _, digest = data.partition(b":")
    return Hash(algorithm.decode("ascii"), digest)


def _key(store_path: StorePath, nar_hash: Hash) -> tuple[str, str, bytes]:
    return store_path.hash_part, store_path.name, _pack_hash(nar_hash)


class DamagedIndexError(CacheError):
    """SQLite cannot read the index. ``Cache.open`` moves it aside and begins anew; elsewhere a restart is needed."""


class UnavailableIndexError(CacheError):
    """Another program holds the index, or its disk fails. It may be over at the next try."""


_FOR_NOW = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR)


def damage_mark(path: Path) -> Path:
    """The file that tells the next start that the index at ``path`` is broken."""
    return path.with_name(path.name + ".damaged")


def checkpoint(path: Path) -> None:
    """Moves what the WAL holds into the file at ``path``, with its fsyncs. From any thread, beside the open ``Index``."""
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=2.0, isolation_level=None)) as db:
            db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    except sqlite3.Error as error:
        kind = UnavailableIndexError if _code(error) in _FOR_NOW else CacheError
        raise kind(f"cannot write back the cache's index: {error}", where=str(path)) from error


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0: unknown."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


class Index:
    """See the module. ``random_below(n)`` and ``random_bytes(n)`` are asked only when the index is new."""

    generation: bytes
    """16 random bytes made with the index; in every tree file's header."""

    def __init__(
        self,
        path: Path,
        *,
        random_bytes: Callable[[int], bytes] = os.urandom,
        fault: Callable[[str], None] = lambda step: None,
    ) -> None:
        """Opens or makes the index. DamagedIndexError when it must be made anew, CacheError for other troubles."""
        self._path = path
        self._fault = fault
        self._pending = 0
        self._touched: dict[int, float] = {}
        self._sources: dict[str, int] = {}
        self._serial = 0
        self._files: Totals | None = None
        self._narinfos = self._narinfos_saved = 0
        if damage_mark(path).exists():
            raise DamagedIndexError("the cache's index was found damaged", where=str(path))
        try:
            os.close(
                os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            )  # -wal and -shm take its mode
            self._db = sqlite3.connect(path, timeout=2.0, isolation_level=None, cached_statements=256)
        except OSError as error:
            raise cache_error(error, path, "open the index of") from error
        except sqlite3.Error as error:
            raise CacheError(f"cannot open the cache's index: {error}", where=str(path)) from error
        try:
            self._prepare(random_bytes)
        except sqlite3.Error as error:
            failure = self._failure(error)
            self._db.close()
            raise failure from error
        except BaseException:
            self._db.close()
            raise

    # -- remembered answers of sources

    def narinfo(self, source_url: str, hash_part: str) -> NarinfoRow | None:
        """The kept answer; None: never asked."""
        found = self._one(
            "SELECT body, fetched_at FROM narinfos WHERE source = ? AND hash_part = ?",
            (self._sources.get(source_url), hash_part),
        )
        return None if found is None else NarinfoRow(found[0], found[1])

    def narinfos(self, source_url: str, hash_parts: Iterable[str]) -> dict[str, NarinfoRow]:
        """The kept answers among ``hash_parts``; those never asked are left out."""
        source = self._sources.get(source_url)
        wanted = list(hash_parts)
        marks = ",".join("?" * _LOOKUP_BATCH)
        sql = f"SELECT hash_part, body, fetched_at FROM narinfos WHERE source = ? AND hash_part IN ({marks})"
        answers: dict[str, NarinfoRow] = {}
        for start in range(0, len(wanted) if source is not None else 0, _LOOKUP_BATCH):
            batch = wanted[start : start + _LOOKUP_BATCH]
            padded = batch + [""] * (_LOOKUP_BATCH - len(batch))  # one statement for every size
            for hash_part, body, fetched_at in self._all(sql, (source, *padded)):
                answers[hash_part] = NarinfoRow(body, fetched_at)
        return answers

    def put_narinfo(self, source_url: str, hash_part: str, body: bytes | None, now: float) -> None:
        """Remembers an answer (None: it has none), in place of an earlier one."""
        source = self._source(source_url)
        insert = "INSERT OR IGNORE INTO narinfos (source, hash_part, fetched_at, body) VALUES (?, ?, ?, ?)"
        if self._remember(insert, (source, hash_part, now, body)):
            self._narinfos += 1
        else:
            update = "UPDATE narinfos SET fetched_at = ?, body = ? WHERE source = ? AND hash_part = ?"
            self._remember(update, (now, body, source, hash_part))

    def forget_negative(self, before: float) -> int:
        """Forgets narinfo and listing answers "has none" older than ``before``, at most 10,000 of each per call.

        Returns how many went: call again while that is not 0.
        """
        gone = self._remember(
            "DELETE FROM narinfos WHERE id IN"
            " (SELECT id FROM narinfos WHERE body IS NULL AND fetched_at < ? LIMIT ?)",
            (before, _FORGET_BATCH),
        )
        self._narinfos -= gone
        return gone + self._remember(
            "DELETE FROM absent_listings WHERE (source, hash_part) IN"
            " (SELECT source, hash_part FROM absent_listings WHERE asked_at < ? LIMIT ?)",
            (before, _FORGET_BATCH),
        )

    def listing_absent(self, source_url: str, hash_part: str) -> float | None:
        """When the source said that it has no listing; None: it never did."""
        found = self._one(
            "SELECT asked_at FROM absent_listings WHERE source = ? AND hash_part = ?",
            (self._sources.get(source_url), hash_part),
        )
        return None if found is None else float(found[0])

    def put_listing_absent(self, source_url: str, hash_part: str, now: float) -> None:
        self._remember(
            "INSERT OR REPLACE INTO absent_listings (source, hash_part, asked_at) VALUES (?, ?, ?)",
            (self._source(source_url), hash_part, now),
        )

    def signature_verified(self, digest: bytes) -> bool:
        """Whether ``put_signature_verified`` was told this digest."""
        return self._one("SELECT 1 FROM verified_signatures WHERE digest = ?", (digest,)) is not None

    def put_signature_verified(self, digest: bytes) -> None:
        """``digest``: of a key, a signature and what it signs, all of it, so that nothing else can have it."""
        self._remember("INSERT OR IGNORE INTO verified_signatures (digest) VALUES (?)", (digest,))

    # -- paths

    def path(self, number: int) -> PathRow | None:
        found = self._one(f"SELECT {_COLUMNS} FROM paths WHERE number = ?", (number,))
        return None if found is None else _row(found)

    def path_of(self, store_path: StorePath, nar_hash: Hash) -> PathRow | None:
        """The revision in use (there is at most one)."""
        found = self._one(
            f"SELECT {_COLUMNS} FROM paths"
            " WHERE hash_part = ? AND name = ? AND nar_hash = ? AND quarantined = 0",
            _key(store_path, nar_hash),
        )
        return None if found is None else _row(found)

    def add_path(self, store_path: StorePath, nar_hash: Hash, nar_size: int, now: float) -> PathRow:
        """The revision in use, made with a new number when there is none."""
        known = self.path_of(store_path, nar_hash)
        if known is not None:
            return known
        with self._change():
            number = self._insert_path(store_path, nar_hash, nar_size, now)
        self._fault("index.path_added")
        return _new_row(number, store_path, nar_hash, nar_size, now)

    def replace_path(self, number: int, now: float) -> PathRow:
        """After its tree turned out wrong: retires ``number`` and gives the path a new one.

        The retired number's files are the caller's to drop (recovery does it else). Already retired: the one in use.
        """
        old = self._present(number)
        if old.quarantined:
            return self.add_path(old.store_path, old.nar_hash, old.nar_size, now)
        with self._change():
            self._run("UPDATE paths SET quarantined = 1 WHERE number = ?", (number,))
            new = self._insert_path(old.store_path, old.nar_hash, old.nar_size, now)
        self._fault("index.path_replaced")
        return _new_row(new, old.store_path, old.nar_hash, old.nar_size, now)

    def retired(self, limit: int) -> list[tuple[int, StorePath]]:
        """The numbers retired last, newest first: no file of theirs may be read any more."""
        sql = "SELECT number, hash_part, name FROM paths WHERE quarantined = 1 ORDER BY number DESC LIMIT ?"
        return [(number, StorePath(h, n)) for number, h, n in self._all(sql, (limit,))]

    def set_tree(self, number: int, state: TreeState, size: int | None = None) -> None:
        """After the tree file was put in place (or dropped, NONE). ``size``: its bytes; None: as before."""
        old = self._present(number)
        size = 0 if state is TreeState.NONE else old.tree_size if size is None else size
        with self._change():
            self._run("UPDATE paths SET tree = ?, tree_size = ? WHERE number = ?", (int(state), size, number))
            written = size != old.tree_size or old.tree is TreeState.NONE
            self._mark(number, "tree", present=state is not TreeState.NONE, written=written)
        t = self.totals()
        trees = (state is not TreeState.NONE) - (old.tree is not TreeState.NONE)
        self._files = replace(t, trees=t.trees + trees, tree_bytes=t.tree_bytes + size - old.tree_size)

    def set_nar(
        self, number: int, state: NarState, size_on_disk: int = 0, present: bytes | None = None
    ) -> None:
        """After the NAR file was put in place, chunks were written to a sparse one (``present``), or it was dropped (NONE)."""
        old = self._present(number)
        size = 0 if state is NarState.NONE else size_on_disk
        with self._change():
            self._run("UPDATE paths SET nar = ?, disk_size = ? WHERE number = ?", (int(state), size, number))
            self._run("UPDATE chunk_maps SET present = ? WHERE number = ?", (present, number))
            self._mark(number, "nar", present=state is NarState.WHOLE, written=True)
            self._mark(number, "sparse", present=state is NarState.SPARSE, written=True)
        t = self.totals()
        nars = (state is NarState.WHOLE) - (old.nar is NarState.WHOLE)
        self._files = replace(t, nars=t.nars + nars, nar_bytes=t.nar_bytes + size - old.disk_size)

    def forget_files(self, *, trees: Iterable[int] = (), nars: Iterable[int] = ()) -> None:
        """``set_tree`` and ``set_nar`` to NONE for many, in one transaction."""
        with self._change():
            for number in trees:
                self._run("UPDATE paths SET tree = 0, tree_size = 0 WHERE number = ?", (number,))
                self._mark(number, "tree", present=False, written=False)
            for number in nars:
                self._run("UPDATE paths SET nar = 0, disk_size = 0 WHERE number = ?", (number,))
                self._run("UPDATE chunk_maps SET present = NULL WHERE number = ?", (number,))
                self._mark(number, "nar", present=False, written=False)
                self._mark(number, "sparse", present=False, written=False)
        self._recount()

    def touch(self, rows: Iterable[tuple[int, float]]) -> None:
        """Last use of (path number, time); kept in memory until ``flush``."""
        for number, when in rows:
            if when > self._touched.get(number, 0.0):
                self._touched[number] = when

    # -- quarantine and pins

    def quarantine(self, number: int, reason: str, source_url: str, until: float, now: float) -> None:
        """Bars one source from serving this path and hash again before ``until``; other sources are not concerned.

        The number stays in use: where wrong bytes or a wrong tree were already shown, ``replace_path`` as well.
        """
        path = self._present(number)
        key = _key(path.store_path, path.nar_hash)
        with self._change():
            self._run("DELETE FROM quarantines WHERE until <= ?", (now,))
            self._run(
                "INSERT OR REPLACE INTO quarantines (hash_part, name, nar_hash, source, reason, since, until)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*key, source_url, reason, now, until),
            )

    def quarantined(self, store_path: StorePath, nar_hash: Hash, source_url: str, now: float) -> str | None:
        """Why this source is barred from serving this path and hash; None: it is not, or the clock was set back since."""
        found = self._one(
            "SELECT reason FROM quarantines"
            " WHERE hash_part = ? AND name = ? AND nar_hash = ? AND source = ? AND since <= ? AND until > ?",
            (*_key(store_path, nar_hash), source_url, now, now),
        )
        return None if found is None else str(found[0])

    def quarantines(self, now: float) -> list[tuple[StorePath, str, str, float]]:
        """(store path, source URL, reason, until) of all that hold now, for ``status``."""
        sql = "SELECT hash_part, name, source, reason, until FROM quarantines WHERE until > ? ORDER BY since"
        return [
            (StorePath(h, n), source, reason, until) for h, n, source, reason, until in self._all(sql, (now,))
        ]

    def pin(self, name: str, paths: Iterable[StorePath]) -> None:
        """Keeps the NARs of ``paths`` from eviction, under a name; replaces what that name held."""
        with self._change():
            self._run("DELETE FROM pins WHERE pin = ?", (name,))
            for path in paths:
                self._run("INSERT OR IGNORE INTO pins (pin, basename) VALUES (?, ?)", (name, path.basename))

    def unpin(self, name: str) -> None:
        with self._change():
            self._run("DELETE FROM pins WHERE pin = ?", (name,))

    def pins(self) -> dict[str, list[StorePath]]:
        answer: dict[str, list[StorePath]] = {}
        for name, basename in self._all("SELECT pin, basename FROM pins ORDER BY pin, basename"):
            answer.setdefault(name, []).append(StorePath.parse(basename))
        return answer

    # -- for eviction, recovery, durability

    def totals(self) -> Totals:
        """Kept in memory; costs nothing."""
        assert self._files is not None
        return replace(self._files, narinfos=self._narinfos)

    def nars(self) -> Iterator[PathRow]:
        """Paths with a NAR file, whole or not, least recently used first. Do not write to the index while iterating."""
        self.flush()
        yield from map(_row, self._each(f"SELECT {_COLUMNS} FROM paths WHERE nar <> 0 ORDER BY last_used"))

    def trees_unused_since(self, before: float) -> Iterator[PathRow]:
        """Paths with a tree file, without a NAR, and last used before then; least recently used first."""
        self.flush()
        sql = f"SELECT {_COLUMNS} FROM paths WHERE tree <> 0 AND nar = 0 AND last_used < ? ORDER BY last_used"
        yield from map(_row, self._each(sql, (before,)))

    def with_files(self) -> Iterator[FileRow]:
        """Every path that should have a file."""
        sql = "SELECT number, tree, nar, tree_size, nar_size, quarantined FROM paths WHERE tree <> 0 OR nar <> 0"
        return map(FileRow._make, self._each(sql))

    def with_files_after(self, number: int, limit: int) -> list[PathRow]:
        """The next paths that should have a file, by number, for who goes through all of them."""
        sql = f"SELECT {_COLUMNS} FROM paths WHERE (tree <> 0 OR nar <> 0) AND number > ? ORDER BY number LIMIT ?"
        return [_row(c) for c in self._all(sql, (number, limit))]

    def unsynced(self) -> list[Unsynced]:
        return [Unsynced(*c) for c in self._all("SELECT number, kind, serial FROM unsynced ORDER BY serial")]

    def mark_synced(self, files: Sequence[Unsynced]) -> None:
        """After fdatasync of these files and fsync of their directories."""
        with self._change():
            for file in files:
                self._run(
                    "DELETE FROM unsynced WHERE number = ? AND kind = ? AND serial = ?",
                    (file.number, file.kind, file.serial),
                )

    def fact(self, name: str) -> str | None:
        """A note of the cache about itself ("boot", "tree_format")."""
        found = self._one("SELECT value FROM facts WHERE name = ?", (name,))
        return None if found is None else str(found[0])

    def set_fact(self, name: str, value: str) -> None:
        with self._change():
            self._run("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)", (name, value))

    # -- transactions

    def flush(self) -> None:
        """Commits what waits. The daemon calls it some five times a second."""
        try:
            if self._touched:
                self._begin()
                update = "UPDATE paths SET last_used = max(last_used, ?) WHERE number = ?"
                self._db.executemany(update, [(when, number) for number, when in self._touched.items()])
                self._touched = {}
            if self._db.in_transaction:
                if self._narinfos != self._narinfos_saved:
                    self._db.execute("UPDATE facts SET value = ? WHERE name = 'narinfos'", (self._narinfos,))
                    self._narinfos_saved = self._narinfos
                self._fault("index.before_commit")
                self._db.execute("COMMIT")
            self._pending = 0
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Commits and closes; the last connection folds the WAL into the file."""
        try:
            self.flush()
        finally:
            self._db.close()

    def abandon(self) -> None:
        """Closes without committing, after a failure."""
        self._db.close()

    def _change(self) -> _Change:
        return _Change(self)

    def _begin(self) -> None:
        if not self._db.in_transaction:
            self._run("BEGIN IMMEDIATE")

    def _remember(self, sql: str, args: Sequence[object]) -> int:
        """Rows changed; committed later (I2)."""
        self._begin()
        count = self._run(sql, args).rowcount
        self._pending += 1
        if self._pending >= MAX_PENDING:
            self.flush()
        return count

    def _run(self, sql: str, args: Sequence[object] = ()) -> sqlite3.Cursor:
        try:
            return self._db.execute(sql, args)
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def _one(self, sql: str, args: Sequence[object] = ()) -> Any:
        return self._run(sql, args).fetchone()

    def _all(self, sql: str, args: Sequence[object] = ()) -> list[Any]:
        try:
            return self._run(sql, args).fetchall()
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def _each(self, sql: str, args: Sequence[object] = ()) -> Iterator[Any]:
        try:
            yield from self._run(sql, args)
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def _failure(self, error: sqlite3.Error) -> CacheError:
        """What to raise for ``error``; after it no transaction is open and the counts are those of the file."""
        code = _code(error)
        where = str(self._path)
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            with contextlib.suppress(
                OSError
            ):  # a full disk: the next start finds the damage by itself, or later
                damage_mark(self._path).touch()
            hint = "restart the daemon: it begins a new index"
            return DamagedIndexError(f"the cache's index is damaged: {error}", where=where, hint=hint)
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self._pending = 0
        self._recount()
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

    # -- details

    def _prepare(self, random_bytes: Callable[[int], bytes]) -> None:
        for pragma in (
            "journal_mode = WAL",
            "synchronous = NORMAL",
            "cache_size = -16384",  # KiB: bounds memory whatever the index's size
            "temp_store = MEMORY",
            "wal_autocheckpoint = 16384",  # pages; normally Cache's sync does it earlier, off the event loop
            "journal_size_limit = 67108864",
        ):
            self._db.execute(f"PRAGMA {pragma}")
        migrations.migrate(self._db, str(self._path))
        if self._db.execute("SELECT 1 FROM facts WHERE name = 'generation'").fetchone() is None:
            base = BASES[0] + int.from_bytes(random_bytes(8), "little") % (BASES[1] - BASES[0])
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('paths', ?)", (base - 1,))
            self._db.execute("INSERT INTO facts VALUES ('generation', ?)", (random_bytes(16),))
            self._db.execute("INSERT INTO facts VALUES ('narinfos', 0)")
            self._db.execute("COMMIT")
        self.generation = bytes(
            self._db.execute("SELECT value FROM facts WHERE name = 'generation'").fetchone()[0]
        )
        for number, url in self._db.execute("SELECT id, url FROM sources"):
            self._sources[url] = number
        self._serial = int(self._db.execute("SELECT coalesce(max(serial), 0) FROM unsynced").fetchone()[0])
        self._count()

    def _count(self) -> None:
        """Totals from the rows themselves."""
        self._narinfos = int(
            self._db.execute("SELECT value FROM facts WHERE name = 'narinfos'").fetchone()[0]
        )
        paths = int(self._db.execute("SELECT count(*) FROM paths").fetchone()[0])
        trees, nars, nar_bytes, tree_bytes = self._db.execute(
            "SELECT coalesce(sum(tree <> 0), 0), coalesce(sum(nar = 1), 0), coalesce(sum(disk_size), 0),"
            " coalesce(sum(tree_size), 0) FROM paths WHERE tree <> 0 OR nar <> 0"
        ).fetchone()
        self._files = Totals(paths, trees, nars, nar_bytes, tree_bytes, 0)

    def _recount(self) -> None:
        """After a rollback, or a change of many rows."""
        if self._files is None:
            return
        try:
            self._count()
        except sqlite3.Error:
            return  # the error that led here is the one to tell; the old counts are close

    def _source(self, url: str) -> int:
        known = self._sources.get(url)
        if known is None:
            with self._change():
                known = self._run("INSERT INTO sources (url) VALUES (?)", (url,)).lastrowid
            assert known is not None
            self._sources[url] = known
        return known

    def _present(self, number: int) -> PathRow:
        found = self.path(number)
        if found is None:
            raise CacheError(f"no path has the number {number}", where=str(self._path))
        return found

    def _insert_path(self, store_path: StorePath, nar_hash: Hash, nar_size: int, now: float) -> int:
        number = self._run(
            "INSERT INTO paths (hash_part, name, nar_hash, nar_size, last_used) VALUES (?, ?, ?, ?, ?)",
            (*_key(store_path, nar_hash), nar_size, now),
        ).lastrowid
        if number is None or number >= 1 << 32:
            raise CacheError(
                "path numbers are used up", where=str(self._path), hint="delete the cache directory"
            )
        t = self.totals()
        self._files = replace(t, paths=t.paths + 1)
        return number

    def _mark(self, number: int, kind: str, *, present: bool, written: bool) -> None:
        if not present:
            self._run("DELETE FROM unsynced WHERE number = ? AND kind = ?", (number, kind))
        elif written:
            self._serial += 1
            insert = "INSERT OR REPLACE INTO unsynced (number, kind, serial) VALUES (?, ?, ?)"
            self._run(insert, (number, kind, self._serial))


class _Change:
    """A transaction that is committed, with what waited, at the end of the block, or undone by an exception."""

    __slots__ = ("_index",)

    def __init__(self, index: Index) -> None:
        self._index = index

    def __enter__(self) -> None:
        self._index._begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        index = self._index
        if kind is None:
            index.flush()
        elif index._db.in_transaction:
            index._db.execute("ROLLBACK")
            index._recount()
