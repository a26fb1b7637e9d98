"""The bounded map, growing NAR files, stories, tallies."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
from pathlib import Path

import pytest

from tests.support.stub_daemon import StubDaemon
from veneer.formats.tree_index import nar_file
from veneer.model.errors import NotFoundError, SourceError
from veneer.mount.content import Contents
from veneer.mount.recent import Recent
from veneer.mount.stories import KEPT, Stories, errno_of
from veneer.mount.tally import Tally
from veneer.mount.trees import Absent, Trees


def test_recent_keeps_what_is_used_and_forgets_the_rest() -> None:
    recent: Recent[int, str] = Recent(10)
    recent.put(0, "kept")
    for i in range(1, 1000):
        recent.put(i, str(i))
        assert recent.get(0) == "kept"
        assert len(recent.keys()) <= 20
    assert recent.get(1) is None
    recent.drop(0)
    assert recent.get(0) is None


def open_files(directory: Path) -> list[str]:
    """Files below ``directory`` that this process has open."""
    targets = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            targets.append(str(descriptor.readlink()))
    return [target for target in targets if target.startswith(f"{directory}/")]


def test_no_descriptor_stays_open_after_its_file_was_forgotten(tmp_path: Path) -> None:
    store = StubDaemon(tmp_path)
    for i in range(1, 60):
        store.add(f"p{i}", {b"f": b"%d" % i}, number=i, whole=True)
    dirfd = os.open(tmp_path, os.O_RDONLY)
    contents, trees = Contents(dirfd, max_open=5), Trees(dirfd, max_mapped=5)
    for i in range(1, 60):
        assert contents.get(i) is not None
        assert trees.get(i) is not None
    assert 0 < len(open_files(tmp_path)) <= 20
    del contents, trees
    gc.collect()
    assert open_files(tmp_path) == []
    os.close(dirfd)


def test_growing_file_knows_what_is_readable_and_becomes_whole(tmp_path: Path) -> None:
    store = StubDaemon(tmp_path)
    store.add("p", {b"f": b"x" * 1000}, number=7)
    dirfd = os.open(tmp_path, os.O_RDONLY)
    contents = Contents(dirfd)
    contents.ready(7, 0, 100, whole=False, inode=1)
    assert contents.get(7) is None
    store.publish_nar(7, part=500)
    inode = (tmp_path / f"{nar_file(7)}.part").stat().st_ino
    contents.ready(7, 0, 100, whole=False, inode=inode)
    contents.ready(7, 100, 300, whole=False, inode=inode)
    nar = contents.get(7)
    assert nar is not None
    assert nar.covers(0, 300) and not nar.covers(0, 301) and not nar.whole
    store.publish_nar(7)
    contents.ready(7, 0, 1000, whole=True)
    nar = contents.get(7)
    assert nar is not None
    assert nar.whole
    os.close(dirfd)


def test_absence_is_forgotten_in_time() -> None:
    absent = Absent()
    absent.put(b"a", 100)
    absent.put(b"b", 0)
    assert b"a" in absent
    assert b"b" not in absent
    absent.drop(b"a")
    assert b"a" not in absent


@pytest.mark.parametrize(
    ("error", "code"),
    [(SourceError("x"), errno.EIO), (NotFoundError("x"), errno.ENOENT), (OSError(errno.ENOENT, "x"), errno.EIO), (KeyError(1), errno.EIO)],
)  # fmt: skip
def test_each_error_has_one_errno(error: Exception, code: int) -> None:
    assert errno_of(error) == code


def test_stories_are_bounded_counted_and_printable() -> None:
    told: list[str] = []
    stories = Stories(lambda name, fields: told.append(name))
    for i in range(KEPT + 10):
        stories.tell(errno.EIO, "a\x1b[31m", str(i))
    assert stories.count == len(told) == KEPT + 10
    assert len(stories.recent()) == KEPT
    assert stories.recent()[-1]["why"] == str(KEPT + 9)
    assert "\x1b" not in stories.recent()[0]["where"]


def test_reads_of_all_threads_are_summed_and_news_told_once() -> None:
    tally = Tally()
    a, b = tally.of_thread(), tally.of_thread()
    a[5], b[5], b[6] = [1, 100], [2, 50], [1, 1]
    tally.touched(5, b"name")
    tally.waited(5, 0.5)
    tally.waited(5, 0.25)
    tally.listed.add(6)
    assert sorted(tally.news()) == [(5, 150, False), (6, 1, True)]
    assert tally.news() == []
    a[5][1] += 1
    assert tally.news() == [(5, 1, False)]
    row = tally.report()[5]
    assert (row["name"], row["reads"], row["bytes_read"], row["waits"], row["wait_seconds"]) == (
        "name",
        3,
        151,
        2,
        0.75,
    )
