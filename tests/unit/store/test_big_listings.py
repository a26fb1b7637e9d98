"""Listings that are made into trees by a child of the daemon."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.support.callers import eventually
from tests.support.golden import PATHS, copy_of, url
from tests.support.store_bench import Bench, run
from veneer.cache.index import TreeState
from veneer.store import big_listings, trees


@pytest.fixture(autouse=True)
def _every_listing_is_big(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "BIG", 0)


def children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


def test_the_trees_are_those_of_the_nars(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        view = bench.view(url("zstd"))
        before = children()
        for name in ("leaf", "outputs", "text"):
            path = PATHS[name]
            row = await bench.store.lookup(view, path, bench.account)
            assert row.tree == TreeState.LISTED
            again = await bench.store.whole(view, path, bench.account)  # compares it with the NAR's
            assert (again.number, again.tree) == (row.number, TreeState.CHECKED)
        assert not bench.condemned
        assert children() == before
        assert not list((bench.cache.root / "incoming").iterdir())

    run(tmp_path, body)


def test_a_listing_that_is_refused_is_told_and_the_nar_is_used(tmp_path: Path) -> None:
    cache = copy_of("zstd", tmp_path / "source")
    path = PATHS["outputs"]
    (cache / f"{path.hash_part}.ls").write_bytes(
        b'{"version": 1, "root": {"type": "directory", "entries": {}}}'
    )

    async def body(bench: Bench) -> None:
        row = await bench.store.lookup(bench.view(f"file://{cache}"), path, bench.account)
        assert row.tree == TreeState.CHECKED
        assert "its NAR would have" in " ".join(story.text for story in bench.store.stories.rows())

    run(tmp_path, body)


def test_a_child_that_is_too_slow_or_dies_leaves_nothing_and_the_nar_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = tmp_path / "python"
    dead.write_text("#!/bin/sh\nkill -9 $$\n")
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 100\n")
    for program in (dead, silent):
        program.chmod(0o755)

    async def body(bench: Bench) -> None:
        view = bench.view(url("zstd"))
        before = children()
        cases = (
            ("outputs", dead, "signal 9"),
            ("leaf", silent, "took more than"),
            ("text", None, "no process"),
        )
        for name, program, told in cases:
            monkeypatch.setattr(sys, "executable", str(program or tmp_path / "none"))
            bench.store._trees._big = big_listings.BigListings(bench.cache.generation, 0.5)
            row = await bench.store.lookup(view, PATHS[name], bench.account)
            assert row.tree == TreeState.CHECKED
            assert told in " ".join(story.text for story in bench.store.stories.rows())
            assert children() == before

    run(tmp_path, body)


def test_who_waits_no_longer_ends_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 100\n")
    silent.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(silent))

    async def body(bench: Bench) -> None:
        before = children()
        asking = asyncio.create_task(
            bench.store.lookup(bench.view(url("zstd")), PATHS["leaf"], bench.account)
        )
        await asyncio.to_thread(eventually, lambda: children() != before)
        asking.cancel()
        await bench.store.close()
        assert children() == before

    run(tmp_path, body)
