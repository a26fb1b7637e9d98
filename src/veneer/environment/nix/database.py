"""Nix's own database, filled by us: for a Nix that cannot ask a lower store (before 2.22, Lix, other forks).

Source: the databases that Nix 2.8, 2.26 and 2.34 make, and what they answer from them. Schema version 10 has been the
only one since Nix 2.0; what newer Nix adds (``SchemaMigrations``) it adds by itself when it opens the database.

    <state dir>/db/schema       "10"
    <state dir>/gcroots/veneer/ links to the paths that nothing else refers to, named as they are
    <state dir>/db/db.sqlite    tables below; paths are absolute, hashes "sha256:<hex>", lists separated by spaces

D1  All rows of a call appear at once, or none does (one transaction).
D2  Whatever a row refers to has a row: Nix stops at a reference that is not valid.
D3  A ``.drv`` never gets a row without the rows of its outputs: Nix reads them from the database alone, never writes them for
    a path that is valid already, and without them builds nothing that depends on the derivation.
D4  Filled paths are held by roots. The garbage collector has nothing to gain from them, and would hide them: a file that
    is an input of a build is copied up (Nix 2.8 links it into its sandbox), is then seen by the collector, and is
    deleted with all that refers to it, which leaves marks in the upper layer that no filling removes.
D5  The schema file appears after the tables; until then Nix and we make the tables again, which changes nothing.

Any process may have the database open; writers wait for each other. Nix's lock of the whole store (``big-lock``) is not
taken: it guards only upgrades from older schemas, which we refuse.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from veneer.formats import derivation
from veneer.model.errors import HashMismatchError, NotFoundError, VeneerError
from veneer.model.hashes import Hash
from veneer.model.path_info import PathInfo
from veneer.model.store_path import DEFAULT_STORE_DIR, StorePath

SCHEMA_VERSION = 10
LOCK_SECONDS = 10.0
"""How long another writer may hold the database. Nix's own transactions last some 10 ms."""

_SCHEMA = (
    """create table if not exists ValidPaths (
    id               integer primary key autoincrement not null,
    path             text unique not null,
    hash             text not null,
    registrationTime integer not null,
    deriver          text,
    narSize          integer,
    ultimate         integer,
    sigs             text,
    ca               text
)""",
    """create table if not exists Refs (
    referrer  integer not null,
    reference integer not null,
    primary key (referrer, reference),
    foreign key (referrer) references ValidPaths(id) on delete cascade,
    foreign key (reference) references ValidPaths(id) on delete restrict
)""",
    "create index if not exists IndexReferrer on Refs(referrer)",
    "create index if not exists IndexReference on Refs(reference)",
    # a path that refers to itself could not be deleted else
    """create trigger if not exists DeleteSelfRefs before delete on ValidPaths
  begin
    delete from Refs where referrer = old.id and reference = old.id;
  end""",
    """create table if not exists DerivationOutputs (
    drv  integer not null,
    id   text not null,
    path text not null,
    primary key (drv, id),
    foreign key (drv) references ValidPaths(id) on delete cascade
)""",
    "create index if not exists IndexDerivationOutputs on DerivationOutputs(path)",
)


@dataclass(frozen=True, slots=True)
class Registration:
    """A valid path, as Nix's database knows it. ``nar_size`` in bytes; ``deriver``: base name; ``signatures``:
    "key name:base64"; ``outputs``: of a ``.drv`` file, (name, path) of those known before the build, else None."""

    path: StorePath
    nar_hash: Hash
    nar_size: int
    references: tuple[StorePath, ...] = ()
    deriver: str | None = None
    signatures: tuple[str, ...] = ()
    ca: str | None = None
    outputs: tuple[tuple[str, StorePath], ...] | None = None


def registration(path_info: PathInfo, derivation_text: bytes | None = None) -> Registration:
    """The row of a verified path. ``derivation_text``: a ``.drv``'s content, which ``fill`` needs; FormatError when it is none."""
    info = path_info.info
    outputs = None
    if derivation_text is not None:
        outputs = derivation.parse_outputs(derivation_text, store_dir=info.store_dir)
    return Registration(
        path=info.store_path,
        nar_hash=info.nar_hash,
        nar_size=info.nar_size,
        references=info.references,
        deriver=info.deriver or None,
        signatures=info.signatures,
        ca=info.ca or None,
        outputs=outputs,
    )


def fill(
    state_dir: Path,
    rows: Iterable[Registration],
    *,
    now: int,
    store_dir: str = DEFAULT_STORE_DIR,
    lock_seconds: float = LOCK_SECONDS,
) -> int:
    """Makes the paths valid for a Nix whose state is in ``state_dir`` (Nix's NIX_STATE_DIR); how many were not valid before.

    They are also held against its garbage collector. ``now``: registration time, seconds since 1970. Rows may come in any order. A path that is valid already keeps its row.
    Nothing is changed when it fails: HashMismatchError when a path is valid with another hash; NotFoundError when a
    reference has no row; VeneerError when a ``.drv`` comes without outputs, and when the database has another schema, is
    locked for ``lock_seconds``, is damaged, cannot be written or finds no space.
    """
    wanted = _distinct(rows, store_dir)
    schema = state_dir / "db" / "schema"
    new_store = _is_new(schema)
    file = state_dir / "db" / "db.sqlite"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _errors_told(file, lock_seconds), _transaction(file, lock_seconds) as db:
            if new_store:
                for statement in _SCHEMA:
                    db.execute(statement)
            count = _insert(db, wanted, now, store_dir)
        if new_store:
            _write_whole(schema, str(SCHEMA_VERSION))
        _hold(state_dir / "gcroots" / "veneer", wanted, store_dir)
    except OSError as error:
        raise VeneerError(
            f"cannot write Nix's database: {error.strerror}", where=error.filename or str(file)
        ) from error
    return count


