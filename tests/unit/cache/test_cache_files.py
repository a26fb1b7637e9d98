"""NAR and tree files: when they appear, what readers see, what is left after failures."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.caches import (
    BLOCKS,
    NAR_SIZE,
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
from veneer.cache.nars import KEPT_QUARANTINED, VerifiedNar
from veneer.formats.tree_index import nar_file, tree_file
from veneer.model.errors import CacheError, CacheFullError
from veneer.model.hashes import Hash


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with open_cache(tmp_path / "cache") as opened:
        yield opened


def test_admitted_nar_is_whole_read_only_and_recorded(cache: Cache) -> None:
    path = add_nar(cache, 1)
    file = cache.nars.path(path.number)
    assert file == cache.root / nar_file(path.number)
    assert file.read_bytes() == nar_bytes(1)
    assert file.stat().st_mode & 0o777 == 0o444
    assert (path.nar, path.disk_size) == (NarState.WHOLE, BLOCKS)
    assert cache.nars.has(path.number)
    assert files(cache.root) == {nar_file(path.number)}


def test_nar_is_invisible_until_admitted(cache: Cache) -> None:
    number = add_row(cache, 1).number
    incoming = cache.nars.incoming(number, NAR_SIZE)
    incoming.write(nar_bytes(1))
    assert not cache.nars.has(number)
    assert row(cache, number).nar is NarState.NONE
    incoming.discard()
    incoming.discard()
    assert files(cache.root) == set()


def test_nar_of_another_hash_or_size_is_refused_and_removed(cache: Cache) -> None:
    number = add_row(cache, 1).number
    other = Hash("sha256", bytes(32))
    for claim in ("hash", "size", "cut"):
        incoming = cache.nars.incoming(number)
        incoming.write(nar_bytes(1)[: NAR_SIZE // 2 if claim == "cut" else NAR_SIZE])
        right = verified(incoming, 1)
        wrong = {
            "hash": VerifiedNar(incoming, other, NAR_SIZE),
            "size": VerifiedNar(incoming, right.nar_hash, NAR_SIZE + 1),
            "cut": right,
        }[claim]
        with pytest.raises(CacheError, match="not the one of"):
            cache.nars.admit(number, wrong)
    assert files(cache.root) == set()
    assert row(cache, number).nar is NarState.NONE


def test_nar_cannot_be_admitted_twice_nor_under_a_retired_number(cache: Cache) -> None:
    number = add_row(cache, 1).number
    incoming = cache.nars.incoming(number)
    incoming.write(nar_bytes(1))
    cache.index.replace_path(number, 2.0)
    with pytest.raises(CacheError, match="no place"):
        cache.nars.admit(number, verified(incoming, 1))
    with pytest.raises(CacheError, match="no place"):
        cache.nars.admit(number, verified(incoming, 1))
    assert files(cache.root) == set()


def test_deferred_nar_can_be_read_while_it_grows_and_after_admission(cache: Cache) -> None:
    number = add_row(cache, 1).number
    partial = cache.nars.partial(number, NAR_SIZE)
    partial.write(nar_bytes(1)[:4000])
    assert files(cache.root) == {nar_file(number) + ".part"}
    with open(cache.root / (nar_file(number) + ".part"), "rb") as reader:
        assert os.pread(reader.fileno(), partial.size, 0) == nar_bytes(1)[:4000]
        partial.write(memoryview(nar_bytes(1))[4000:])
        cache.nars.admit(number, verified(partial, 1))
        assert os.pread(reader.fileno(), NAR_SIZE, 0) == nar_bytes(1)
    assert files(cache.root) == {nar_file(number)}


def test_second_deferred_attempt_does_not_disturb_readers_of_the_first(cache: Cache) -> None:
    number = add_row(cache, 1).number
    first = cache.nars.partial(number)
    first.write(b"first attempt")
    with open(first.path, "rb") as reader:
        second = cache.nars.partial(number)
        second.write(b"2")
        assert reader.read() == b"first attempt"
    second.discard()


def test_wrong_deferred_nar_is_set_aside_and_only_the_last_few_stay(cache: Cache) -> None:
    number = add_row(cache, 1).number
    for i in range(KEPT_QUARANTINED + 3):
        partial = cache.nars.partial(number)
        partial.write(b"bad %d" % i)
        os.utime(partial.path, ns=(i, i))
        cache.nars.set_aside(partial)
        cache.nars.set_aside(partial)
    assert files(cache.root) == set()
    kept = {file.read_bytes() for file in (cache.root / "quarantine").iterdir()}
    assert kept == {b"bad %d" % i for i in range(3, KEPT_QUARANTINED + 3)}


def test_write_that_fails_leaves_what_was_there_and_can_be_repeated(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    incoming = cache.nars.incoming(add_row(cache, 1).number)
    incoming.write(b"before ")
    real = os.pwrite
    calls = 0

    def full(fd: int, data: memoryview, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, "full")
        return real(fd, data[:3], offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CacheFullError, match="No space left"):
        incoming.write(b"twice tried")
    assert os.fstat(incoming.fileno).st_size == incoming.size == 7
    incoming.write(b"twice tried")
    assert incoming.path.read_bytes() == b"before twice tried"
    incoming.discard()


def test_nar_that_cannot_fit_is_refused_before_it_is_fetched(cache: Cache) -> None:
    number = add_row(cache, 1).number
    with pytest.raises(CacheFullError, match="no space for a NAR"):
        cache.nars.incoming(number, 1 << 60)
    assert files(cache.root) == set()


def test_dropped_nar_stays_readable_for_who_has_it_open(cache: Cache) -> None:
    path = add_nar(cache, 1)
    with open(cache.nars.path(path.number), "rb") as reader:
        cache.nars.drop(path.number)
        cache.nars.drop(path.number)
        assert reader.read() == nar_bytes(1)
    assert not cache.nars.has(path.number)
    assert row(cache, path.number).nar is NarState.NONE
    assert cache.index.totals().nar_bytes == 0


def test_tree_is_published_whole_and_replaced_without_disturbing_readers(cache: Cache) -> None:
    path = add_tree(cache, 1)
    content = tree_bytes(cache, path)
    assert files(cache.root) == {tree_file(path.number)}
    assert (path.tree, path.tree_size) == (TreeState.LISTED, len(content))
    with open(cache.trees.path(path.number), "rb") as reader:
        cache.trees.publish(path.number, content + b"more", TreeState.CHECKED)
        assert reader.read() == content
    assert cache.trees.path(path.number).stat().st_mode & 0o777 == 0o444
    assert row(cache, path.number).tree is TreeState.CHECKED
    assert cache.index.totals().tree_bytes == len(content) + 4


def test_tree_whose_making_fails_leaves_nothing(cache: Cache) -> None:
    path = add_row(cache, 1)

    def chunks() -> Iterator[bytes]:
        yield b"begun"
        raise CacheError("the encoder stopped")

    with pytest.raises(CacheError, match="encoder stopped"):
        cache.trees.publish(path.number, chunks(), TreeState.LISTED)
    assert files(cache.root) == set()
    assert not cache.trees.has(path.number)


def test_dropped_tree_is_gone_from_disk_and_row(cache: Cache) -> None:
    path = add_tree(cache, 1)
    cache.trees.drop(path.number)
    assert not cache.trees.has(path.number)
    assert row(cache, path.number).tree is TreeState.NONE
    assert cache.index.totals().trees == 0


def test_checking_a_tree_in_place_does_not_list_it_as_written_again(cache: Cache) -> None:
    path = add_tree(cache, 1)
    batch = cache.begin_sync()
    batch.run()
    cache.end_sync(batch)
    cache.index.set_tree(path.number, TreeState.CHECKED)
    assert cache.index.unsynced() == []
    assert row(cache, path.number).tree is TreeState.CHECKED


def test_deleted_cache_directory_is_told_as_such(cache: Cache) -> None:
    number = add_row(cache, 1).number
    (cache.root / "incoming").rmdir()
    with pytest.raises(CacheError, match="No such file") as caught:
        cache.nars.incoming(number)
    assert "restart the daemon" in caught.value.hint
