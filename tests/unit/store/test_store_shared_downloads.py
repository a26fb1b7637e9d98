"""One download, several views: nobody sees unverified bytes, or fails, because of what another view believes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from tests.support.damage import nar_file_of
from tests.support.golden import GOLDEN, PATHS, copy_of, url
from tests.support.store_bench import Bench, run
from veneer.cache.nars import Bytes, IncomingNar
from veneer.daemon.compose import build_view
from veneer.model.errors import CacheFullError, HashMismatchError, SourceError
from veneer.model.path_info import UnverifiedPathInfo
from veneer.sources.base import Meter, unmetered
from veneer.store.store import Limits, Store
from veneer.store.views import View, ViewConfig

LEAF = PATHS["leaf"]


class Tap:
    """Holds a source's NAR stream: nothing before ``start`` is set, the second half not before ``rest`` is."""

    def __init__(self, view: View, which: int = 0) -> None:
        source = view.chain.sources[which]
        self.asked, self.start, self.rest = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._original = source.nar
        source.nar = self._nar  # type: ignore[method-assign]

    async def _nar(self, info: UnverifiedPathInfo, meter: Meter = unmetered) -> AsyncGenerator[bytes, None]:
        self.asked.set()
        await self.start.wait()
        data = b"".join([chunk async for chunk in self._original(info, meter)])
        yield data[: len(data) // 2]
        await self.rest.wait()
        yield data[len(data) // 2 :]


async def settled(bench: Bench) -> None:
    """Until the download under way has announced something, or a moment has passed in which it could have."""
    for _ in range(20):
        if any(download.prefix for download in bench.store.fetcher._downloads.values()):
            return
        await asyncio.sleep(0.01)


def test_a_strict_view_sees_nothing_of_another_views_deferred_download_before_it_is_whole(
    tmp_path: Path,
) -> None:
    async def body(bench: Bench) -> None:
        trusting, strict = bench.view(url("none"), verify="deferred"), bench.view(url("none"))
        tap = Tap(trusting)
        tap.start.set()
        row = await bench.store.lookup(trusting, LEAF, bench.account)
        early = await bench.store.content(trusting, row.number, 0, 1, bench.account)
        assert not early.whole
        reader = asyncio.create_task(bench.store.content(strict, row.number, 0, 1, bench.account))
        await settled(bench)
        assert not reader.done()
        tap.rest.set()
        assert (await reader).whole

    run(tmp_path, body)


def test_a_strict_source_that_stands_in_for_a_deferred_one_is_verified_before_it_is_read(
    tmp_path: Path,
) -> None:
    empty = copy_of("none", tmp_path / "empty")
    nar_file_of(empty, LEAF.hash_part).unlink()

    async def body(bench: Bench) -> None:
        sources = [
            {"url": f"file://{empty}?priority=1", "verify": "deferred"},
            {"url": url("none") + "?priority=2", "verify": "strict"},
        ]
        config = ViewConfig.from_json({"sources": sources, "require_signatures": False})
        view = build_view(config, bench.cache, bench.clock)
        bench.views.append(view)
        tap = Tap(view, 1)
        tap.start.set()
        row = await bench.store.lookup(view, LEAF, bench.account)
        reader = asyncio.create_task(bench.store.content(view, row.number, 0, 1, bench.account))
        await tap.asked.wait()
        await settled(bench)
        assert not reader.done()
        tap.rest.set()
        assert (await reader).whole

    run(tmp_path, body)


def test_a_view_whose_sources_work_is_served_although_the_download_it_joined_fails(tmp_path: Path) -> None:
    empty = copy_of("none", tmp_path / "empty")
    nar_file_of(empty, LEAF.hash_part).unlink()

    async def body(bench: Bench) -> None:
        poor, rich = bench.view(f"file://{empty}"), bench.view(url("zstd"))
        tap = Tap(poor)
        row = await bench.store.lookup(poor, LEAF, bench.account)
        await bench.store.lookup(rich, LEAF, bench.account)  # so that it joins without asking anybody
        first = asyncio.create_task(bench.store.content(poor, row.number, 0, 1, bench.account))
        await tap.asked.wait()
        second = asyncio.create_task(bench.store.content(rich, row.number, 0, 1, bench.account))
        for _ in range(5):
            await asyncio.sleep(0)
        tap.start.set()
        tap.rest.set()
        with pytest.raises(SourceError):
            await first
        assert (await second).whole
        assert bench.nar(row.number) == (GOLDEN / "leaf.nar").read_bytes()

    run(tmp_path, body)


def test_a_disk_that_fills_up_after_bytes_were_shown_unverified_condemns_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = asyncio.Event()
    write = IncomingNar.write

    def write_or_fail(self: IncomingNar, data: Bytes) -> None:
        if full.is_set():
            raise CacheFullError("no space")
        write(self, data)

    monkeypatch.setattr(IncomingNar, "write", write_or_fail)

    async def body(bench: Bench) -> None:
        monkeypatch.setattr(bench.store.fetcher, "_make_room", lambda need: True)
        view = bench.view(url("none"), verify="deferred")
        tap = Tap(view)
        tap.start.set()
        row = await bench.store.lookup(view, LEAF, bench.account)
        assert not (await bench.store.content(view, row.number, 0, 1, bench.account)).whole
        full.set()
        tap.rest.set()
        with pytest.raises((CacheFullError, HashMismatchError)):
            await bench.store.content(view, row.number, 0, row.nar_size, bench.account)
        assert bench.condemned == [(row.number, LEAF)]

    run(tmp_path, body)


def test_a_nar_that_could_not_be_admitted_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(bench: Bench) -> None:
        def publish(*_: object) -> None:
            raise CacheFullError("no space")

        monkeypatch.setattr(bench.cache.trees, "publish", publish)
        with pytest.raises(CacheFullError):
            await bench.store.whole(bench.view(url("zstd")), LEAF, bench.account)
        assert not list((bench.cache.root / "incoming").iterdir())

    run(tmp_path, body)


def test_what_was_opened_and_no_source_has_any_more_is_an_error_and_not_absent(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()

    async def body(bench: Bench) -> None:
        row = await bench.store.lookup(bench.view(url("zstd")), LEAF, bench.account)
        nothing = bench.view(f"file://{tmp_path / 'nothing'}")
        with pytest.raises(SourceError):
            await bench.store.content(nothing, row.number, 0, 1, bench.account)
        with pytest.raises(SourceError):
            await bench.store.tree(nothing, row.number, bench.account)

    run(tmp_path, body)


def test_a_reader_does_not_wait_behind_a_whole_closure_that_is_fetched(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        store = Store(bench.cache, bench.clock, bench.notices, Limits(parallel_downloads=3, prefetch=False))
        view, other = bench.view(url("none")), bench.view(url("zstd"))
        tap = Tap(view)
        row = await store.lookup(other, LEAF, bench.account)
        rest = [name for name in PATHS if name not in ("leaf", "bytes-name")]
        fetching = [asyncio.create_task(store.ahead(view, PATHS[name], bench.account)) for name in rest]
        try:
            await tap.asked.wait()
            assert (await store.content(other, row.number, 0, 1, bench.account)).whole
            assert not any(task.done() for task in fetching)
            tap.start.set()
            tap.rest.set()
            await asyncio.gather(*fetching)
        finally:
            await store.close()

    run(tmp_path, body)
