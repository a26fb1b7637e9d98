"""A cache on a file system of 4 MiB, and on a read-only one. Root mounts them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.caches import add_nar, add_row, files, nar_bytes, open_cache, row, tree_bytes, verified
from tests.support.small_disk import small_disk
from veneer.cache.index import NarState, TreeState
from veneer.formats.tree_index import nar_file
from veneer.model.errors import CacheError, CacheFullError

pytestmark = pytest.mark.root

MIB = 1 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    with small_disk(place, "4m"):
        yield place


def fill(place: Path, leave: int) -> Path:
    """A foreign file that leaves ``leave`` bytes."""
    ballast = place / "ballast"
    free = os.statvfs(place)
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - leave))
    return ballast


def test_full_disk_is_met_by_eviction_and_the_write_is_repeated(small: Path) -> None:
    with open_cache(small) as cache:
        old = [add_nar(cache, i, now=float(i), size=MIB).number for i in range(3)]
        number = add_row(cache, 9, size=MIB).number
        content = nar_bytes(9, MIB)
        incoming = cache.nars.incoming(number)
        evicted = []
        for start in range(0, MIB, 64 << 10):
            piece = content[start : start + (64 << 10)]
            try:
                incoming.write(piece)
            except CacheFullError:
                evicted += cache.evict(need=MIB - incoming.size)
                incoming.write(piece)
        cache.nars.admit(number, verified(incoming, 9, MIB))
        assert [e.path_number for e in evicted] == old[: len(evicted)] and evicted
        assert cache.nars.path(number).read_bytes() == content


def test_nar_too_big_for_the_disk_is_refused_at_once(small: Path) -> None:
    with open_cache(small) as cache:
        with pytest.raises(CacheFullError):
            cache.nars.incoming(add_row(cache, 1).number, 8 * MIB)
        assert files(small) == set()


def test_eviction_works_when_not_even_the_index_can_grow(small: Path) -> None:
    with open_cache(small) as cache:
        number = add_nar(cache, 1, size=MIB).number
        ballast = fill(small, leave=0)
        with pytest.raises(CacheFullError):
            for i in range(5000):
                cache.index.put_narinfo("https://cache.example", f"{i:032d}", b"x" * 1000, 1.0)
                cache.index.flush()
        assert [e.path_number for e in cache.evict(need=MIB)] == [number]
        assert row(cache, number).nar is NarState.NONE
        cache.index.put_narinfo("https://cache.example", "0" * 32, b"x", 1.0)
        cache.index.flush()
        ballast.unlink()
    with open_cache(small) as cache:
        assert cache.repaired.files_removed == 0


def test_failed_writes_leave_no_files_and_right_totals(small: Path) -> None:
    with open_cache(small) as cache:
        kept = add_nar(cache, 1).number
        path = add_row(cache, 2)
        tree = tree_bytes(cache, path)
        totals = cache.index.totals()
        incoming = cache.nars.incoming(path.number)
        incoming.write(nar_bytes(2))
        fill(small, leave=0)
        with pytest.raises(CacheFullError):
            cache.trees.publish(path.number, tree, TreeState.LISTED)
        with pytest.raises(CacheFullError):
            incoming.write(bytes(MIB))
        incoming.discard()
        assert cache.index.totals() == totals
        assert files(small) == {nar_file(kept)}


def test_read_only_file_system_is_told_as_such(small: Path) -> None:
    open_cache(small).close()
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True, timeout=30)
    with pytest.raises(CacheError, match="Read-only file system") as caught:
        open_cache(small)
    assert "choose another cache directory" in caught.value.hint
