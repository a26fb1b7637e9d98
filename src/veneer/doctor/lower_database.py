"""Nix's database of a lower store that is a directory, compared with its files. Only read, and only when nobody writes."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from veneer.doctor.finding import Result
from veneer.model.errors import FormatError
from veneer.model.store_path import StorePath


def examine(store_dir: Path) -> Result:
    """Of a lower store that is a directory: readable, and not behind its files."""
    file = Path(str(store_dir).removesuffix("/store")) / "var/nix/db/db.sqlite"
    fill = "copy with `nix copy --to STORE`, or nix-store --load-db: files alone are no valid paths"
    try:
        # Reading what is not checkpointed would write beside the file, which a check must not do.
        if Path(f"{file}-wal").stat().st_size:
            return Result("skipped", f"{file} is being written to")
    except OSError:
        pass
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?immutable=1", uri=True)) as db:
            valid = {row[0].rpartition("/")[2] for row in db.execute("SELECT path FROM ValidPaths")}
    except sqlite3.Error as error:
        return Result("failed", f"the lower store's database cannot be read: {error}: {file}", fill)
    try:
        there = {entry.name for entry in store_dir.iterdir()}
    except OSError as error:
        return Result(
            "failed", f"{store_dir} cannot be listed: {error.strerror}", "is the lower store mounted?"
        )
    unknown = sorted(name for name in there - valid if is_store_path(name))
    gone = sorted(valid - there) if there else []
    if unknown:
        return Result(
            "failed",
            f"{len(unknown)} paths of {store_dir} are not in its database, such as {unknown[0]}",
            fill,
        )
    if gone:
        fix = "a lower store must not change beneath an overlay: bring the files back"
        return Result(
            "failed", f"{len(gone)} paths are in the database and not in {store_dir}, such as {gone[0]}", fix
        )
    return Result("ok", f"{len(valid)} valid paths")


def is_store_path(name: str) -> bool:
    try:
        StorePath.parse(name)
    except FormatError:
        return False
    return True
