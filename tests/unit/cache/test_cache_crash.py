"""The daemon is killed (SIGKILL) at every step of writing in turn; then the cache is opened again."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.caches import (
    Clock,
    add_nar,
    add_row,
    add_tree,
    files,
    nar_bytes,
    open_cache,
    row,
    tree_bytes,
    verified,
)
from veneer.cache.cache import Cache
from veneer.cache.index import NarState, TreeState
from veneer.cache.recovery import scan
from veneer.formats.tree_index import TreeIndex, nar_file, tree_file

GivenOut = Callable[[int, str], None]


def work(root: Path, fault: Callable[[str], None], given_out: GivenOut) -> None:
    """Every kind of write once. ``given_out``: told each number as a mount server would be."""
    cache = Cache.open(root, clock=Clock(), boot_id=lambda: "boot", fault=fault)
    for which in range(3):
        cache.index.put_narinfo("https://cache.example", f"{which:032d}", b"x" * 500, 1.0)
        path = add_tree(cache, which)
        given_out(path.number, path.store_path.basename)
        add_nar(cache, which)
    partial = cache.nars.partial(add_row(cache, 5).number)
    partial.write(nar_bytes(5))
    cache.nars.admit(partial.number, verified(partial, 5))
    old = add_tree(cache, 6)
    given_out(old.number, old.store_path.basename)
    new = cache.index.replace_path(old.number, 2.0)
    given_out(new.number, new.store_path.basename)
    cache.trees.drop(old.number)
    cache.trees.publish(new.number, tree_bytes(cache, new), TreeState.CHECKED)
    cache.index.pin("ci", [new.store_path])
    cache.nars.drop(partial.number)
    cache.evict(max_bytes=20_000)
    batch = cache.begin_sync()
    batch.run()
    cache.end_sync(batch)
    unfinished = cache.nars.incoming(new.number)
    unfinished.write(b"half")
    fault("work.unfinished")
    cache.close()


def steps_of_work(root: Path) -> list[str]:
    steps: list[str] = []
    work(root, steps.append, lambda number, name: None)
    return steps


def killed_at(root: Path, last: int) -> list[tuple[int, str]]:
    """Runs ``work`` in a child that kills itself at step ``last``; returns the numbers it gave out."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            done = 0

            def fault(step: str) -> None:
                nonlocal done
                if done == last:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1

            work(root, fault, lambda number, name: _tell(writing, number, name))
        finally:
            os._exit(1)  # also when the work fails: the parent expects a kill
    os.close(writing)
    with open(reading, encoding="ascii") as told:
        lines = told.read().splitlines()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return [(int(number), name) for number, name in (line.split() for line in lines)]


def _tell(fd: int, number: int, name: str) -> None:
    os.write(fd, f"{number} {name}\n".encode())


def assert_agreeing(cache: Cache) -> None:
    """Every row's file is there and whole, and there is no other file."""
    wanted = set()
    for row_of_files in cache.index.with_files():
        path = row(cache, row_of_files.number)
        assert not path.quarantined
        if path.nar is NarState.WHOLE:
            wanted.add(nar_file(path.number))
            content = cache.nars.path(path.number).read_bytes()
            hasher = path.nar_hash.hasher()
            hasher.update(content)
            assert (len(content), hasher.digest()) == (path.nar_size, path.nar_hash.digest)
        if path.tree is not TreeState.NONE:
            wanted.add(tree_file(path.number))
            tree = TreeIndex(cache.trees.path(path.number).read_bytes())
            tree.verify()
            assert tree.number == path.number
    assert {file.name for file in scan(cache.root)} == wanted == files(cache.root)


def test_every_step_of_the_work_is_seen(tmp_path: Path) -> None:
    assert {
        "index.path_added", "index.path_replaced", "index.before_commit",
        "nar.before_rename", "nar.renamed", "nar.recorded", "nar.unlinked",
        "tree.before_rename", "tree.renamed", "tree.recorded", "tree.unlinked",
        "evict.unlinked",
    } <= set(steps_of_work(tmp_path))  # fmt: skip


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_killed_at_any_step_only_whole_files_and_rows_are_left(tmp_path: Path) -> None:
    steps = steps_of_work(tmp_path / "counted")
    assert len(steps) > 30
    for last in range(len(steps)):
        root = tmp_path / f"{last}"
        given_out = killed_at(root, last)
        with open_cache(root, boot="boot") as cache:
            assert_agreeing(cache)
            for number, name in given_out:
                path = cache.index.path(number)
                assert path is not None and path.store_path.basename == name, steps[last]
            fresh = add_nar(cache, 99)
            assert fresh.number not in dict(given_out)
            work_again = add_nar(cache, 1)
            assert work_again.nar is NarState.WHOLE
            assert_agreeing(cache)
        with closing(sqlite3.connect(root / "index.sqlite")) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_killed_in_recovery_the_next_start_finishes_it(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        numbers = [add_nar(cache, i).number for i in range(3)]
        cache.nars.path(numbers[0]).unlink()
        (tmp_path / "nars" / "stray").write_text("x")
        (tmp_path / "incoming" / "stray").write_text("x")

    class Killed(BaseException):
        pass

    def fault(step: str) -> None:
        raise Killed

    with pytest.raises(Killed):
        Cache.open(tmp_path, clock=Clock(), boot_id=lambda: "boot-1", fault=fault)
    with open_cache(tmp_path) as cache:
        assert_agreeing(cache)
        assert cache.index.totals().nars == 2
