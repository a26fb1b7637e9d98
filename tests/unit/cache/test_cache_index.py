from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.caches import NAR_SIZE, nar_hash, store_path
from veneer.cache.chunk_maps import ChunkMap, ChunkMaps
from veneer.cache.database import DamagedIndexError, damage_mark
from veneer.cache.index import BASES, Index, NarinfoRow, NarState, PathRow, Totals, TreeState
from veneer.cache.migrations import SCHEMA_VERSION, migrate
from veneer.formats.chunk_map import place_chunks
from veneer.model.errors import CacheError

URL = "https://cache.example"
OTHER = "https://other.example"
PART = "0" * 32


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "index.sqlite"


@pytest.fixture
def index(file: Path) -> Iterator[Index]:
    with closing(Index(file)) as opened:
        yield opened


def add(index: Index, which: int, now: float = 1.0) -> PathRow:
    return index.add_path(store_path(which), nar_hash(which), NAR_SIZE, now)


def test_narinfo_never_asked_and_answered_none_are_different(index: Index) -> None:
    assert index.narinfo(URL, PART) is None
    index.put_narinfo(URL, PART, None, 5.0)
    assert index.narinfo(URL, PART) == NarinfoRow(None, 5.0)
    index.put_narinfo(URL, PART, b"StorePath: x\n", 6.0)
    assert index.narinfo(URL, PART) == NarinfoRow(b"StorePath: x\n", 6.0)
    assert index.totals().narinfos == 1


def test_narinfo_answers_are_kept_per_source(index: Index) -> None:
    index.put_narinfo(URL, PART, b"a", 1.0)
    index.put_narinfo(OTHER, PART, None, 2.0)
    assert index.narinfo(URL, PART) == NarinfoRow(b"a", 1.0)
    assert index.narinfo(OTHER, PART) == NarinfoRow(None, 2.0)
    assert index.narinfo("https://third.example", PART) is None


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1000])
def test_narinfos_in_bulk_are_the_same_as_one_by_one(index: Index, count: int) -> None:
    parts = [f"{i:032d}" for i in range(count)]
    for i, part in enumerate(parts):
        if i % 3:
            index.put_narinfo(URL, part, None if i % 2 else part.encode(), float(i))
    found = index.narinfos(URL, parts)
    assert found == {part: row for part in parts if (row := index.narinfo(URL, part)) is not None}
    assert index.narinfos(OTHER, parts) == {}


def test_only_old_negative_answers_are_forgotten(index: Index) -> None:
    index.put_narinfo(URL, "1" * 32, None, 1.0)
    index.put_narinfo(URL, "2" * 32, None, 9.0)
    index.put_narinfo(URL, "3" * 32, b"kept", 1.0)
    index.put_listing_absent(URL, "1" * 32, 1.0)
    index.put_listing_absent(URL, "2" * 32, 9.0)
    assert index.forget_negative(5.0) == 2
    assert index.forget_negative(5.0) == 0
    assert index.narinfo(URL, "1" * 32) is None
    assert index.narinfo(URL, "2" * 32) == NarinfoRow(None, 9.0)
    assert index.narinfo(URL, "3" * 32) == NarinfoRow(b"kept", 1.0)
    assert index.listing_absent(URL, "1" * 32) is None
    assert index.listing_absent(URL, "2" * 32) == 9.0
    assert index.totals().narinfos == 2


def test_remembered_answers_are_there_after_flush_and_reopening(file: Path) -> None:
    with closing(Index(file)) as index:
        index.put_narinfo(URL, PART, b"a", 1.0)
        index.flush()
        with closing(sqlite3.connect(file)) as outside:
            assert outside.execute("SELECT body FROM narinfos").fetchone() == (b"a",)
    with closing(Index(file)) as index:
        assert index.narinfo(URL, PART) == NarinfoRow(b"a", 1.0)
        assert index.totals().narinfos == 1


def test_many_remembered_answers_are_committed_without_flush(file: Path, index: Index) -> None:
    for i in range(5000):
        index.put_narinfo(URL, f"{i:032d}", b"a", 1.0)
    with closing(sqlite3.connect(file)) as outside:
        assert outside.execute("SELECT count(*) FROM narinfos").fetchone()[0] >= 4000


def test_new_index_starts_at_a_random_number_in_range(tmp_path: Path) -> None:
    numbers = set()
    for i in range(5):
        with closing(Index(tmp_path / f"{i}.sqlite")) as index:
            numbers.add(add(index, 1).number)
    assert len(numbers) == 5
    assert all(BASES[0] <= number < BASES[1] for number in numbers)


