"""The index's schema, as steps from one version to the next.

``user_version`` is the number of steps done. Each step runs in one transaction with its new ``user_version``, so that
a crash leaves the old schema or the new one. A step that landed in a release is never changed, only followed.
"""

from __future__ import annotations

import sqlite3

from veneer.model.errors import CacheError

_FIRST = (
    # generation, base, boot, narinfos (their count), tree_format
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID",
    "CREATE TABLE sources (id INTEGER PRIMARY KEY, url TEXT NOT NULL UNIQUE)",
    # body NULL: the source said that it has none. A rowid table: rows of 1 KiB make a bad index b-tree.
    """CREATE TABLE narinfos (
        id INTEGER PRIMARY KEY, source INTEGER NOT NULL REFERENCES sources, hash_part TEXT NOT NULL,
        fetched_at REAL NOT NULL, body BLOB)""",
    "CREATE UNIQUE INDEX narinfos_key ON narinfos (source, hash_part)",
    "CREATE INDEX narinfos_negative ON narinfos (fetched_at) WHERE body IS NULL",
    """CREATE TABLE absent_listings (
        source INTEGER NOT NULL REFERENCES sources, hash_part TEXT NOT NULL, asked_at REAL NOT NULL,
        PRIMARY KEY (source, hash_part)) WITHOUT ROWID""",
    # AUTOINCREMENT is the promise that a number is never used twice, whatever is deleted.
    """CREATE TABLE paths (
        number INTEGER PRIMARY KEY AUTOINCREMENT, hash_part TEXT NOT NULL, name TEXT NOT NULL, nar_hash BLOB NOT NULL,
        nar_size INTEGER NOT NULL, tree INTEGER NOT NULL DEFAULT 0, nar INTEGER NOT NULL DEFAULT 0,
        tree_size INTEGER NOT NULL DEFAULT 0, disk_size INTEGER NOT NULL DEFAULT 0,
        last_used REAL NOT NULL, quarantined INTEGER NOT NULL DEFAULT 0)""",
    "CREATE UNIQUE INDEX paths_live ON paths (hash_part, name, nar_hash) WHERE quarantined = 0",
    "CREATE INDEX paths_whole_nars ON paths (last_used) WHERE nar = 1",
    "CREATE INDEX paths_with_files ON paths (number) WHERE tree <> 0 OR nar <> 0",
    # Files that a power loss may still empty. serial: a file replaced meanwhile is not the one that was synced.
    """CREATE TABLE unsynced (
        number INTEGER NOT NULL, kind TEXT NOT NULL, serial INTEGER NOT NULL,
        PRIMARY KEY (number, kind)) WITHOUT ROWID""",
    """CREATE TABLE quarantines (
        hash_part TEXT NOT NULL, name TEXT NOT NULL, nar_hash BLOB NOT NULL, source TEXT NOT NULL,
        reason TEXT NOT NULL, since REAL NOT NULL, until REAL NOT NULL,
        PRIMARY KEY (hash_part, name, nar_hash, source)) WITHOUT ROWID""",
    """CREATE TABLE pins (
        pin TEXT NOT NULL, basename TEXT NOT NULL, PRIMARY KEY (pin, basename)) WITHOUT ROWID""",
)

_RETIRED = ("CREATE INDEX paths_retired ON paths (number) WHERE quarantined = 1",)

# digest: of a public key, a signature and the bytes that it was found to sign. A fact, whoever asks for it.
_SIGNATURES = ("CREATE TABLE verified_signatures (digest BLOB PRIMARY KEY) WITHOUT ROWID",)

# The chunks of a NAR (``sparse``): the frames of the file that it is fetched from, and the digest of each.
# source, url: that file. base: where its first frame begins. chunks: rows of ``formats.chunk_map``. signatures: lines.
# learnt: the digests are of a NAR that was verified whole. present: a byte per chunk, 1: it is in the sparse file.
_CHUNKS = (
    """CREATE TABLE chunk_maps (
        number INTEGER PRIMARY KEY, source TEXT NOT NULL, url TEXT NOT NULL, compression TEXT NOT NULL,
        base INTEGER NOT NULL, chunks BLOB NOT NULL, signatures TEXT NOT NULL, learnt INTEGER NOT NULL, present BLOB)""",
    # digest: the first 8 bytes, as a number; ordinal: of the chunk in its NAR.
    """CREATE TABLE chunk_places (
        digest INTEGER NOT NULL, number INTEGER NOT NULL, ordinal INTEGER NOT NULL,
        PRIMARY KEY (digest, number, ordinal)) WITHOUT ROWID""",
    "DROP INDEX paths_whole_nars",
    "CREATE INDEX paths_nars ON paths (last_used) WHERE nar <> 0",
)

# Without it, forgetting the chunks of one number would read those of all.
_PLACES = ("CREATE INDEX chunk_places_of ON chunk_places (number)",)

# Paths that were shown as directories when no more of their tree was known than the head of the NAR says.
_DIRECTORIES = ("CREATE TABLE directories (number INTEGER PRIMARY KEY)",)

STEPS: tuple[tuple[str, ...], ...] = (_FIRST, _RETIRED, _SIGNATURES, _CHUNKS, _PLACES, _DIRECTORIES)
SCHEMA_VERSION = len(STEPS)


def migrate(db: sqlite3.Connection, where: str, steps: tuple[tuple[str, ...], ...] = STEPS) -> int:
    """Brings ``db`` (in autocommit mode) to the last version; returns the version found. CacheError: it is newer."""
    found = int(db.execute("PRAGMA user_version").fetchone()[0])
    if found > len(steps):
        raise CacheError(
            f"the cache was written by a newer Veneer (schema {found}, this one knows {len(steps)})",
            where=where,
            hint="upgrade Veneer, or choose another cache directory",
        )
    for version, statements in enumerate(steps[found:], found + 1):
        db.execute("BEGIN IMMEDIATE")
        try:
            for statement in statements:
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {version}")
            db.execute("COMMIT")
        except sqlite3.Error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
    return found