def _distinct(rows: Iterable[Registration], store_dir: str) -> list[Registration]:
    """Each path once. The first error of the rows themselves is raised before the database is touched."""
    found: dict[StorePath, Registration] = {}
    for row in rows:
        if row.path.name.endswith(derivation.SUFFIX) and row.outputs is None:
            raise VeneerError("the outputs of a derivation are not known", where=row.path.absolute(store_dir))
        first = found.setdefault(row.path, row)
        if first.nar_hash != row.nar_hash:
            raise _other_hash(row.path.absolute(store_dir), first.nar_hash, row.nar_hash)
    return list(found.values())


def _insert(db: sqlite3.Connection, rows: Sequence[Registration], now: int, store_dir: str) -> int:
    """First the paths, then what refers to them: so the order does not matter."""
    new = []
    for row in rows:
        path = row.path.absolute(store_dir)
        valid = db.execute("select hash from ValidPaths where path = ?", (path,)).fetchone()
        if valid is not None:
            if Hash.parse(valid[0]) != row.nar_hash:
                raise _other_hash(path, Hash.parse(valid[0]), row.nar_hash)
            continue
        cursor = db.execute(
            "insert into ValidPaths (path, hash, registrationTime, deriver, narSize, sigs, ca) values (?,?,?,?,?,?,?)",
            (
                path,
                row.nar_hash.hex,
                now,
                StorePath.parse(row.deriver).absolute(store_dir) if row.deriver else None,
                row.nar_size or None,
                " ".join(row.signatures) or None,
                row.ca,
            ),
        )
        new.append((cursor.lastrowid, row))
    for number, row in new:
        for reference in dict.fromkeys(row.references):
            added = db.execute(
                "insert into Refs (referrer, reference) select ?, id from ValidPaths where path = ?",
                (number, reference.absolute(store_dir)),
            )
            if added.rowcount == 0:
                where = row.path.absolute(store_dir)
                raise NotFoundError(f"it refers to {reference}, which is not valid here", where=where)
        for name, output in row.outputs or ():
            db.execute(
                "insert into DerivationOutputs (drv, id, path) values (?, ?, ?)",
                (number, name, output.absolute(store_dir)),
            )
    return len(new)


def _hold(directory: Path, rows: Sequence[Registration], store_dir: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    referred = {reference for row in rows for reference in row.references if reference != row.path}
    for row in rows:
        if row.path not in referred:
            with contextlib.suppress(FileExistsError):
                (directory / row.path.basename).symlink_to(row.path.absolute(store_dir))


def _is_new(schema: Path) -> bool:
    """Whether there is no database yet. VeneerError when it has a schema that we do not know."""
    try:
        text = schema.read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return True
    except OSError as error:
        raise VeneerError(f"cannot read Nix's database: {error.strerror}", where=str(schema)) from error
    if text == str(SCHEMA_VERSION):
        return False
    what = f"Nix's database has schema version {text[:20]!r}; only {SCHEMA_VERSION} is known"
    hint = ""
    if text.isdecimal():
        older = int(text) < SCHEMA_VERSION
        hint = "let a newer Nix upgrade it, or use a new environment" if older else "use a new environment"
    raise VeneerError(what, where=str(schema), hint=hint)


@contextlib.contextmanager
def _transaction(file: Path, lock_seconds: float) -> Iterator[sqlite3.Connection]:
    """All or nothing. The journal's mode is Nix's choice."""
    with contextlib.closing(sqlite3.connect(file, timeout=lock_seconds, isolation_level=None)) as db:
        db.execute("pragma foreign_keys = on")
        db.execute("begin immediate")
        try:
            yield db
            db.execute("commit")
        finally:
            if db.in_transaction:
                db.execute("rollback")


@contextlib.contextmanager
def _errors_told(file: Path, lock_seconds: float) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
        where = str(file)
        match code:
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                what = f"another process has held Nix's database for {lock_seconds:g} s"
                told = VeneerError(what, where=where, hint="wait until Nix in this environment is done")
            case sqlite3.SQLITE_FULL:
                told = VeneerError("no space left for Nix's database", where=where, hint="make room")
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                hint = "use a new environment; what was built in this one is in its upper layer"
                told = VeneerError(f"Nix's database is damaged: {error}", where=where, hint=hint)
            case _:
                told = VeneerError(f"cannot write Nix's database: {error}", where=where)
        raise told from error


def _other_hash(path: str, first: Hash, second: Hash) -> HashMismatchError:
    return HashMismatchError(
        f"a path is valid with another content: its hash is {first}, that of the cache {second}",
        where=path,
        hint="it was built or copied here: delete it with nix-store --delete, or use a new environment",
    )


def _write_whole(file: Path, text: str) -> None:
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        draft.write_text(text)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