@pytest.mark.parametrize("random", [b"\0" * 8, b"\xff" * 8])
def test_extreme_random_bytes_keep_numbers_in_range(file: Path, random: bytes) -> None:
    with closing(Index(file, random_bytes=lambda n: (random * n)[:n])) as index:
        assert BASES[0] <= add(index, 1).number < BASES[1]


def test_adding_a_known_path_gives_its_number_again(index: Index) -> None:
    first = add(index, 1)
    assert add(index, 1) == first
    assert add(index, 2).number == first.number + 1
    assert index.path(first.number) == first
    assert index.path_of(store_path(1), nar_hash(1)) == first
    assert index.path_of(store_path(1), nar_hash(2)) is None
    assert index.path(first.number + 9) is None


def test_two_hashes_of_one_store_path_are_two_paths(index: Index) -> None:
    first = add(index, 1)
    second = index.add_path(store_path(1), nar_hash(2), NAR_SIZE, 1.0)
    assert first.number != second.number
    assert index.path_of(store_path(1), nar_hash(2)) == second


def test_replaced_path_gets_a_new_number_and_the_old_one_is_retired(index: Index) -> None:
    old = add(index, 1)
    index.set_tree(old.number, TreeState.LISTED, 100)
    new = index.replace_path(old.number, 2.0)
    assert (new.store_path, new.nar_hash, new.tree) == (old.store_path, old.nar_hash, TreeState.NONE)
    retired = index.path(old.number)
    assert retired is not None and retired.quarantined
    assert index.path_of(old.store_path, old.nar_hash) == new
    assert index.replace_path(old.number, 3.0) == new  # told twice, done once
    assert index.retired(10) == [(old.number, old.store_path)]


def test_numbers_are_durable_when_given_out(file: Path, index: Index) -> None:
    given = add(index, 1)
    with closing(sqlite3.connect(file)) as outside:
        assert outside.execute("SELECT max(number) FROM paths").fetchone() == (given.number,)


def test_numbers_go_on_after_reopening(file: Path) -> None:
    with closing(Index(file)) as index:
        last = add(index, 1).number
        generation = index.generation
    with closing(Index(file)) as index:
        assert add(index, 2).number == last + 1
        assert index.generation == generation and len(generation) == 16


def test_quarantine_bars_one_source_and_only_for_its_time(index: Index) -> None:
    path = add(index, 1)
    index.quarantine(path.number, "NAR hash differs", URL, until=100.0, now=10.0)
    assert index.quarantined(path.store_path, path.nar_hash, URL, 99.0) == "NAR hash differs"
    assert index.quarantined(path.store_path, path.nar_hash, OTHER, 99.0) is None
    assert index.quarantined(path.store_path, nar_hash(2), URL, 99.0) is None
    assert index.quarantined(path.store_path, path.nar_hash, URL, 100.0) is None
    assert index.quarantines(50.0) == [(path.store_path, URL, "NAR hash differs", 100.0)]
    assert index.path_of(path.store_path, path.nar_hash) == path


def test_touch_is_written_at_flush_and_never_goes_back(file: Path) -> None:
    with closing(Index(file)) as index:
        number = add(index, 1, now=10.0).number
        index.touch([(number, 50.0), (number, 40.0)])
        index.flush()
        index.touch([(number, 30.0), (number + 5, 1.0)])
    with closing(Index(file)) as index:
        found = index.path(number)
        assert found is not None and found.last_used == 50.0


def test_pins_are_replaced_by_name(index: Index) -> None:
    index.pin("ci", [store_path(1), store_path(2), store_path(1)])
    index.pin("dev", [store_path(3)])
    index.pin("ci", [store_path(2)])
    assert index.pins() == {"ci": [store_path(2)], "dev": [store_path(3)]}
    index.unpin("ci")
    index.unpin("never pinned")
    assert index.pins() == {"dev": [store_path(3)]}


def test_totals_follow_every_change_and_match_a_recount(file: Path) -> None:
    with closing(Index(file)) as index:
        a, b, c = (add(index, i).number for i in range(3))
        index.set_tree(a, TreeState.LISTED, 100)
        index.set_tree(a, TreeState.CHECKED)
        index.set_tree(b, TreeState.LISTED, 70)
        index.set_nar(a, NarState.WHOLE, 4096)
        index.set_nar(b, NarState.WHOLE, 8192)
        index.set_nar(b, NarState.NONE)
        index.set_nar(c, NarState.WHOLE, 8192)
        assert index.totals() == Totals(3, 2, 2, 12288, 170, 0)
        index.forget_files(trees=[b], nars=[c])
        totals = index.totals()
        assert totals == Totals(3, 1, 1, 4096, 100, 0)
    with closing(Index(file)) as index:
        assert index.totals() == totals


