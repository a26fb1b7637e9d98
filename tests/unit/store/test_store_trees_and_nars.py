"""A tree that is served is that of the NAR that is served, whatever a listing says and whichever came first."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from tests.support.golden import GOLDEN, PATHS, copy_of, url
from tests.support.store_bench import Bench, run
from veneer.cache.index import TreeState
from veneer.sources.base import Meter, unmetered

PATH = PATHS["outputs"]


def forging(to: Path) -> Path:
    """A cache whose listing of PATH has the right size, and two neighbours changed places."""
    lying = copy_of("none", to)
    listing = lying / f"{PATH.hash_part}.ls"
    document = json.loads(listing.read_bytes())
    assert swapped(document["root"])
    listing.write_text(json.dumps(document))
    return lying


def swapped(directory: dict[str, Any]) -> bool:
    """Whether two unequal files of a directory below could be swapped; offsets go, for they are recomputed."""
    done = False
    entries = directory.get("entries", {})
    for entry in entries.values():
        entry.pop("narOffset", None)
        done = swapped(entry) or done
    files = [name for name, entry in entries.items() if entry["type"] != "directory"]
    if len(files) > 1:
        a, b = files[:2]
        entries[a], entries[b] = entries[b], entries[a]
        done = True
    return done


def test_a_lost_tree_is_made_of_the_nar_that_is_here_and_not_of_a_listing(tmp_path: Path) -> None:
    lying = forging(tmp_path / "lying")

    async def body(bench: Bench) -> None:
        row = await bench.store.whole(bench.view(url("zstd")), PATH, bench.account)
        right = bench.cache.trees.path(row.number).read_bytes()
        bench.cache.trees.drop(row.number)
        again = await bench.store.lookup(bench.view(f"file://{lying}"), PATH, bench.account)
        assert again.number == row.number
        assert bench.cache.trees.path(row.number).read_bytes() == right
        assert again.tree is TreeState.CHECKED

    run(tmp_path, body)


def test_a_listing_that_arrives_after_the_nar_does_not_replace_its_tree(tmp_path: Path) -> None:
    lying = forging(tmp_path / "lying")

    async def body(bench: Bench) -> None:
        view = bench.view(f"file://{lying}")
        source = view.chain.sources[0]
        asked, go, original = asyncio.Event(), asyncio.Event(), source.listing

        async def late(hash_part: str, meter: Meter = unmetered) -> bytes | None:
            asked.set()
            await go.wait()
            return await original(hash_part, meter)

        source.listing = late  # type: ignore[method-assign]
        looking = asyncio.create_task(bench.store.lookup(view, PATH, bench.account))
        await asked.wait()
        row = await bench.store.whole(view, PATH, bench.account)
        go.set()
        assert (await looking).number == row.number
        assert bench.condemned == []
        assert (await looking).tree is TreeState.CHECKED

    run(tmp_path, body)


def test_a_nar_that_was_cut_short_on_disk_is_fetched_again(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        view = bench.view(url("zstd"))
        row = await bench.store.whole(view, PATHS["leaf"], bench.account)
        os.truncate(bench.cache.nars.path(row.number), 1000)
        assert (await bench.store.content(view, row.number, 0, 1, bench.account)).whole
        assert bench.nar(row.number) == (GOLDEN / "leaf.nar").read_bytes()

    run(tmp_path, body)


def test_a_tree_without_listing_is_made_of_the_nar_that_is_here_without_asking_for_it_again(
    tmp_path: Path,
) -> None:
    async def body(bench: Bench) -> None:
        view = bench.view(url("zstd-without-listings"))
        row = await bench.store.lookup(view, PATHS["bytes-name"], bench.account)
        bench.cache.trees.drop(row.number)
        moved = bench.account.wire_bytes
        assert await bench.store.tree(view, row.number, bench.account) == row.number
        assert bench.account.wire_bytes == moved

    run(tmp_path, body)
