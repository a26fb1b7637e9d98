"""Nix's own database (SQLite, schema 10), read only, while Nix may be writing it, without leaving a file beside it.

Source: the databases that Nix 2.8, 2.26 and 2.34 make; the queries are theirs. Tables used:

    ValidPaths(id, path, hash, registrationTime, deriver, narSize, ultimate, sigs, ca)     path, deriver: absolute
    Refs(referrer, reference)                                                             ids of ValidPaths

    STATE/db/schema    "10", the only version since Nix 2.0
    STATE/db/db.sqlite

How it is opened depends on what lies there, as measured with SQLite 3.40, as root:

| journal | -shm | opened with | why |
|---|---|---|---|
| WAL | there | mode=ro, readonly_shm=1 | a live Nix: sees all that is committed, writes nothing, waits for nobody |
| WAL | none | immutable=1 | nobody has it open. mode=ro would leave an empty -wal, and without readonly_shm a -shm too, owned by us |
| WAL, on another machine | any | immutable=1 | the -shm is memory that two machines do not share |
| rollback | - | mode=ro | locks and creates nothing; immutable=1 where locks do not work |

The risk of immutable=1: what stands in a -wal that nobody merged is not seen, and pages may be read while a writer elsewhere
replaces them. Absence can then be stale; a wrong row cannot do harm, because the NAR must have the row's hash; a
database that seems damaged is read once more.

A connection lives for one question (0.12 ms): the answer is never old, a file that was replaced is noticed, no mount is
held, and the last Nix to close the database can tidy up after itself.

The header is read once per file, not each time: closing a descriptor of our own drops the locks of other connections.
Blocks; for worker threads. Safe for several threads.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from veneer.model.errors import FormatError, SourceError
from veneer.model.hashes import Hash
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath

from .mounts import file_system_of, is_remote, open_directory

SCHEMA_VERSION = "10"
BUSY_SECONDS = 5.0
"""How long a writer in rollback mode may keep us waiting."""
_HEADER = 100
_LIVE = "mode=ro&readonly_shm=1"
_IMMUTABLE = "immutable=1"
_RETRIED = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PROTOCOL}
"""Reasons to try again with immutable=1: no -shm any more, locks that do not work."""

_PATH = (
    "select id, path, hash, deriver, narSize, sigs, ca from ValidPaths where path >= ? order by path limit 1"
)
_REFERENCES = "select path from Refs join ValidPaths on reference = id where referrer = ?"


@dataclass(frozen=True, slots=True)
class _File:
    """What was found out about the database when its file was first seen. ``identity``: device and inode."""

    identity: tuple[int, int]
    wal: bool
    remote: bool


class NixDatabase:
    """The database of one state directory. ``store_dir``: the store directory that its paths must be in."""

    def __init__(self, state_dir: Path, store_dir: str) -> None:
        self.file = state_dir / "db" / "db.sqlite"
        self._url = self.file.as_uri()
        self._shm = self.file.with_name("db.sqlite-shm")
        self._schema = self.file.with_name("schema")
        self._store_dir = store_dir.rstrip("/")
        self._known: _File | None = None

    def check(self) -> None:
        """SourceError unless there is a database of our store directory with the schema that we know."""
        self._ask("")

    def path_info(self, hash_part: str) -> UnverifiedPathInfo | None:
        """The valid path with this hash part; ``url`` is its base name. SourceError; FormatError for a row that is wrong."""
        found = self._ask(f"{self._store_dir}/{hash_part}-")
        if found is None:
            return None
        row, references = found
        try:
            return self._parsed(row, references)
        except FormatError as error:
            path = row[1] if isinstance(row[1], str) else hash_part
            raise FormatError(
                f"its row for {path} is wrong: {error.what}",
                where=str(self.file),
                hint="nix-store --verify on the machine that owns it",
            ) from error

    def _ask(self, prefix: str) -> tuple[tuple[object, ...], list[object]] | None:
        """(row, references) of the path that begins with ``prefix``; None when there is none."""
        file = self._examined()
        ways = [_IMMUTABLE, _IMMUTABLE]
        if not file.wal or (not file.remote and self._shm.exists()):
            ways = [_LIVE, _IMMUTABLE]
        for way, is_last in zip(ways, (False, True), strict=True):
            try:
                return self._asked(way, prefix)
            except sqlite3.Error as error:
                code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
                again = {sqlite3.SQLITE_CORRUPT} if way == _IMMUTABLE else _RETRIED
                if is_last or code not in again:
                    raise self._failure(error, code) from error
        raise AssertionError

    def _asked(self, way: str, prefix: str) -> tuple[tuple[object, ...], list[object]] | None:
        url = f"{self._url}?{way}"
        with closing(sqlite3.connect(url, uri=True, timeout=BUSY_SECONDS, isolation_level=None)) as db:
            db.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
            db.execute("begin")  # both answers from one state
            row = db.execute(_PATH, (prefix,)).fetchone()
            if prefix and row is not None and str(row[1]).startswith(prefix):
                return row, [each[0] for each in db.execute(_REFERENCES, (row[0],))]
            row = db.execute("select path from ValidPaths limit 1").fetchone()
            if row is not None and not str(row[0]).startswith(self._store_dir + "/"):
                other = str(row[0]).rpartition("/")[0]
                raise SourceError(
                    f"this database is of the store directory {other}, not {self._store_dir}",
                    where=str(self.file),
                    hint="paths cannot be moved to another store directory; use a store of the same one",
                )
        return None

    def _parsed(self, row: tuple[object, ...], references: list[object]) -> UnverifiedPathInfo:
        _, path, nar_hash, deriver, nar_size, signatures, ca = row
        digest = Hash.parse(_text(nar_hash))
        if digest.algorithm != "sha256":
            raise FormatError(f"its hash is {digest.algorithm}, not sha256")
        if not isinstance(nar_size, int) or nar_size <= 0:
            raise FormatError(f"no NAR size: {nar_size!r}")
        store_path = self._path(path)
        return UnverifiedPathInfo(
            store_path=store_path,
            url=store_path.basename,
            compression="none",
            nar_hash=digest,
            nar_size=nar_size,
            references=tuple(sorted(self._path(each) for each in references)),
            deriver=self._path(deriver).basename if deriver else "",
            signatures=tuple(_text(signatures or "").split()),
            ca=_text(ca or ""),
            store_dir=self._store_dir,
        )

    def _path(self, text: object) -> StorePath:
        return StorePath.parse_absolute(_text(text), self._store_dir)

    def _examined(self) -> _File:
        """SourceError when this is no database that we can read."""
        try:
            version = self._schema.read_text("ascii", errors="replace").strip()
            status = self.file.stat()
            identity = (status.st_dev, status.st_ino)
            if self._known is None or self._known.identity != identity:
                with self.file.open("rb") as file:
                    header = file.read(_HEADER)
                self._known = _File(identity, wal=header[18:20] == b"\2\2", remote=self._is_remote())
        except FileNotFoundError as error:
            raise SourceError(
                "there is no database of Nix here",
                where=str(error.filename),
                hint="is it mounted? Nix's state is in ROOT/nix/var/nix, or where ?state= says",
            ) from error
        except OSError as error:
            raise SourceError(
                f"cannot read Nix's database: {error.strerror}", where=str(error.filename or self.file)
            ) from error
        if version != SCHEMA_VERSION:
            raise SourceError(
                f"Nix's database has schema version {version[:20]!r}; only {SCHEMA_VERSION} is known",
                where=str(self._schema),
                hint="let its own Nix upgrade it" if version.isdecimal() and int(version) < 10 else "",
            )
        return self._known

    def _is_remote(self) -> bool:
        directory = open_directory(self.file.parent)
        try:
            return is_remote(file_system_of(directory))
        finally:
            os.close(directory)

    def _failure(self, error: sqlite3.Error, code: int) -> SourceError:
        where = str(self.file)
        match code:
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                what = f"another process has held Nix's database for {BUSY_SECONDS:g} s"
                return SourceError(what, where=where, hint="wait until Nix there is done")
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                hint = "sqlite3 db.sqlite 'pragma integrity_check' on the machine that owns it"
                return SourceError(f"Nix's database is damaged: {error}", where=where, hint=hint)
            case sqlite3.SQLITE_ERROR:
                hint = "is this the database of another program, or of a Nix that was never started?"
                return SourceError(f"not a database of Nix: {error}", where=where, hint=hint)
            case _:
                return SourceError(f"cannot read Nix's database: {error}", where=where)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise FormatError(f"not a text: {value!r:.100}")
    return value
