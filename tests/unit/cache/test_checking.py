"""The check of a whole cache: each fault is found, told and dropped, and nothing else is."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.caches import (
    NAR_SIZE,
    Clock,
    add_nar,
    add_row,
    add_tree,
    files,
    nar_bytes,
    open_cache,
    row,
    store_path,
    tree_bytes,
)
from veneer.cache import checking
from veneer.cache.cache import Cache
from veneer.cache.checking import Fault, Finding, Notices, Report, check, check_alone
from veneer.cache.chunk_maps import ChunkMap, ChunkMaps
from veneer.cache.directory import INDEX
from veneer.cache.index import NarState, PathRow, TreeState
from veneer.formats.chunk_map import place_chunks
from veneer.formats.tree_index import nar_file, sparse_file, tree_file
from veneer.model.errors import CacheError, CacheInUseError


def checked(
    cache: Cache, *, drop: bool = True, between: Callable[[], None] = lambda: None, **more: Any
) -> Report:
    """The check in an open cache. ``between``: called before each piece of work, where a daemon does other things."""
    steps = check(cache.root, cache.index, drop=drop, clock=Clock(), **more)
    result = None
    while True:
        try:
            work = steps.send(result)
        except StopIteration as end:
            assert isinstance(end.value, Report)
            return end.value
        between()
        result = work()


def alone(root: Path, *, drop: bool = True) -> Report:
    return check_alone(root, drop=drop, clock=Clock())


def faults(report: Report) -> dict[str, Fault]:
    return {finding.name: finding.fault for finding, _ in report.findings}


def flip(file: Path, at: int) -> None:
    """One wrong byte, size and time as before."""
    times = file.stat()
    file.chmod(0o600)
    with open(file, "r+b") as opened:
        byte = os.pread(opened.fileno(), 1, at)
        os.pwrite(opened.fileno(), bytes([byte[0] ^ 1]), at)
    file.chmod(0o444)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def full(root: Path) -> list[int]:
    """A cache with eight paths, each with tree and NAR; their numbers."""
    with open_cache(root) as cache:
        for which in range(8):
            add_tree(cache, which, state=TreeState.CHECKED)
        return [add_nar(cache, which).number for which in range(8)]


def test_good_cache_is_left_as_it_is(tmp_path: Path) -> None:
    full(tmp_path)
    before = files(tmp_path)
    report = alone(tmp_path)
    assert (report.found, report.nars, report.trees, report.files) == (0, 8, 8, 16)
    assert report.read > 8 * NAR_SIZE
    assert files(tmp_path) == before


def test_each_fault_is_found_and_dropped_alone(tmp_path: Path) -> None:
    flipped, cut, lost, bad_tree, alien, lost_tree, good, linked = full(tmp_path)
    flip(tmp_path / nar_file(flipped), NAR_SIZE - 1)
    os.truncate(tmp_path / nar_file(cut), 100)
    (tmp_path / nar_file(lost)).unlink()
    flip(tmp_path / tree_file(bad_tree), 300)
    (tmp_path / tree_file(alien)).unlink()
    (tmp_path / tree_file(alien)).write_bytes((tmp_path / tree_file(good)).read_bytes())
    (tmp_path / tree_file(lost_tree)).unlink()
    (tmp_path / nar_file(linked)).unlink()
    (tmp_path / nar_file(linked)).symlink_to(tmp_path / nar_file(good))
    (tmp_path / "nars" / "stray").write_text("x")
    (tmp_path / "incoming" / "ffffffffffff.0.nar").write_text("x")
    expected = {
        nar_file(flipped): Fault.WRONG,
        nar_file(cut): Fault.CUT,
        nar_file(lost): Fault.MISSING,
        tree_file(bad_tree): Fault.WRONG,
        tree_file(alien): Fault.WRONG,
        tree_file(lost_tree): Fault.MISSING,
        nar_file(linked): Fault.WRONG,
        "nars/stray": Fault.STRAY,
        "incoming/ffffffffffff.0.nar": Fault.STRAY,
    }
    before = files(tmp_path)
    shown = alone(tmp_path, drop=False)
    assert faults(shown) == expected and files(tmp_path) == before
    report = alone(tmp_path)
    assert faults(report) == expected
    assert (report.found, report.dropped) == (9, 9)
    assert all(dropped for _, dropped in report.findings)
    retired = {flipped, bad_tree, alien, linked}
    with open_cache(tmp_path) as cache:
        assert cache.repaired.files_removed == cache.repaired.rows_reset == 0
        for number in (flipped, cut, lost, bad_tree, alien, lost_tree, good, linked):
            path = row(cache, number)
            assert path.quarantined == (number in retired)
            assert (path.nar is NarState.WHOLE) == (number in {good, lost_tree})
            assert (path.tree is TreeState.CHECKED) == (number in {good, cut, lost})
        again = add_nar(cache, 0)
        assert again.number != flipped
        assert cache.nars.path(again.number).read_bytes() == nar_bytes(0)
    assert alone(tmp_path).found == 0


def test_file_that_a_daemon_evicts_or_fetches_meanwhile_is_no_fault(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        evicted, replaced, begun = (add_nar(cache, i).number for i in range(3))
        flip(cache.nars.path(replaced), 5)
        turns: list[None] = []

        def between() -> None:
            turns.append(None)
            if len(turns) == 2:  # the rows were read, their files not yet
                cache.nars.drop(evicted)

        def busy() -> set[int]:
            if len(turns) == 2:  # they were examined, and not yet dropped
                cache.nars.drop(replaced)
                add_nar(cache, 1)
            return {begun}

        cache.nars.partial(begun).write(b"half")
        report = checked(cache, between=between, busy=busy)
        assert report.found == 0
        assert cache.nars.has(replaced) and files(tmp_path) >= {nar_file(begun) + ".part"}
        assert set(faults(checked(cache))) == {nar_file(begun) + ".part"}


def test_daemon_is_told_what_went_and_what_may_have_been_seen_wrong(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        wrong, cut = (add_nar(cache, i).number for i in range(2))
        flip(cache.nars.path(wrong), 5)
        os.truncate(cache.nars.path(cut), 5)
        dropped: list[Finding] = []
        condemned: list[Finding] = []
        checked(cache, notices=Notices(dropped.append, condemned.append))
        assert [(f.number, f.store_path) for f in condemned] == [(wrong, store_path(0))]
        assert [f.number for f in dropped] == [cut]
        assert cache.index.retired(10) == [(wrong, store_path(0))]
        assert cache.index.totals().nars == 0


def test_retired_numbers_lose_their_files_in_a_check(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        old = add_tree(cache, 1)
        cache.index.replace_path(old.number, 2.0)
        assert faults(checked(cache)) == {tree_file(old.number): Fault.STRAY}
        assert files(tmp_path) == set()
        assert row(cache, old.number).tree is TreeState.NONE


def test_only_the_first_faults_are_shown_and_all_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "SHOWN", 3)
    monkeypatch.setattr(checking, "BATCH", 2)
    for number in full(tmp_path):
        (tmp_path / nar_file(number)).unlink()
    report = alone(tmp_path)
    assert (report.found, report.dropped, len(report.findings)) == (8, 8, 3)


def test_damaged_index_is_begun_anew_with_all_files_gone(tmp_path: Path) -> None:
    full(tmp_path)
    with closing(sqlite3.connect(tmp_path / INDEX)) as db:
        db.execute("PRAGMA writable_schema = ON")
        page = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'paths_live'").fetchone()[0]
        size = db.execute("PRAGMA page_size").fetchone()[0]
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with open(tmp_path / INDEX, "r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\0" * size)
    shown = alone(tmp_path, drop=False)
    assert shown.index_damaged and (shown.found, shown.dropped) == (1, 0)
    assert len(files(tmp_path)) == 16
    report = alone(tmp_path)
    assert report.index_damaged and report.dropped == 1
    assert files(tmp_path) == set()
    assert alone(tmp_path).found == 0


def test_cache_of_a_running_daemon_is_not_checked_behind_its_back(tmp_path: Path) -> None:
    with open_cache(tmp_path), pytest.raises(CacheInUseError):
        alone(tmp_path)


def test_cache_of_a_newer_schema_is_neither_read_nor_changed(tmp_path: Path) -> None:
    full(tmp_path)
    with closing(sqlite3.connect(tmp_path / INDEX)) as db:
        db.execute("PRAGMA user_version = 999")
    before = files(tmp_path)
    with pytest.raises(CacheError, match="newer") as caught:
        alone(tmp_path)
    assert "upgrade" in caught.value.hint
    assert files(tmp_path) == before


def test_tree_of_another_index_is_found(tmp_path: Path) -> None:
    with open_cache(tmp_path / "a") as first, open_cache(tmp_path / "b") as other:
        path = add_row(first, 1)
        foreign = tree_bytes(other, path)
        first.trees.publish(path.number, foreign, TreeState.LISTED)
        report = checked(first)
        assert [(f.fault, f.reason) for f, _ in report.findings] == [
            (Fault.WRONG, "it belongs to another index")
        ]


def add_sparse(cache: Cache, which: int) -> PathRow:
    """A path of which the first and the last of three chunks are there."""
    path = add_row(cache, which)
    data, third = nar_bytes(which), NAR_SIZE // 3 + 1
    pieces = [data[at : at + third] for at in range(0, NAR_SIZE, third)]
    chunks = place_chunks([(len(p), len(p), hashlib.sha256(p).digest()) for p in pieces], 0)
    ChunkMaps(cache.index).put(path.number, ChunkMap("https://cache.example", "nar/1", "none", chunks))
    sparse = cache.nars.sparse(path.number, chunks, None)
    for ordinal in (0, 2):
        sparse.write(ordinal, pieces[ordinal])
    sparse.landed([0, 2])
    cache.index.set_nar(path.number, NarState.SPARSE, sparse.disk_size, bytes(sparse.present))
    sparse.finish()
    return row(cache, path.number)


def test_of_a_sparse_nar_the_chunks_that_are_there_are_checked(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        sound, flipped = add_sparse(cache, 1).number, add_sparse(cache, 2).number
        assert checked(cache).found == 0
        flip(tmp_path / sparse_file(sound), NAR_SIZE // 2)  # in the hole
        flip(tmp_path / sparse_file(flipped), NAR_SIZE - 1)
        report = checked(cache)
        assert faults(report) == {sparse_file(flipped): Fault.WRONG}
        assert report.dropped == 1
        assert files(tmp_path) == {sparse_file(sound)}
        assert row(cache, sound).nar is NarState.SPARSE
        assert row(cache, flipped).nar is NarState.NONE
