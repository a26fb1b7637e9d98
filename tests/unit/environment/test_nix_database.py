"""Nix's database filled by us; what real Nix makes of it is in tests/integration/test_nix_filled_database.py."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from veneer.environment.nix.database import Registration, fill, registration
from veneer.model.errors import FormatError, HashMismatchError, NotFoundError, VeneerError
from veneer.model.hashes import Hash
from veneer.model.path_info import PathInfo, UnverifiedPathInfo
from veneer.model.store_path import StorePath


def path(letter: str, name: str = "it") -> StorePath:
    return StorePath(letter * 32, name)


def row(letter: str, *references: str, name: str = "it") -> Registration:
    nar_hash = Hash("sha256", letter.encode() * 32)
    return Registration(path(letter, name), nar_hash, 120, tuple(path(other) for other in references))


def query(state: Path, sql: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(state / "db" / "db.sqlite")) as db:
        return db.execute(sql).fetchall()


def references(state: Path) -> set[tuple[str, str]]:
    found = query(
        state,
        "select a.path, b.path from Refs join ValidPaths a on a.id = referrer join ValidPaths b on b.id = reference",
    )
    return {(a.removeprefix("/nix/store/")[0], b.removeprefix("/nix/store/")[0]) for a, b in found}


@contextlib.contextmanager
def held(state: Path) -> Iterator[None]:
    """Another process writes."""
    with contextlib.closing(sqlite3.connect(state / "db" / "db.sqlite", isolation_level=None)) as db:
        db.execute("begin immediate")
        yield


def test_all_that_nix_keeps_of_a_path_is_written(tmp_path: Path) -> None:
    info = UnverifiedPathInfo(
        store_path=path("a"),
        url="nar/x.nar",
        compression="none",
        nar_hash=Hash("sha256", b"a" * 32),
        nar_size=120,
        deriver=f"{path('b', 'it.drv')}",
        signatures=("one:AA==", "two:BB=="),
        ca="fixed:r:sha256:x",
    )
    assert fill(tmp_path, [registration(PathInfo(info, ("one",)))], now=77) == 1
    columns = "path, hash, registrationTime, deriver, narSize, ultimate, sigs, ca"
    assert query(tmp_path, f"select {columns} from ValidPaths") == [
        (
            f"/nix/store/{path('a')}",
            "sha256:" + "61" * 32,
            77,
            f"/nix/store/{path('b', 'it.drv')}",
            120,
            None,
            "one:AA== two:BB==",
            "fixed:r:sha256:x",
        )
    ]
    assert (tmp_path / "db" / "schema").read_text() == "10"


def test_what_is_unknown_is_null(tmp_path: Path) -> None:
    fill(tmp_path, [replace(row("a"), nar_size=0)], now=1)
    assert query(tmp_path, "select deriver, narSize, sigs, ca from ValidPaths") == [(None, None, None, None)]


def test_order_does_not_matter(tmp_path: Path) -> None:
    fill(tmp_path, [row("a", "b"), row("b", "c", "b"), row("c", "a")], now=1)
    assert references(tmp_path) == {("a", "b"), ("b", "c"), ("b", "b"), ("c", "a")}


def test_another_store_directory(tmp_path: Path) -> None:
    fill(tmp_path, [row("a", "a")], now=1, store_dir="/other/place")
    assert query(tmp_path, "select path from ValidPaths") == [(f"/other/place/{path('a')}",)]


def test_valid_paths_keep_their_rows(tmp_path: Path) -> None:
    assert fill(tmp_path, [row("a"), row("b", "a"), row("a")], now=1) == 2
    assert fill(tmp_path, [row("b", "a"), row("c", "b"), row("a")], now=2) == 1
    found = query(tmp_path, "select path, registrationTime from ValidPaths order by path")
    assert [(text[11], time) for text, time in found] == [("a", 1), ("b", 1), ("c", 2)]


def test_another_hash_is_refused_and_nothing_written(tmp_path: Path) -> None:
    fill(tmp_path, [row("a")], now=1)
    other = replace(row("a"), nar_hash=Hash("sha256", b"z" * 32))
    with pytest.raises(HashMismatchError) as caught:
        fill(tmp_path, [row("b"), other], now=2)
    assert str(row("a").nar_hash) in str(caught.value)
    assert str(other.nar_hash) in str(caught.value)
    assert len(query(tmp_path, "select * from ValidPaths")) == 1


def test_two_hashes_for_one_path_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HashMismatchError):
        fill(tmp_path, [row("a"), replace(row("a"), nar_hash=Hash("sha256", b"z" * 32))], now=2)
    assert not list(tmp_path.iterdir())


def test_a_reference_without_a_row_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=str(path("x"))):
        fill(tmp_path, [row("a"), row("b", "x")], now=1)
    fill(tmp_path, [], now=1)
    assert query(tmp_path, "select * from ValidPaths") == []


def test_a_failed_first_call_can_be_repeated(tmp_path: Path) -> None:
    """The tables are there, the schema file is not."""
    fill(tmp_path, [row("a")], now=1)
    (tmp_path / "db" / "schema").unlink()
    assert fill(tmp_path, [row("a"), row("b")], now=1) == 1
    assert (tmp_path / "db" / "schema").read_text() == "10"


def test_what_nothing_refers_to_is_a_root(tmp_path: Path) -> None:
    for _ in range(2):
        fill(tmp_path, [row("a", "b", "a"), row("b"), row("c")], now=1)
    roots = {root.name: str(root.readlink()) for root in (tmp_path / "gcroots" / "veneer").iterdir()}
    assert roots == {f"{path(letter)}": f"/nix/store/{path(letter)}" for letter in "ac"}


def test_derivations_bring_their_outputs(tmp_path: Path) -> None:
    derivation = replace(row("d", name="it.drv"), outputs=(("out", path("a")), ("dev", path("b"))))
    fill(tmp_path, [derivation], now=1)
    assert query(tmp_path, "select id, path from DerivationOutputs order by id") == [
        ("dev", f"/nix/store/{path('b')}"),
        ("out", f"/nix/store/{path('a')}"),
    ]


def test_a_derivation_without_outputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VeneerError, match="outputs"):
        fill(tmp_path, [row("d", name="it.drv")], now=1)


def test_a_derivation_is_read() -> None:
    info = UnverifiedPathInfo(path("d", "it.drv"), "nar/x.nar", "none", Hash("sha256", b"a" * 32), 120)
    text = f'Derive([("out","/nix/store/{path("a")}","","")],[],[],"x","y",[],[])'.encode()
    assert registration(PathInfo(info, ()), text).outputs == (("out", path("a")),)
    with pytest.raises(FormatError):
        registration(PathInfo(info, ()), b"no derivation")


@pytest.mark.parametrize("version", ["9", "11", "", "ten"])
def test_other_schemas_are_refused(tmp_path: Path, version: str) -> None:
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "schema").write_text(version)
    with pytest.raises(VeneerError, match="schema"):
        fill(tmp_path, [row("a")], now=1)
    assert [file.name for file in (tmp_path / "db").iterdir()] == ["schema"]


def test_a_locked_database_is_an_error_in_time(tmp_path: Path) -> None:
    fill(tmp_path, [row("a")], now=1)
    with held(tmp_path), pytest.raises(VeneerError, match="another process"):
        fill(tmp_path, [row("b")], now=1, lock_seconds=0.05)
    assert fill(tmp_path, [row("b")], now=1) == 1


def test_a_damaged_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    fill(tmp_path, [row("a")], now=1)
    file = tmp_path / "db" / "db.sqlite"
    file.write_bytes(b"damage " * 1000)
    with pytest.raises(VeneerError, match="damaged"):
        fill(tmp_path, [row("b")], now=1)
    assert file.read_bytes() == b"damage " * 1000


def test_a_foreign_hash_in_the_database_is_damage(tmp_path: Path) -> None:
    fill(tmp_path, [row("a")], now=1)
    with contextlib.closing(sqlite3.connect(tmp_path / "db" / "db.sqlite")) as db, db:
        db.execute("update ValidPaths set hash = 'nonsense'")
    with pytest.raises(VeneerError, match="not a hash"):
        fill(tmp_path, [row("a")], now=1)


def test_a_state_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "db").write_text("in the way")
    with pytest.raises(VeneerError, match="cannot"):
        fill(tmp_path, [row("a")], now=1)
