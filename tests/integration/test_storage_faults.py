"""The cache's disk fails, goes read-only, fills up or disappears, and somebody else has the index: readers and users."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.caches import files
from tests.support.callers import Caller, Probe, eventually
from tests.support.failing_disk import FailingDisk
from tests.support.signed_cache import MadePath, SignedCache, make_path
from veneer.formats.tree_index import nar_file, tree_file

pytestmark = [pytest.mark.root, pytest.mark.fuse]

FIRST, SECOND, THIRD = MADE = [make_path(name, 300_001) for name in ("first", "second", "third")]


@pytest.fixture
def source(tmp_path: Path) -> SignedCache:
    return SignedCache(tmp_path / "source", MADE)


@pytest.fixture
def caller(as_root: Caller, source: SignedCache) -> Caller:
    as_root.use(f"file://{source.directory}", key=source.key)
    return as_root


@pytest.fixture
def disk(caller: Caller) -> Iterator[FailingDisk]:
    """The cache directory lies on a disk that fails as told."""
    with FailingDisk(caller.home / "disk", caller.cache) as disk:
        yield disk
        caller.wait_for_daemons_end()


def verify(caller: Caller, *words: str) -> subprocess.CompletedProcess[str]:
    line = caller.words("cache", "--json", *words, sources=False)
    line.insert(line.index("cache") + 1, "verify")
    return subprocess.run(
        line, env=caller.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


def good(caller: Caller) -> dict[str, Any]:
    """The report of a check that finds nothing."""
    done = verify(caller)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    document = json.loads(done.stdout)
    assert document["found"] == 0
    return dict(document)


def fetched(caller: Caller, *made: MadePath) -> None:
    done = caller.veneer("fetch", *(m.path.basename for m in made))
    assert done.returncode == 0, done.stderr


def read(probe: Probe, target: Path, made: MadePath) -> dict[str, Any]:
    return probe.ask("read", path=f"{target}/{made.path.basename}/data", cold=True)


def is_right(answer: dict[str, Any], made: MadePath) -> bool:
    return "error" not in answer and answer["size"] == len(made.data)


# A disk that cannot be read or written.


def test_unreadable_content_is_an_io_error_until_a_check_has_dropped_it(
    caller: Caller, disk: FailingDisk
) -> None:
    target = caller.home / "mount"
    with caller.mount_probe(target) as probe:
        assert is_right(read(probe, target, FIRST), FIRST)
        disk.fail("read", "nars/*", errno.EIO)
        answer = read(probe, target, FIRST)
        assert (answer["error"], answer["size"]) == ("EIO", 0)
        done = verify(caller)
        report = json.loads(done.stdout)
        assert done.returncode == 1
        assert [(f["kind"], f["fault"], f["dropped"]) for f in report["findings"]] == [
            ("nar", "unreadable", True)
        ]
        assert FIRST.path.basename in caller.stories()
        disk.heal()
        assert is_right(read(probe, target, FIRST), FIRST)
    good(caller)


def test_failing_writes_are_an_io_error_with_a_story_and_leave_nothing(
    caller: Caller, disk: FailingDisk
) -> None:
    target = caller.home / "mount"
    with caller.mount_probe(target) as probe:
        assert is_right(read(probe, target, FIRST), FIRST)
        disk.fail("write", "incoming/*.nar", errno.EIO, start=100_000)
        answer = read(probe, target, SECOND)
        assert (answer["error"], answer["size"]) == ("EIO", 0)
        assert "Input/output error" in caller.stories() and SECOND.path.basename in caller.stories()
        assert is_right(read(probe, target, FIRST), FIRST)
        assert not list(caller.cache.glob("incoming/*"))
        disk.heal()
        assert is_right(read(probe, target, SECOND), SECOND)
    good(caller)


def test_trees_that_cannot_be_written_are_told_and_come_later(caller: Caller, disk: FailingDisk) -> None:
    target = caller.home / "mount"
    with caller.mount_probe(target) as probe:
        disk.fail("write", "incoming/*.tree", errno.EIO)
        assert read(probe, target, FIRST)["error"] == "EIO"
        assert "Input/output error" in caller.stories()
        disk.heal()
        assert is_right(read(probe, target, FIRST), FIRST)
    good(caller)


def test_unreadable_tree_is_an_io_error_and_the_mount_lives(caller: Caller, disk: FailingDisk) -> None:
    target = caller.home / "mount"
    fetched(caller, FIRST, SECOND)
    caller.wait_for_daemons_end()
    with caller.mount_probe(target) as probe:
        disk.fail("read", tree_file(number_of(caller, FIRST)), errno.EIO)
        assert read(probe, target, FIRST)["error"] == "EIO"
        assert is_right(read(probe, target, SECOND), SECOND)
        disk.heal()
        assert is_right(read(probe, target, FIRST), FIRST)
    good(caller)


def test_index_that_cannot_be_written_is_told_and_readers_go_on(caller: Caller, disk: FailingDisk) -> None:
    target = caller.home / "mount"
    with caller.mount_probe(target) as probe:
        assert is_right(read(probe, target, FIRST), FIRST)
        disk.fail("write", "index.sqlite*", errno.EIO)
        assert read(probe, target, SECOND)["error"] == "EIO"
        assert "disk I/O error" in caller.stories(), (caller.cache / "daemon.log").read_text()
        assert is_right(read(probe, target, FIRST), FIRST)
        disk.heal()
        assert eventually(lambda: is_right(read(probe, target, SECOND), SECOND))
    good(caller)


def test_file_that_the_disk_fails_to_take_is_dropped_and_fetched_again(
    caller: Caller, disk: FailingDisk
) -> None:
    """The kernel tells a failed write-back once; after that its pages count as written, and are not."""
    fetched(caller, FIRST)
    caller.wait_for_daemons_end()
    disk.fail("fsync", "nars/*/*.nar", errno.EIO)
    fetched(caller, SECOND)
    caller.wait_for_daemons_end()
    disk.heal()
    assert good(caller)["checked"]["nars"] == 1
    fetched(caller, SECOND)
    assert good(caller)["checked"]["nars"] == 2


def test_disk_that_fails_at_the_start_is_named_with_the_exit_code_of_the_cache(
    caller: Caller, disk: FailingDisk
) -> None:
    disk.fail("create", "*", errno.EIO)
    done = caller.veneer("daemon", timeout=60)
    assert done.returncode == 7, done.stderr
    assert "Input/output error" in done.stderr and str(caller.cache) in done.stderr


# A disk that is full, or read-only.


@pytest.fixture
def tmpfs(caller: Caller) -> Iterator[Callable[[str], None]]:
    """The cache directory is a file system of 4 MiB; the function mounts it anew with options."""
    caller.cache.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "veneer-test", str(caller.cache)]
    subprocess.run(words, check=True, timeout=30)

    def remount(options: str) -> None:
        words = ["mount", "-o", f"remount,{options}", str(caller.cache)]
        # A daemon that gave the lock back may not have ended yet.
        eventually(lambda: subprocess.run(words, capture_output=True, timeout=30).returncode == 0)

    try:
        yield remount
        caller.wait_for_daemons_end()
    finally:
        subprocess.run(["umount", "-l", str(caller.cache)], check=True, timeout=30)


def test_full_disk_makes_room_and_else_is_an_io_error_with_a_story(
    caller: Caller, tmpfs: Callable[[str], None], source: SignedCache, tmp_path: Path
) -> None:
    big = [make_path(f"big-{i}", 1_500_001) for i in range(3)]
    huge = make_path("huge", 5_000_001)
    more = SignedCache(tmp_path / "more", [*big, huge], secret=source.secret)
    caller.use(f"file://{source.directory}", f"file://{more.directory}", key=source.key)
    target = caller.home / "mount"
    with caller.mount_probe(target) as probe:
        for made in (*big, big[0]):
            assert is_right(read(probe, target, made), made), caller.stories()
        answer = read(probe, target, huge)
        assert (answer["error"], answer["size"]) == ("EIO", 0)
        assert "no space" in caller.stories()
        assert is_right(read(probe, target, FIRST), FIRST)
        assert not list(caller.cache.glob("incoming/*"))
    good(caller)


def test_disk_that_becomes_read_only_gives_what_is_there_and_heals(caller: Caller, disk: FailingDisk) -> None:
    target = caller.home / "mount"
    with caller.mount_probe(target) as probe:
        assert is_right(read(probe, target, FIRST), FIRST)
        for operation in ("create", "write", "rename", "unlink"):
            disk.fail(operation, "*", errno.EROFS)
        assert is_right(read(probe, target, FIRST), FIRST)
        assert read(probe, target, SECOND)["error"] == "EIO"
        disk.heal()
        assert eventually(lambda: is_right(read(probe, target, SECOND), SECOND))
    good(caller)


def test_read_only_disk_is_named_at_the_start(caller: Caller, tmpfs: Callable[[str], None]) -> None:
    fetched(caller, FIRST)
    caller.wait_for_daemons_end()
    tmpfs("ro")
    done = caller.veneer("daemon")
    assert done.returncode == 7
    assert "Read-only file system" in done.stderr and "choose another cache directory" in done.stderr
    done = verify(caller)
    assert done.returncode == 7
    assert json.loads(done.stderr)["error"]["hint"]


# An index that others hold, or that is not what it was.


def test_index_locked_by_another_program_is_waited_for(caller: Caller) -> None:
    target = caller.home / "mount"
    with caller.mount_probe(target) as probe:
        assert is_right(read(probe, target, FIRST), FIRST)
        daemon = caller.daemon_pid()
        with closing(sqlite3.connect(caller.cache / "index.sqlite", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert is_right(read(probe, target, FIRST), FIRST)
            assert read(probe, target, SECOND)["error"] == "EIO"
            assert "another program" in caller.stories() or "locked" in caller.stories()
            other.execute("ROLLBACK")
        assert eventually(lambda: is_right(read(probe, target, SECOND), SECOND))
        assert caller.daemon_pid() == daemon
    good(caller)


def header(index: Path) -> None:
    with open(index, "r+b") as file:
        file.write(b"not an index at all")


def middle(index: Path) -> None:
    """Every page of the paths' own table but its root, silently."""
    with closing(sqlite3.connect(index)) as db:
        size = db.execute("PRAGMA page_size").fetchone()[0]
        page = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'paths'").fetchone()[0]
    with open(index, "r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xa5" * size)


