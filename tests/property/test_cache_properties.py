"""Eviction, recovery and the index under random histories."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.caches import (
    BLOCKS,
    NAR_SIZE,
    add_nar,
    add_tree,
    files,
    nar_hash,
    open_cache,
    row,
    store_path,
)
from veneer.cache.eviction import Candidate, excess, plan
from veneer.cache.index import FileRow, NarState, PathRow, TreeState, Unsynced
from veneer.cache.recovery import FoundFile, Rehash, Remove, Reset
from veneer.cache.recovery import plan as recovery_plan
from veneer.formats.tree_index import nar_file, sparse_file, tree_file

sizes = st.lists(st.integers(0, 1000), max_size=20)


@given(sizes, sizes, st.integers(0, 30_000), st.sets(st.integers(0, 40)), st.sets(st.integers(0, 40)))
def test_eviction_frees_enough_or_all_it_may(
    nars: list[int], trees: list[int], wanted: int, pinned: set[int], busy: set[int]
) -> None:
    nar_candidates = [Candidate(i, store_path(i), size) for i, size in enumerate(nars)]
    tree_candidates = [Candidate(20 + i, store_path(20 + i), size) for i, size in enumerate(trees)]
    steps = plan(
        nar_candidates, tree_candidates, excess=wanted, pinned={store_path(i) for i in pinned}, busy=busy
    )
    numbers = [step.number for step in steps]
    assert not set(numbers) & (pinned | busy)
    assert numbers == sorted(set(numbers))
    freed = sum(step.size for step in steps)
    allowed = [c for c in nar_candidates + tree_candidates if c.number not in pinned | busy]
    if freed < wanted:
        assert numbers == [candidate.number for candidate in allowed]
    else:
        assert freed - (steps[-1].size if steps else 0) < wanted or not steps
    if any(step.tree for step in steps):
        assert {c.number for c in allowed if c.number < 20} <= set(numbers)


@given(
    st.integers(0, 1 << 50),
    st.none() | st.integers(0, 1 << 50),
    st.integers(0, 1 << 50),
    st.none() | st.integers(0, 1 << 50),
)
def test_after_the_excess_is_gone_the_need_fits(
    used: int, limit: int | None, need: int, free: int | None
) -> None:
    over = excess(used, limit, need, free)
    assert 0 <= over <= used
    if limit is not None and over < used:
        assert used - over + need <= limit
    if free is not None and over < used:
        assert need <= free + over


@st.composite
def disk(draw: st.DrawFn) -> tuple[list[FileRow], list[FoundFile], list[Unsynced]]:
    rows = []
    found: dict[str, int] = {}
    for number in range(1, draw(st.integers(1, 8))):
        tree, nar, retired = draw(st.integers(0, 2)), draw(st.integers(0, 2)), draw(st.integers(0, 5)) == 0
        rows.append(FileRow(number, tree, nar, 50, 100, retired))
        for name, size in ((tree_file(number), 50), (nar_file(number), 100), (sparse_file(number), 100)):
            if draw(st.booleans()):
                found[name] = draw(st.sampled_from([size, size, 0, size + 1]))
    found.update(
        dict.fromkeys(draw(st.lists(st.sampled_from(["incoming/a", "nars/x", "trees/00/y.tree"]))), 1)
    )
    doubtful = [
        Unsynced(number, kind, serial)
        for serial, (number, kind) in enumerate(
            draw(
                st.lists(
                    st.tuples(st.integers(1, 9), st.sampled_from(["nar", "sparse", "tree"])), unique=True
                )
            )
        )
    ]
    return rows, [FoundFile(name, size) for name, size in found.items()], doubtful


@given(disk(), st.integers(0, 500))
def test_after_recovery_rows_and_files_agree(
    state: tuple[list[FileRow], list[FoundFile], list[Unsynced]], budget: int
) -> None:
    rows, found, doubtful = state
    steps = recovery_plan(rows, found, doubtful=doubtful, rehash_bytes=budget)
    left = {file.name: file.size for file in found}
    for step in steps:
        if isinstance(step, Remove):
            del left[step.name]
    reset = {(step.number, step.kind) for step in steps if isinstance(step, Reset)}
    wanted = {}
    for path in rows:
        if path.tree and (path.number, "tree") not in reset:
            wanted[tree_file(path.number)] = path.tree_size
        if path.nar == NarState.WHOLE and (path.number, "nar") not in reset:
            wanted[nar_file(path.number)] = path.nar_size
        if path.nar == NarState.SPARSE and (path.number, "sparse") not in reset:
            wanted[sparse_file(path.number)] = path.nar_size
    assert left == wanted
    rehashed = {(step.number, step.kind) for step in steps if isinstance(step, Rehash)}
    assert sum(100 for _, kind in rehashed if kind != "tree") <= budget
    for file in doubtful:  # nothing doubtful is kept without a look
        name = {"nar": nar_file, "sparse": sparse_file, "tree": tree_file}[file.kind](file.number)
        assert name not in left or (file.number, file.kind) in rehashed


operations = st.lists(
    st.tuples(
        st.sampled_from(
            ["nar", "tree", "drop", "replace", "evict", "touch", "pin", "reopen", "reboot", "narinfo"]
        ),
        st.integers(0, 5),
    ),
    max_size=25,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(operations)
def test_any_history_keeps_numbers_totals_and_files_right(history: list[tuple[str, int]]) -> None:
    meaning: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        boot = 0
        cache = open_cache(root)
        try:
            for time, (what, which) in enumerate(history):
                now = float(time + 10)
                if what in ("nar", "tree"):
                    path = (add_nar if what == "nar" else add_tree)(cache, which, now)
                    assert (
                        meaning.setdefault(path.number, path.store_path.basename) == path.store_path.basename
                    )
                elif what == "evict":
                    cache.evict(max_bytes=which * BLOCKS)
                elif what == "narinfo":
                    cache.index.put_narinfo("https://cache.example", f"{which:032d}", None, now)
                elif what == "pin":
                    cache.index.pin("p", [store_path(which)])
                elif what in ("reopen", "reboot"):
                    cache.close()
                    boot += what == "reboot"
                    cache = open_cache(root, boot=f"boot-{boot}")
                elif (known := cache.index.path_of(store_path(which), nar_hash(which))) is not None:
                    if what == "drop":
                        cache.nars.drop(known.number)
                    elif what == "touch":
                        cache.index.touch([(known.number, now)])
                    else:
                        new = cache.index.replace_path(known.number, now)
                        assert new.number not in meaning
                        meaning[new.number] = new.store_path.basename
                        cache.nars.drop(known.number)
                        cache.trees.drop(known.number)
            _check(root, cache.index.totals().nars, [row(cache, number) for number in meaning])
            totals = cache.index.totals()
            cache.close()
            cache = open_cache(root, boot=f"boot-{boot}")
            assert cache.index.totals() == totals
        finally:
            cache.close()


def _check(root: Path, nars: int, rows: list[PathRow]) -> None:
    expected = {nar_file(r.number) for r in rows if r.nar is NarState.WHOLE}
    assert len(expected) == nars
    expected |= {tree_file(r.number) for r in rows if r.tree is not TreeState.NONE}
    assert files(root) == expected
    assert all(
        (root / nar_file(r.number)).stat().st_size == NAR_SIZE for r in rows if r.nar is NarState.WHOLE
    )
