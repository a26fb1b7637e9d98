"""What the store remembers of sources that failed, and what it tells of them, over HTTP."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.faulty_http import Body, FaultyServer, Stall, Status
from tests.support.golden import GOLDEN, PATHS, url
from tests.support.store_bench import Bench, run
from veneer.model.errors import SourceError, TrustError

PATH = PATHS["leaf"]
NARINFO = f"/{PATH.hash_part}.narinfo"


def unsigned() -> Body:
    lines = (GOLDEN / "zstd" / NARINFO.lstrip("/")).read_text().splitlines(keepends=True)
    return Body("".join(line for line in lines if not line.startswith("Sig")).encode())


def moved() -> Body:
    text = (GOLDEN / "zstd" / NARINFO.lstrip("/")).read_text()
    return Body(text.replace("URL: nar/", "URL: nar/moved-").encode())


def test_an_untrusted_narinfo_is_asked_for_again_when_an_absence_would_be(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        with FaultyServer(GOLDEN / "zstd") as server:
            server.fail(NARINFO, unsigned())
            view = bench.view(server.url, ttl=10)
            for _ in range(3):
                with pytest.raises(TrustError):
                    await bench.store.lookup(view, PATH, bench.account)
            assert server.count(NARINFO) == 1
            server.heal()
            bench.clock.now += 10
            assert await bench.store.lookup(view, PATH, bench.account)
            bench.clock.now += 1000
            assert await bench.store.lookup(view, PATH, bench.account)
            assert server.count(NARINFO) == 2  # the good one is kept for ever

    run(tmp_path, body)


def test_a_narinfo_whose_nar_is_gone_is_asked_for_again_and_kept_while_nobody_answers(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        with FaultyServer(GOLDEN / "zstd") as server:
            server.fail(NARINFO, moved())
            view = bench.view(server.url, ttl=10)
            row = await bench.store.lookup(view, PATH, bench.account)
            with pytest.raises(SourceError, match="404"):
                await bench.store.content(view, row.number, 0, 1, bench.account)
            bench.clock.now += 10
            server.heal()
            server.fail(NARINFO, Status(400))
            again_row = await bench.store.lookup(view, PATH, bench.account)
            assert again_row == row  # the names are known all the same
            server.heal()
            again = bench.view(server.url, ttl=9)  # in which the source does not rest
            with pytest.raises(SourceError, match="404"):
                await bench.store.content(again, row.number, 0, 1, bench.account)
            assert (await bench.store.content(again, row.number, 0, 1, bench.account)).whole

    run(tmp_path, body)


def test_a_failure_that_a_second_source_makes_up_for_is_told_once(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        with FaultyServer(GOLDEN / "zstd") as server:
            server.fail("*", Status(400))
            view = bench.view(f"{server.url}?priority=1", url("zstd") + "?priority=2")
            for path in ("leaf", "text", "outputs"):
                assert await bench.store.whole(view, PATHS[path], bench.account)
            stories = [story.text for story in bench.store.stories.rows()]
            assert len(stories) == 1
            assert "400" in stories[0]
            assert server.url in stories[0]

    run(tmp_path, body)


def test_a_nar_that_came_while_sources_were_asked_is_not_moved_again(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        with FaultyServer(GOLDEN / "zstd") as server:
            server.fail(NARINFO, Stall())
            row = await bench.store.lookup(bench.view(url("zstd")), PATH, bench.account)
            slow = bench.view(server.url)
            reader = asyncio.create_task(bench.store.content(slow, row.number, 0, 1, bench.account))
            while not server.count(NARINFO):
                await asyncio.to_thread(lambda: None)
            await bench.store.whole(bench.view(url("zstd")), PATH, bench.account)
            server.heal()
            assert (await reader).whole
            assert not server.count("/nar/*")

    run(tmp_path, body)