def cut(index: Path) -> None:
    os.truncate(index, index.stat().st_size // 2 & ~4095)


def cut_log(index: Path) -> None:
    """The daemon was killed, and its write-ahead log ends in the middle."""
    log = index.with_name(index.name + "-wal")
    os.truncate(log, log.stat().st_size * 2 // 3)


@pytest.mark.parametrize("damage", [header, middle, cut, cut_log])
def test_damaged_index_loses_at_most_what_was_cached(caller: Caller, damage: Callable[[Path], None]) -> None:
    index = caller.cache / "index.sqlite"
    if damage is cut_log:
        target = caller.home / "mount"
        with caller.mount_probe(target) as probe:
            assert is_right(read(probe, target, FIRST), FIRST)
            os.kill(caller.daemon_pid(), signal.SIGKILL)
            caller_copy = caller.home / "copy"
            shutil.copytree(
                caller.cache, caller_copy, ignore=lambda _, names: [n for n in names if "sock" in n]
            )
        caller.forget()
        caller_copy.rename(caller.cache)
    else:
        fetched(caller, FIRST, SECOND)
        caller.wait_for_daemons_end()
    damage(index)
    done = verify(caller)
    report = json.loads(done.stdout)
    if damage is cut_log:
        assert (done.returncode, report["index"]) == (0 if not report["found"] else 1, "ok")
    else:
        assert (done.returncode, report["index"], report["dropped"]) == (1, "damaged", 1)
        assert list(caller.cache.glob("index.sqlite.corrupt-*"))
    good(caller)
    fetched(caller, *MADE)
    assert good(caller)["checked"]["nars"] == 3


@pytest.mark.parametrize("damage", [header, middle, cut])
def test_damaged_index_is_begun_anew_by_whoever_comes_next(
    caller: Caller, damage: Callable[[Path], None]
) -> None:
    """Without a check: the next command works, or says what is wrong and the one after it works."""
    fetched(caller, FIRST, SECOND)
    caller.wait_for_daemons_end()
    damage(caller.cache / "index.sqlite")
    done = caller.veneer("fetch", FIRST.path.basename)
    if done.returncode:
        assert "damaged" in done.stderr and "hint" in done.stderr
        caller.wait_for_daemons_end()
        fetched(caller, FIRST)
    assert good(caller)["checked"]["nars"] == 1


def test_cache_of_a_newer_version_is_left_alone(caller: Caller) -> None:
    fetched(caller, FIRST)
    caller.wait_for_daemons_end()
    with closing(sqlite3.connect(caller.cache / "index.sqlite")) as db:
        db.execute("PRAGMA user_version = 1000")
    before = files(caller.cache)
    for done in (caller.veneer("daemon"), verify(caller), caller.veneer("fetch", FIRST.path.basename)):
        assert done.returncode in (7, 8)
        assert "newer" in done.stderr and "upgrade" in done.stderr
    assert files(caller.cache) == before


# One cache, several daemons; no cache any more.


def test_second_daemon_is_told_who_owns_the_cache_and_disturbs_nobody(caller: Caller) -> None:
    target = caller.home / "mount"
    with caller.mount_probe(target) as probe:
        done = caller.veneer("daemon")
        assert done.returncode == 7
        assert f"another daemon (pid {caller.daemon_pid()}) owns this cache" in done.stderr
        assert "hint" in done.stderr
        assert is_right(read(probe, target, FIRST), FIRST)
    good(caller)


def test_check_beside_a_reader_disturbs_nobody_and_finds_what_was_flipped(caller: Caller) -> None:
    target = caller.home / "mount"
    with caller.mount_probe(target) as probe:
        assert is_right(read(probe, target, FIRST), FIRST)
        assert is_right(read(probe, target, SECOND), SECOND)
        good(caller)
        nar = caller.cache / nar_file(number_of(caller, FIRST))
        nar.chmod(0o600)
        with open(nar, "r+b") as file:
            file.seek(nar.stat().st_size // 2)
            file.write(b"flipped!")
        shown = verify(caller, "--dry-run")
        assert shown.returncode == 1 and nar.exists()
        done = verify(caller)
        report = json.loads(done.stdout)
        assert done.returncode == 1
        assert [(f["fault"], f["path"]) for f in report["findings"]] == [
            ("wrong content", FIRST.path.basename)
        ]
        assert is_right(read(probe, target, FIRST), FIRST)
        assert is_right(read(probe, target, SECOND), SECOND)
        good(caller)


def number_of(caller: Caller, made: MadePath) -> int:
    with closing(sqlite3.connect(f"file:{caller.cache}/index.sqlite?mode=ro", uri=True)) as db:
        return int(db.execute("SELECT number FROM paths WHERE name = ?", (made.path.name,)).fetchone()[0])


def test_deleted_cache_directory_is_an_io_error_for_what_is_not_open_and_the_next_run_begins_anew(
    caller: Caller, source: SignedCache
) -> None:
    target = caller.home / "mount"
    with caller.mount_probe(target) as probe:
        assert is_right(read(probe, target, FIRST), FIRST)
        daemon = caller.daemon_pid()
        shutil.rmtree(caller.cache)
        assert read(probe, target, SECOND)["error"] == "EIO"
        assert is_right(read(probe, target, FIRST), FIRST)
        fetched(caller, *MADE)  # a daemon and a directory of its own
        assert caller.daemon_pid() != daemon
        assert Path(f"/proc/{daemon}").exists()
        assert is_right(read(probe, target, FIRST), FIRST)
        assert probe.process.poll() is None
    assert good(caller)["checked"]["nars"] == 3
