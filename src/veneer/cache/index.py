"""The cache's index: every row that Veneer keeps, but for those of chunks (``chunk_maps``), and all SQL that touches them.

A ``database`` of its own thread. A read costs some 10 µs; 1,000,000 narinfos stay on disk.

I1  A path number, once given out, never means another store path or another tree: numbers come from AUTOINCREMENT,
    and ``add_path`` and ``replace_path`` return after their commit. A new index starts at a random number, because
    mount servers may outlive the old one.
I2  Rows about files, shown roots, pins and quarantines are committed when the call returns. Remembered answers (narinfos,
    absent listings, last use) wait for ``flush`` or for the next commit; losing them costs a question to a source.
I3  A row says that a file is there only after the file has its final name (``nars``, ``trees`` see to it).
I4  The row of a file and its ``unsynced`` row are written in one transaction, and the latter goes only after fdatasync.

Errors: those of ``database``. A transaction that fails takes the remembered answers with it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from veneer.model.errors import CacheError
from veneer.model.hashes import Hash
from veneer.model.store_path import StorePath

from .database import Database
from .rows import FileRow, NarinfoRow, NarState, PathRow, Totals, TreeState, Unsynced

__all__ = ["FileRow", "Index", "NarState", "NarinfoRow", "PathRow", "Totals", "TreeState", "Unsynced"]

BASES = (1 << 20, 1 << 31)
"""Range of a new index's first path number; numbers stay below 2^32."""
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
        self._fault = fault
        self._touched: dict[int, float] = {}
        self._sources: dict[str, int] = {}
        self._serial = 0
        self._files: Totals | None = None
        self._narinfos = self._narinfos_saved = 0
        self.database = self._db = Database(
            path, before_commit=self._write_pending, rolled_back=self._recount, fault=fault
        )
        try:
            self._prepare(random_bytes)
        except BaseException:
            self._db.close()
            raise

    # -- remembered answers of sources

    def narinfo(self, source_url: str, hash_part: str) -> NarinfoRow | None:
        """The kept answer; None: never asked."""
        found = self._db.one(
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
            for hash_part, body, fetched_at in self._db.all(sql, (source, *padded)):
                answers[hash_part] = NarinfoRow(body, fetched_at)
        return answers

    def put_narinfo(self, source_url: str, hash_part: str, body: bytes | None, now: float) -> None:
        """Remembers an answer (None: it has none), in place of an earlier one."""
        source = self._source(source_url)
        insert = "INSERT OR IGNORE INTO narinfos (source, hash_part, fetched_at, body) VALUES (?, ?, ?, ?)"
        if self._db.remember(insert, (source, hash_part, now, body)):
            self._narinfos += 1
        else:
            update = "UPDATE narinfos SET fetched_at = ?, body = ? WHERE source = ? AND hash_part = ?"
            self._db.remember(update, (now, body, source, hash_part))

    def forget_negative(self, before: float) -> int:
        """Forgets narinfo and listing answers "has none" older than ``before``, at most 10,000 of each per call.

        Returns how many went: call again while that is not 0.
        """
        gone = self._db.remember(
            "DELETE FROM narinfos WHERE id IN"
            " (SELECT id FROM narinfos WHERE body IS NULL AND fetched_at < ? LIMIT ?)",
            (before, _FORGET_BATCH),
        )
        self._narinfos -= gone
        return gone + self._db.remember(
            "DELETE FROM absent_listings WHERE (source, hash_part) IN"
            " (SELECT source, hash_part FROM absent_listings WHERE asked_at < ? LIMIT ?)",
            (before, _FORGET_BATCH),
        )

    def listing_absent(self, source_url: str, hash_part: str) -> float | None:
        """When the source said that it has no listing; None: it never did."""
        found = self._db.one(
            "SELECT asked_at FROM absent_listings WHERE source = ? AND hash_part = ?",
            (self._sources.get(source_url), hash_part),
        )
        return None if found is None else float(found[0])

    def put_listing_absent(self, source_url: str, hash_part: str, now: float) -> None:
        self._db.remember(
            "INSERT OR REPLACE INTO absent_listings (source, hash_part, asked_at) VALUES (?, ?, ?)",
            (self._source(source_url), hash_part, now),
        )

    def signature_verified(self, digest: bytes) -> bool:
        """Whether ``put_signature_verified`` was told this digest."""
        return self._db.one("SELECT 1 FROM verified_signatures WHERE digest = ?", (digest,)) is not None

    def put_signature_verified(self, digest: bytes) -> None:
        """``digest``: of a key, a signature and what it signs, all of it, so that nothing else can have it."""
        self._db.remember("INSERT OR IGNORE INTO verified_signatures (digest) VALUES (?)", (digest,))

    # -- paths

    def path(self, number: int) -> PathRow | None:
        found = self._db.one(f"SELECT {_COLUMNS} FROM paths WHERE number = ?", (number,))
        return None if found is None else _row(found)

    def path_of(self, store_path: StorePath, nar_hash: Hash) -> PathRow | None:
        """The revision in use (there is at most one)."""
        found = self._db.one(
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
        with self._db.change():
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
        with self._db.change():
            self._db.run("UPDATE paths SET quarantined = 1 WHERE number = ?", (number,))
            self._db.run("DELETE FROM chunk_maps WHERE number = ?", (number,))
            self._db.run("DELETE FROM chunk_places WHERE number = ?", (number,))
            self._db.run("DELETE FROM directories WHERE number = ?", (number,))
            new = self._insert_path(old.store_path, old.nar_hash, old.nar_size, now)
        self._fault("index.path_replaced")
        return _new_row(new, old.store_path, old.nar_hash, old.nar_size, now)

    def retired(self, limit: int) -> list[tuple[int, StorePath]]:
        """The numbers retired last, newest first: no file of theirs may be read any more."""
        sql = "SELECT number, hash_part, name FROM paths WHERE quarantined = 1 ORDER BY number DESC LIMIT ?"
        return [(number, StorePath(h, n)) for number, h, n in self._db.all(sql, (limit,))]

    def set_tree(self, number: int, state: TreeState, size: int | None = None) -> None:
        """After the tree file was put in place (or dropped, NONE). ``size``: its bytes; None: as before."""
        old = self._present(number)
        size = 0 if state is TreeState.NONE else old.tree_size if size is None else size
        with self._db.change():
            self._db.run(
                "UPDATE paths SET tree = ?, tree_size = ? WHERE number = ?", (int(state), size, number)
            )
            written = size != old.tree_size or old.tree is TreeState.NONE
            self._mark(number, "tree", present=state is not TreeState.NONE, written=written)
        t = self.totals()
        trees = (state is not TreeState.NONE) - (old.tree is not TreeState.NONE)
        self._files = replace(t, trees=t.trees + trees, tree_bytes=t.tree_bytes + size - old.tree_size)

    def is_directory(self, number: int) -> bool:
        """Whether ``put_directory`` was told this number."""
        return self._db.one("SELECT 1 FROM directories WHERE number = ?", (number,)) is not None

    def put_directory(self, number: int) -> None:
        """The path's root is shown as a directory, though no more of its tree is known."""
        with self._db.change():
            self._db.run("INSERT OR IGNORE INTO directories (number) VALUES (?)", (number,))

    def set_nar(
        self, number: int, state: NarState, size_on_disk: int = 0, present: bytes | None = None
    ) -> None:
        """After the NAR file was put in place, chunks were written to a sparse one (``present``), or it was dropped (NONE)."""
        old = self._present(number)
        size = 0 if state is NarState.NONE else size_on_disk
        with self._db.change():
            self._db.run(
                "UPDATE paths SET nar = ?, disk_size = ? WHERE number = ?", (int(state), size, number)
            )
            self._db.run("UPDATE chunk_maps SET present = ? WHERE number = ?", (present, number))
            self._mark(number, "nar", present=state is NarState.WHOLE, written=True)
            self._mark(number, "sparse", present=state is NarState.SPARSE, written=True)
        t = self.totals()
        nars = (state is NarState.WHOLE) - (old.nar is NarState.WHOLE)
        self._files = replace(t, nars=t.nars + nars, nar_bytes=t.nar_bytes + size - old.disk_size)

    def forget_files(self, *, trees: Iterable[int] = (), nars: Iterable[int] = ()) -> None:
        """``set_tree`` and ``set_nar`` to NONE for many, in one transaction."""
        with self._db.change():
            for number in trees:
                self._db.run("UPDATE paths SET tree = 0, tree_size = 0 WHERE number = ?", (number,))
                self._mark(number, "tree", present=False, written=False)
            for number in nars:
                self._db.run("UPDATE paths SET nar = 0, disk_size = 0 WHERE number = ?", (number,))
                self._db.run("UPDATE chunk_maps SET present = NULL WHERE number = ?", (number,))
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
        with self._db.change():
            self._db.run("DELETE FROM quarantines WHERE until <= ?", (now,))
            self._db.run(
                "INSERT OR REPLACE INTO quarantines (hash_part, name, nar_hash, source, reason, since, until)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*key, source_url, reason, now, until),
            )

    def quarantined(self, store_path: StorePath, nar_hash: Hash, source_url: str, now: float) -> str | None:
        """Why this source is barred from serving this path and hash; None: it is not, or the clock was set back since."""
        found = self._db.one(
            "SELECT reason FROM quarantines"
            " WHERE hash_part = ? AND name = ? AND nar_hash = ? AND source = ? AND since <= ? AND until > ?",
            (*_key(store_path, nar_hash), source_url, now, now),
        )
        return None if found is None else str(found[0])

    def quarantines(self, now: float) -> list[tuple[StorePath, str, str, float]]:
        """(store path, source URL, reason, until) of all that hold now, for ``status``."""
        sql = "SELECT hash_part, name, source, reason, until FROM quarantines WHERE until > ? ORDER BY since"
        return [
            (StorePath(h, n), source, reason, until)
            for h, n, source, reason, until in self._db.all(sql, (now,))
        ]

    def pin(self, name: str, paths: Iterable[StorePath]) -> None:
        """Keeps the NARs of ``paths`` from eviction, under a name; replaces what that name held."""
        with self._db.change():
            self._db.run("DELETE FROM pins WHERE pin = ?", (name,))
            for path in paths:
                self._db.run(
                    "INSERT OR IGNORE INTO pins (pin, basename) VALUES (?, ?)", (name, path.basename)
                )

    def unpin(self, name: str) -> None:
        with self._db.change():
            self._db.run("DELETE FROM pins WHERE pin = ?", (name,))

    def pins(self) -> dict[str, list[StorePath]]:
        answer: dict[str, list[StorePath]] = {}
        for name, basename in self._db.all("SELECT pin, basename FROM pins ORDER BY pin, basename"):
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
        yield from map(_row, self._db.each(f"SELECT {_COLUMNS} FROM paths WHERE nar <> 0 ORDER BY last_used"))

    def trees_unused_since(self, before: float) -> Iterator[PathRow]:
        """Paths with a tree file, without a NAR, and last used before then; least recently used first."""
        self.flush()
        sql = f"SELECT {_COLUMNS} FROM paths WHERE tree <> 0 AND nar = 0 AND last_used < ? ORDER BY last_used"
        yield from map(_row, self._db.each(sql, (before,)))

    def with_files(self) -> Iterator[FileRow]:
        """Every path that should have a file."""
        sql = "SELECT number, tree, nar, tree_size, nar_size, quarantined FROM paths WHERE tree <> 0 OR nar <> 0"
        return map(FileRow._make, self._db.each(sql))

    def with_files_after(self, number: int, limit: int) -> list[PathRow]:
        """The next paths that should have a file, by number, for who goes through all of them."""
        sql = f"SELECT {_COLUMNS} FROM paths WHERE (tree <> 0 OR nar <> 0) AND number > ? ORDER BY number LIMIT ?"
        return [_row(c) for c in self._db.all(sql, (number, limit))]

    def unsynced(self) -> list[Unsynced]:
        return [
            Unsynced(*c) for c in self._db.all("SELECT number, kind, serial FROM unsynced ORDER BY serial")
        ]

    def mark_synced(self, files: Sequence[Unsynced]) -> None:
        """After fdatasync of these files and fsync of their directories."""
        with self._db.change():
            for file in files:
                self._db.run(
                    "DELETE FROM unsynced WHERE number = ? AND kind = ? AND serial = ?",
                    (file.number, file.kind, file.serial),
                )

    def fact(self, name: str) -> str | None:
        """A note of the cache about itself ("boot", "tree_format")."""
        found = self._db.one("SELECT value FROM facts WHERE name = ?", (name,))
        return None if found is None else str(found[0])

    def set_fact(self, name: str, value: str) -> None:
        with self._db.change():
            self._db.run("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)", (name, value))

    # -- transactions

    def flush(self) -> None:
        """Commits what waits. The daemon calls it some five times a second."""
        self._db.flush()

    def _write_pending(self) -> None:
        """Before each commit."""
        if self._touched:
            self._db.begin()
            update = "UPDATE paths SET last_used = max(last_used, ?) WHERE number = ?"
            self._db.run_many(update, [(when, number) for number, when in self._touched.items()])
            self._touched = {}
        if self._db.in_transaction and self._narinfos != self._narinfos_saved:
            self._db.run("UPDATE facts SET value = ? WHERE name = 'narinfos'", (self._narinfos,))
            self._narinfos_saved = self._narinfos

    def close(self) -> None:
        """Commits and closes; the last connection folds the WAL into the file."""
        try:
            self.flush()
        finally:
            self._db.close()

    def abandon(self) -> None:
        """Closes without committing, after a failure."""
        self._db.close()

    # -- details

    def _prepare(self, random_bytes: Callable[[int], bytes]) -> None:
        if self._db.one("SELECT 1 FROM facts WHERE name = 'generation'") is None:
            base = BASES[0] + int.from_bytes(random_bytes(8), "little") % (BASES[1] - BASES[0])
            with self._db.change():
                self._db.run("INSERT INTO sqlite_sequence (name, seq) VALUES ('paths', ?)", (base - 1,))
                self._db.run("INSERT INTO facts VALUES ('generation', ?)", (random_bytes(16),))
                self._db.run("INSERT INTO facts VALUES ('narinfos', 0)")
        self.generation = bytes(self._db.one("SELECT value FROM facts WHERE name = 'generation'")[0])
        for number, url in self._db.all("SELECT id, url FROM sources"):
            self._sources[url] = number
        self._serial = int(self._db.one("SELECT coalesce(max(serial), 0) FROM unsynced")[0])
        self._count(self._db.one)

    def _count(self, one: Callable[[str], Any]) -> None:
        """Totals from the rows themselves."""
        narinfos = one("SELECT value FROM facts WHERE name = 'narinfos'")[0]
        paths = one("SELECT count(*) FROM paths")[0]
        trees, nars, nar_bytes, tree_bytes = one(
            "SELECT coalesce(sum(tree <> 0), 0), coalesce(sum(nar = 1), 0), coalesce(sum(disk_size), 0),"
            " coalesce(sum(tree_size), 0) FROM paths WHERE tree <> 0 OR nar <> 0"
        )
        self._narinfos, self._files = int(narinfos), Totals(paths, trees, nars, nar_bytes, tree_bytes, 0)

    def _recount(self) -> None:
        """After a rollback, or a change of many rows."""
        if self._files is None:
            return  # still opening
        execute = self._db.connection.execute  # a failure in here must not lead here again
        with contextlib.suppress(
            sqlite3.Error
        ):  # the error that led here is the one to tell; the old counts are close
            self._count(lambda sql: execute(sql).fetchone())

    def _source(self, url: str) -> int:
        known = self._sources.get(url)
        if known is None:
            with self._db.change():
                known = self._db.run("INSERT INTO sources (url) VALUES (?)", (url,)).lastrowid
            assert known is not None
            self._sources[url] = known
        return known

    def _present(self, number: int) -> PathRow:
        found = self.path(number)
        if found is None:
            raise CacheError(f"no path has the number {number}", where=str(self._db.path))
        return found

    def _insert_path(self, store_path: StorePath, nar_hash: Hash, nar_size: int, now: float) -> int:
        number = self._db.run(
            "INSERT INTO paths (hash_part, name, nar_hash, nar_size, last_used) VALUES (?, ?, ?, ?, ?)",
            (*_key(store_path, nar_hash), nar_size, now),
        ).lastrowid
        if number is None or number >= 1 << 32:
            raise CacheError(
                "path numbers are used up", where=str(self._db.path), hint="delete the cache directory"
            )
        t = self.totals()
        self._files = replace(t, paths=t.paths + 1)
        return number

    def _mark(self, number: int, kind: str, *, present: bool, written: bool) -> None:
        if not present:
            self._db.run("DELETE FROM unsynced WHERE number = ? AND kind = ?", (number, kind))
        elif written:
            self._serial += 1
            insert = "INSERT OR REPLACE INTO unsynced (number, kind, serial) VALUES (?, ?, ?)"
            self._db.run(insert, (number, kind, self._serial))