def test_whole_nars_come_least_recently_used_first(index: Index) -> None:
    for i, used in enumerate([30.0, 10.0, 20.0]):
        index.set_nar(add(index, i, now=used).number, NarState.WHOLE, 4096)
    add(index, 9, now=1.0)
    index.touch([(add(index, 1).number, 99.0)])
    assert [row.store_path for row in index.nars()] == [store_path(2), store_path(0), store_path(1)]


def test_a_file_written_anew_while_syncing_stays_unsynced(index: Index) -> None:
    number = add(index, 1).number
    index.set_nar(number, NarState.WHOLE, 4096)
    batch = index.unsynced()
    index.set_nar(number, NarState.NONE)
    assert index.unsynced() == []
    index.set_nar(number, NarState.WHOLE, 4096)
    index.mark_synced(batch)
    assert [file.number for file in index.unsynced()] == [number]
    index.mark_synced(index.unsynced())
    assert index.unsynced() == []


def test_unknown_number_is_an_error_of_the_cache(index: Index) -> None:
    with pytest.raises(CacheError, match="no path has the number 77"):
        index.set_tree(77, TreeState.LISTED, 1)
    index.put_narinfo(URL, PART, b"x", 1.0)  # and the index goes on
    index.flush()


def test_garbage_file_is_told_apart_from_other_failures(file: Path) -> None:
    file.write_bytes(b"not a database " * 1000)
    with pytest.raises(DamagedIndexError, match="damaged"):
        Index(file)
    assert damage_mark(file).exists()


def test_damage_found_while_running_is_left_for_the_next_start(file: Path) -> None:
    with closing(Index(file)) as index:
        for i in range(300):
            index.put_narinfo(URL, f"{i:032d}", b"x" * 3000, 1.0)
    with open(file, "r+b") as raw:
        size = raw.seek(0, 2)
        raw.seek(4096 * 16)
        raw.write(b"\xa5" * (size - 4096 * 16))
    index = Index(file)
    with pytest.raises(DamagedIndexError, match="restart"):
        for i in range(300):
            index.narinfo(URL, f"{i:032d}")
    index.abandon()
    with pytest.raises(DamagedIndexError):
        Index(file)


def test_newer_schema_is_refused_and_left_alone(file: Path) -> None:
    Index(file).close()
    with closing(sqlite3.connect(file)) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(CacheError, match="newer Veneer") as caught:
        Index(file)
    assert "upgrade" in caught.value.hint
    with closing(sqlite3.connect(file)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION + 1,)


def test_migration_steps_run_once_and_a_failing_one_leaves_the_old_schema(file: Path) -> None:
    first = ("CREATE TABLE a (x)",)
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        assert migrate(db, "here", (first,)) == 0
        with pytest.raises(sqlite3.OperationalError):
            migrate(db, "here", (first, ("CREATE TABLE b (x)", "nonsense")))
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("a",)]
        assert migrate(db, "here", (first, ("CREATE TABLE b (x)",))) == 1
        assert db.execute("PRAGMA user_version").fetchone() == (2,)


def test_index_file_is_readable_by_its_owner_only(file: Path, index: Index) -> None:
    index.put_narinfo(URL, PART, b"x", 1.0)
    index.flush()
    assert {f.stat().st_mode & 0o777 for f in file.parent.iterdir()} == {0o600}


def test_a_read_answers_in_microseconds_with_many_rows(index: Index) -> None:
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    for i in range(20_000):
        index.put_narinfo(URL, f"{i:032d}", b"x" * 100, 1.0)
    index.database.connection.set_progress_handler(count, 1)  # SQLite's own instructions: no clock, no noise
    index.narinfo(URL, f"{777:032d}")
    assert steps < 50


def test_the_chunks_of_a_retired_number_are_forgotten_and_others_are_found_by_digest(index: Index) -> None:
    maps = ChunkMaps(index)
    chunks = place_chunks([(10, 20, bytes([i]) * 32) for i in range(3)])
    numbers = []
    for i, mine in enumerate((chunks, chunks[:2])):
        row = index.add_path(store_path(i), nar_hash(i), sum(c.size for c in mine), 1.0)
        maps.put(row.number, ChunkMap("source", "url", "zstd", mine))
        numbers.append(row.number)
    assert maps.elsewhere(numbers[0]) == []  # the other one has no file
    index.set_nar(numbers[1], NarState.WHOLE, 4096)
    assert maps.elsewhere(numbers[0]) == [0, 1]
    index.replace_path(numbers[1], 2.0)
    assert maps.elsewhere(numbers[0]) == []
    assert maps.get(numbers[1]) is None
    assert maps.get(numbers[0]) is not None
