from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.caches import BLOCKS, Clock, add_nar, add_row, add_tree, files, open_cache, store_path
from veneer.cache.cache import Cache
from veneer.cache.eviction import TREE_REST, Candidate, Drop, excess, plan
from veneer.cache.index import NarState
from veneer.formats.tree_index import nar_file, tree_file


def candidates(*sizes: int, first: int = 0) -> list[Candidate]:
    return [Candidate(first + i, store_path(first + i), size) for i, size in enumerate(sizes)]


def drops(steps: list[Drop]) -> list[tuple[int, bool]]:
    return [(step.number, step.tree) for step in steps]


@pytest.mark.parametrize(
    ("used", "limit", "need", "free", "expected"),
    [
        (100, None, 0, None, 0),  # no limit
        (100, 100, 0, None, 0),  # just at it
        (101, 100, 0, None, 11),  # down to 90 %
        (95, 100, 10, None, 5),  # room for what comes is at 90 %
        (95, 100, 50, None, 45),  # room for what comes is lower
        (95, 100, 500, None, 95),  # more than the limit: all
        (95, 0, 0, None, 95),
        (50, 100, 10, 4, 6),  # the disk is full before the limit is reached
        (50, None, 10, 4, 6),
        (3, None, 10, 4, 3),  # never more than there is
        (50, None, 10, 10, 0),
    ],
)
def test_excess(used: int, limit: int | None, need: int, free: int | None, expected: int) -> None:
    assert excess(used, limit, need, free) == expected


def test_plan_takes_the_least_recently_used_until_enough() -> None:
    steps = plan(candidates(5, 5, 5), [], excess=6, pinned=set(), busy=set())
    assert drops(steps) == [(0, False), (1, False)]


def test_plan_leaves_pinned_and_busy_alone() -> None:
    steps = plan(candidates(5, 5, 5), [], excess=99, pinned={store_path(0)}, busy={1})
    assert drops(steps) == [(2, False)]


def test_plan_takes_trees_only_when_nars_are_not_enough() -> None:
    trees = candidates(1, 1, first=10)
    assert drops(plan(candidates(5), trees, excess=5, pinned=set(), busy=set())) == [(0, False)]
    assert drops(plan(candidates(5), trees, excess=6, pinned=set(), busy=set())) == [(0, False), (10, True)]
    assert drops(plan([], trees, excess=6, pinned={store_path(10)}, busy=set())) == [(11, True)]


def test_plan_does_nothing_without_excess() -> None:
    assert plan(candidates(5), candidates(5), excess=0, pinned=set(), busy=set()) == []


def test_plan_reads_no_more_candidates_than_it_needs() -> None:
    source: Iterator[Candidate] = iter(candidates(5, 5, 5))
    plan(source, [], excess=5, pinned=set(), busy=set())
    assert [candidate.number for candidate in source] == [1, 2]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(tmp_path: Path, clock: Clock) -> Iterator[Cache]:
    with open_cache(tmp_path / "cache", clock, max_bytes=10 * BLOCKS) as opened:
        yield opened


def test_evict_goes_below_the_limit_and_tells_what_went(cache: Cache) -> None:
    numbers = [add_nar(cache, i, now=float(i)).number for i in range(11)]
    evicted = cache.evict()
    assert [(e.path_number, e.store_path, e.size, e.tree) for e in evicted] == [
        (numbers[i], store_path(i), BLOCKS, False) for i in range(2)
    ]
    assert files(cache.root) == {nar_file(number) for number in numbers[2:]}
    assert cache.index.totals().nar_bytes == 9 * BLOCKS
    assert cache.evict() == []


def test_dry_run_tells_the_same_and_drops_nothing(cache: Cache) -> None:
    for i in range(11):
        add_nar(cache, i, now=float(i))
    planned = cache.evict(dry_run=True)
    assert cache.index.totals().nars == 11
    assert cache.evict() == planned


def test_pinned_paths_stay_whatever_the_limit(cache: Cache) -> None:
    for i in range(4):
        add_nar(cache, i, now=float(i))
    cache.index.pin("keep", [store_path(0), store_path(2)])
    assert {e.store_path for e in cache.evict(max_bytes=0)} == {store_path(1), store_path(3)}
    cache.index.unpin("keep")
    assert len(cache.evict(max_bytes=0)) == 2


def test_use_protects_from_eviction(cache: Cache) -> None:
    first = add_nar(cache, 0, now=1.0)
    second = add_nar(cache, 1, now=2.0)
    cache.index.touch([(first.number, 3.0)])
    assert [e.path_number for e in cache.evict(max_bytes=BLOCKS * 3 // 2, busy={99})] == [second.number]


def test_room_is_made_for_what_is_about_to_come(cache: Cache) -> None:
    for i in range(10):
        add_nar(cache, i, now=float(i))
    assert cache.evict() == []
    assert len(cache.evict(need=3 * BLOCKS)) == 3


def test_full_disk_makes_room_below_the_limit_and_empties_quarantine(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_nar(cache, 0)
    add_nar(cache, 1)
    bad = cache.nars.partial(add_row(cache, 2).number)
    bad.write(b"bad")
    cache.nars.set_aside(bad)
    monkeypatch.setattr(cache.nars, "free", lambda: 100)
    assert len(cache.evict(need=5000)) == 1
    assert list((cache.root / "quarantine").iterdir()) == []


def test_trees_outlive_their_nars_and_go_only_when_long_unused(cache: Cache, clock: Clock) -> None:
    old = add_tree(cache, 0, now=clock.now - TREE_REST - 1)
    recent = add_tree(cache, 1, now=clock.now - TREE_REST + 60)
    nar = add_nar(cache, 2, now=clock.now)
    evicted = cache.evict(max_bytes=0)
    assert [(e.path_number, e.tree) for e in evicted] == [(nar.number, False), (old.number, True)]
    assert files(cache.root) == {tree_file(recent.number)}


def test_evicted_nar_stays_readable_and_can_come_back(cache: Cache) -> None:
    path = add_nar(cache, 0)
    with open(cache.nars.path(path.number), "rb") as reader:
        cache.evict(max_bytes=0)
        assert len(reader.read()) == path.nar_size
    again = add_nar(cache, 0)
    assert (again.number, again.nar) == (path.number, NarState.WHOLE)
