from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from tests.support.caches import (
    Clock,
    add_nar,
    add_row,
    add_tree,
    files,
    open_cache,
    row,
    tree_bytes,
)
from veneer.cache.cache import Repaired
from veneer.cache.index import FileRow, NarState, TreeState, Unsynced
from veneer.cache.recovery import FoundFile, Rehash, Remove, Reset, plan
from veneer.formats.tree_index import nar_file, tree_file
from veneer.model.errors import CacheError


def a_row(number: int, *, tree: int = 0, nar: int = 0, quarantined: bool = False) -> FileRow:
    return FileRow(number, int(tree != 0), int(nar != 0), tree, 100, quarantined)


def nar(number: int, size: int = 100) -> FoundFile:
    return FoundFile(nar_file(number), size)


def test_plan_is_empty_when_rows_and_files_agree() -> None:
    assert plan([a_row(1, nar=1, tree=50)], [nar(1), FoundFile(tree_file(1), 50)]) == []


def test_plan_removes_files_that_no_row_wants() -> None:
    strays = ["incoming/x.nar", nar_file(1) + ".part", nar_file(2), tree_file(1), "nars/zz/other"]
    steps = plan([a_row(1, nar=1)], [nar(1), *(FoundFile(name, 100) for name in strays)])
    assert steps == [Remove(name) for name in strays]


def test_plan_resets_rows_whose_file_is_missing_or_of_wrong_size() -> None:
    rows = [a_row(1, nar=1, tree=50), a_row(2, nar=1, tree=50)]
    steps = plan(rows, [nar(2, 99), FoundFile(tree_file(2), 51)])
    assert set(steps) == {
        Reset(1, "nar"),
        Reset(1, "tree"),
        Reset(2, "nar"),
        Reset(2, "tree"),
        Remove(nar_file(2)),
        Remove(tree_file(2)),
    }


def test_plan_empties_retired_numbers() -> None:
    assert plan([a_row(1, nar=1, quarantined=True)], [nar(1)]) == [Reset(1, "nar"), Remove(nar_file(1))]


def test_plan_rehashes_the_newest_doubtful_nars_and_drops_what_is_too_much() -> None:
    rows = [a_row(n, nar=1) for n in (1, 2, 3)]
    doubtful = [Unsynced(n, "nar", n) for n in (1, 2, 3, 4)]
    steps = plan(rows, [nar(1), nar(2), nar(3)], doubtful=doubtful, rehash_bytes=200)
    assert steps == [Rehash(3, "nar"), Rehash(2, "nar"), Reset(1, "nar"), Remove(nar_file(1))]


def test_clean_start_finds_nothing_to_do(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        add_nar(cache, 1)
        add_tree(cache, 1)
        totals, before = cache.index.totals(), files(tmp_path)
    with open_cache(tmp_path) as cache:
        assert cache.repaired == Repaired()
        assert (cache.index.totals(), files(tmp_path)) == (totals, before)


def test_leftovers_are_removed_and_rows_reset(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        kept, lost, cut = (add_nar(cache, i).number for i in range(3))
        unnamed = cache.nars.incoming(kept)
        unnamed.write(b"half")
        partial = cache.nars.partial(lost)
        partial.write(b"half")
        cache.nars.path(lost).unlink()
        os.truncate(cache.nars.path(cut), 10)
        (tmp_path / "trees" / "stray").write_text("x")
    with open_cache(tmp_path) as cache:
        assert files(tmp_path) == {nar_file(kept)}
        assert cache.index.totals().nars == 1
        assert row(cache, lost).nar is row(cache, cut).nar is NarState.NONE
        assert (cache.repaired.files_removed, cache.repaired.rows_reset) == (4, 2)


def test_retired_numbers_lose_their_files(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        cache.index.replace_path(add_tree(cache, 1).number, 2.0)
    with open_cache(tmp_path):
        assert files(tmp_path) == set()


def test_foreign_links_are_removed_and_never_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    root = tmp_path / "cache"
    with open_cache(root):
        (root / "nars" / "aa").symlink_to(outside)
        (root / "incoming" / "link").symlink_to(outside / "precious")
    with open_cache(root):
        assert (outside / "precious").exists()
        assert files(root) == set()


def test_after_a_kill_alone_nothing_is_hashed(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        number = add_nar(cache, 1).number
        assert len(cache.index.unsynced()) == 1
    with open_cache(tmp_path) as cache:
        assert cache.repaired.rehashed == 0
        assert cache.nars.has(number)
        assert len(cache.index.unsynced()) == 1  # a power loss may still come


def test_after_power_loss_holes_are_found_and_the_rest_is_kept(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        synced = add_nar(cache, 0).number
        batch = cache.begin_sync()
        batch.run()
        cache.end_sync(batch)
        whole, holey = add_nar(cache, 1).number, add_nar(cache, 2).number
        good, bad = add_tree(cache, 3).number, add_tree(cache, 4).number
        size = row(cache, bad).tree_size
        for file, length in ((cache.nars.path(holey), 10_000), (cache.trees.path(bad), size)):
            file.chmod(0o600)
            file.write_bytes(bytes(length))
    with open_cache(tmp_path, boot="boot-2") as cache:
        assert files(tmp_path) == {nar_file(synced), nar_file(whole), tree_file(good)}
        assert row(cache, holey).nar is NarState.NONE
        assert row(cache, bad).tree is TreeState.NONE
        assert cache.repaired.rehashed == 4
        assert cache.index.unsynced() == []
    with open_cache(tmp_path, boot="boot-2") as cache:
        assert cache.repaired == Repaired()


def test_tree_of_another_path_is_not_believed_after_power_loss(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        first, second = add_tree(cache, 1), add_tree(cache, 2)
        cache.trees.path(second.number).unlink()
        shutil.copy(cache.trees.path(first.number), cache.trees.path(second.number))
    with open_cache(tmp_path, boot="boot-2"):
        assert files(tmp_path) == {tree_file(first.number)}


def test_unknown_boot_counts_as_power_loss(tmp_path: Path) -> None:
    with open_cache(tmp_path, boot="") as cache:
        add_nar(cache, 1)
    with open_cache(tmp_path, boot="") as cache:
        assert cache.repaired.rehashed == 1


def test_what_was_synced_before_a_stop_is_not_hashed(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        for number in range(3):
            add_nar(cache, number)
        turns = iter((True, True, False))
        done = cache.begin_sync().run(lambda: next(turns))
        assert len(done.files) == 2
        cache.end_sync(done)
    with open_cache(tmp_path, boot="boot-2") as cache:
        assert cache.repaired == Repaired(rehashed=1)
        assert cache.index.totals().nars == 3


def test_sync_passes_over_files_dropped_meanwhile(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        number = add_nar(cache, 1).number
        batch = cache.begin_sync()
        cache.nars.drop(number)
        batch.run()
        cache.end_sync(batch)


def test_deleted_index_drops_the_files_and_begins_a_new_generation(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        generation, number = cache.generation, add_nar(cache, 1).number
    for file in tmp_path.glob("index.sqlite*"):
        file.unlink()
    with open_cache(tmp_path) as cache:
        assert cache.generation != generation
        assert files(tmp_path) == set()
        assert add_row(cache, 1).number != number


@pytest.mark.parametrize("damage", ["garbage", "tail", "marked"])
def test_damaged_index_is_moved_aside_and_made_anew(tmp_path: Path, damage: str) -> None:
    clock = Clock()
    with open_cache(tmp_path, clock) as cache:
        generation = cache.generation
        numbers = [add_nar(cache, i, size=10).number for i in range(200)]
    index = tmp_path / "index.sqlite"
    content = index.read_bytes()
    if damage == "garbage":
        index.write_bytes(b"?" * len(content))
    elif damage == "tail":
        index.write_bytes(content[:4096] + b"\xa5" * (len(content) - 4096))
    else:
        index.with_name("index.sqlite.damaged").touch()
    with open_cache(tmp_path, clock) as cache:
        aside = tmp_path / f"index.sqlite.corrupt-{int(clock.now)}"
        assert cache.repaired.moved_aside == aside
        assert aside.exists()
        assert files(tmp_path) == set()
        assert cache.generation != generation
        assert add_row(cache, 1).number not in numbers
    clock.now += 60
    with open_cache(tmp_path, clock) as cache:
        assert cache.repaired.moved_aside is None


def test_only_the_last_damaged_index_is_kept(tmp_path: Path) -> None:
    clock = Clock()
    for _ in range(3):
        clock.now += 60
        (tmp_path / "index.sqlite").write_bytes(b"?" * 8192)
        open_cache(tmp_path, clock).close()
    assert [f.name for f in tmp_path.glob("*corrupt*")] == [f"index.sqlite.corrupt-{int(clock.now)}"]


def test_trees_of_another_format_version_are_dropped(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        path = add_tree(cache, 1)
        nar_number = add_nar(cache, 2).number
        cache.index.set_fact("tree_format", "0")
    with open_cache(tmp_path) as cache:
        assert row(cache, path.number).tree is TreeState.NONE
        assert files(tmp_path) == {nar_file(nar_number)}
        cache.trees.publish(path.number, tree_bytes(cache, path), TreeState.LISTED)
    with open_cache(tmp_path) as cache:
        assert cache.trees.has(path.number)


def test_directory_that_cannot_be_read_is_an_error_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_cache(tmp_path).close()

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "no", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(CacheError, match="Permission denied") as caught:
        open_cache(tmp_path)
    assert "belong to the daemon's user" in caught.value.hint
    monkeypatch.undo()
    open_cache(tmp_path).close()  # the lock was given back


def test_after_power_loss_a_file_that_replaced_a_synced_one_is_not_believed(tmp_path: Path) -> None:
    """The index on the disk may know only the first one, which was synced; the second never was."""
    root = tmp_path / "cache"
    with open_cache(root) as cache:
        number, kept = add_nar(cache, 0).number, add_nar(cache, 1).number
        cache.end_sync(cache.begin_sync().run())
    shutil.copy(root / "index.sqlite", tmp_path / "on-disk")
    with open_cache(root) as cache:
        cache.nars.drop(number)
        add_nar(cache, 0)
    shutil.copy(tmp_path / "on-disk", root / "index.sqlite")
    file = root / nar_file(number)
    file.chmod(0o600)
    file.write_bytes(bytes(file.stat().st_size))
    with open_cache(root, boot="boot-2") as cache:
        assert row(cache, number).nar is NarState.NONE
        assert files(root) == {nar_file(kept)}
        assert cache.repaired.rehashed == 1


def test_sync_does_not_vouch_for_a_file_that_came_meanwhile(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        first, second = add_nar(cache, 0).number, add_nar(cache, 1).number
        asked: list[None] = []

        def go_on() -> bool:
            asked.append(None)
            if len(asked) == 2:  # the first is synced, and not yet marked
                cache.nars.drop(first)
                add_nar(cache, 0)
            return True

        cache.end_sync(cache.begin_sync().run(go_on))
        assert cache.nars.path(second).stat().st_mtime == 1
        assert cache.nars.path(first).stat().st_mtime != 1
        assert [file.number for file in cache.index.unsynced()] == [first]
