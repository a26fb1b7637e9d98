"""What a trace spares: questions are asked together, and nothing is asked for that the trace has not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.callers import eventually
from tests.support.faulty_http import FaultyServer, Stall, Status
from tests.support.published_cache import PublishedCache
from tests.support.store_bench import Bench, eager, run, settled
from tests.unit.store.test_libraries import BULK, LIBRARY, REFERENCES, held, read, world
from veneer.formats.trace import Trace, TracedFile, TracedPath
from veneer.model.hashes import Hash
from veneer.model.store_path import StorePath
from veneer.store import prefetch
from veneer.store.expected import Expected
from veneer.store.prefetch import Prefetch
from veneer.store.views import View

TRACED = ("tool", "libc")
TOOL = b"bin/tool"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> PublishedCache:
    return PublishedCache(
        tmp_path_factory.mktemp("published") / "cache", world(), references=REFERENCES, roots=["tool"]
    )


def made(cache: PublishedCache, *names: str) -> Trace:
    """All of tool's program, and the first bytes of libc's library."""
    files = {
        "tool": TracedFile(TOOL, 5000, ((0, 5000),)),
        "libc": TracedFile(b"lib/libc.so.6", 150_000, ((0, 4096),)),
    }
    return tuple(
        TracedPath(
            cache.paths[name].path, Hash("sha256", bytes(32)), len(cache.paths[name].nar), (files[name],)
        )
        for name in names
    )


def names_only(cache: PublishedCache, *names: str) -> Trace:
    return tuple(TracedPath(cache.paths[name].path, Hash("sha256", bytes(32)), 0, ()) for name in names)


def url(cache: PublishedCache, name: str, suffix: str) -> str:
    return f"/{cache.paths[name].path.hash_part}.{suffix}"


def over_http(
    tmp_path: Path, cache: PublishedCache, body: Callable[[Bench, View, FaultyServer], Awaitable[None]]
) -> None:
    async def within(bench: Bench) -> None:
        await body(bench, bench.view(server.url, keys=(cache.key,)), server)

    with FaultyServer(cache.directory) as server:
        run(tmp_path, eager(within))


async def prefetching(bench: Bench, view: View, trace: Trace) -> Prefetch:
    work = Prefetch(bench.store, view, bench.account, trace)
    await work.run(lambda _: None)
    return work


async def comes_true(holds: Callable[[], bool]) -> None:
    await asyncio.to_thread(eventually, holds)


@pytest.mark.parametrize(("silent", "asked"), [("narinfo", "ls"), ("ls", "chunks")])
def test_a_question_does_not_wait_for_the_one_before_it(
    tmp_path: Path, cache: PublishedCache, silent: str, asked: str
) -> None:
    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        server.fail(url(cache, "libc", silent), Stall())
        work = asyncio.create_task(prefetching(bench, view, made(cache, *TRACED)))
        await comes_true(lambda: server.count(url(cache, "libc", asked)) == 1)
        assert not work.done()
        server.heal()
        outcome = (await work).outcome
        assert (outcome.done, outcome.failed) == (2, 0)
        for name in TRACED:
            assert [server.count(url(cache, name, suffix)) for suffix in ("narinfo", "ls", "chunks")] == [
                1,
                1,
                1,
            ]

    over_http(tmp_path, cache, body)


def test_the_rest_of_the_closure_is_asked_about_when_something_else_is_looked_up(
    tmp_path: Path, cache: PublishedCache
) -> None:
    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        await prefetching(bench, view, made(cache, *TRACED))
        for name in TRACED:
            await bench.store.lookup(view, cache.paths[name].path, bench.account)
        await settled()
        assert not bench.store.knows_closure(view, bench.account)
        assert (server.count("*.narinfo"), server.count("*.bundle")) == (len(TRACED), 0)
        await bench.store.lookup(view, cache.paths["liba"].path, bench.account)
        await settled()
        assert server.count("*.bundle") == 1
        assert server.count("*.narinfo") < len(TRACED) + 5  # of seven paths; the bundle was under way
        assert bench.store.knows_closure(view, bench.account)
        closure = {path.name for path in bench.account.closure}
        assert closure == {"tool", "liba", "linkb", "libb", "libc", "libd", "unused"}

    over_http(tmp_path, cache, body)


def test_a_bundle_comes_when_what_a_traced_path_refers_to_is_wanted(
    tmp_path: Path, cache: PublishedCache
) -> None:
    """The root refers to what is traced, and only that to more."""

    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        traced = ("tool", *REFERENCES["tool"])
        await prefetching(bench, view, names_only(cache, *traced))
        for name in traced:
            await bench.store.lookup(view, cache.paths[name].path, bench.account)
        await settled()
        assert server.count("*.bundle") == 0
        assert server.count("*.narinfo") == len(traced)
        await bench.store.closure(view, [cache.paths["tool"].path], bench.account)
        assert server.count("*.bundle") == 1

    over_http(tmp_path, cache, body)


@pytest.mark.parametrize("order", [1, -1])
def test_two_traces_of_one_session_do_not_disturb_each_other(
    tmp_path: Path, cache: PublishedCache, order: int
) -> None:
    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        for name in TRACED[::order]:
            await prefetching(bench, view, made(cache, name))
        for name in TRACED:
            await bench.store.lookup(view, cache.paths[name].path, bench.account)
        await settled()
        assert server.count("*.bundle") == 0
        await bench.store.lookup(view, cache.paths["liba"].path, bench.account)
        await settled()
        assert bench.store.knows_closure(view, bench.account)
        assert len(bench.account.closure) == 7
        assert bench.account.guided == set()

    over_http(tmp_path, cache, body)


def test_what_stands_for_a_changed_path_is_guided_and_nothing_is_left_of_it(
    tmp_path: Path, cache: PublishedCache
) -> None:
    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        libc = cache.paths["libc"]
        (traced,) = made(cache, "libc")
        changed = replace(traced, path=StorePath("0" * 32, "libc"))
        server.fail(f"/nar/{cache.nar('libc').name}", Stall())
        roots = [cache.paths["tool"].path]
        work = asyncio.create_task(
            Prefetch(bench.store, view, bench.account, (changed,), roots).run(lambda _: None)
        )
        await comes_true(lambda: server.count(f"/nar/{cache.nar('libc').name}") > 0)
        assert bench.account.is_guided(libc.path)
        server.heal()
        assert (await work).changed == 1
        assert not bench.account.is_guided(libc.path)
        assert not [
            task for task in asyncio.all_tasks() if task.get_name().startswith(".")
        ]  # expected sidecars

    over_http(tmp_path, cache, body)


def test_of_a_long_trace_the_bundle_tells(
    tmp_path: Path, cache: PublishedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "PARALLEL_METADATA", 1)

    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        server.fail(f"/nar/{cache.nar('tool').name}", Stall())
        work = asyncio.create_task(prefetching(bench, view, made(cache, *TRACED)))
        await comes_true(lambda: server.count("*.bundle") == 1)
        assert not work.done()
        server.heal()
        await work

    over_http(tmp_path, cache, body)


def test_programs_of_the_trace_bring_nothing_that_it_has_not(tmp_path: Path, cache: PublishedCache) -> None:
    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        await prefetching(bench, view, made(cache, *TRACED))
        row = await bench.store.lookup(view, cache.paths["tool"].path, bench.account)
        await read(bench, view, row, TOOL.decode())
        await settled()
        assert held(bench, cache.paths["tool"]) < BULK / 4
        assert [held(bench, cache.paths[name]) for name in ("liba", "libb", "libd")] == [0, 0, 0]

    over_http(tmp_path, cache, body)


def test_waiting_for_what_the_trace_loads_is_no_evidence_for_more(
    tmp_path: Path, cache: PublishedCache
) -> None:
    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        server.fail(f"/nar/{cache.nar('libc').name}", Stall())
        work = asyncio.create_task(prefetching(bench, view, made(cache, *TRACED)))
        await comes_true(lambda: server.count(f"/nar/{cache.nar('libc').name}") > 0)
        row = await bench.store.lookup(view, cache.paths["libc"].path, bench.account)
        readers = [
            asyncio.create_task(read(bench, view, row, "lib/libc.so.6", at)) for at in (0, LIBRARY // 2, 0)
        ]
        await asyncio.sleep(0)
        server.heal()
        await asyncio.gather(work, *readers)
        await settled()
        assert 0 < held(bench, cache.paths["libc"]) < BULK / 4

    over_http(tmp_path, cache, body)


@pytest.mark.parametrize("suffix", ["narinfo", "ls", "chunks"])
def test_what_fails_is_asked_again_or_told(tmp_path: Path, cache: PublishedCache, suffix: str) -> None:
    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        server.fail(url(cache, "libc", suffix), Status(404))
        work = await prefetching(bench, view, made(cache, *TRACED))
        assert work.outcome.done == (1 if suffix == "narinfo" else 2)
        assert work.outcome.unmatched == (1 if suffix == "narinfo" else 0)
        server.heal()
        bench.clock.now += 3600
        row = await bench.store.lookup(view, cache.paths["libc"].path, bench.account)
        await read(bench, view, row, "lib/libc.so.6")

    over_http(tmp_path, cache, body)


def test_what_was_given_up_or_taken_has_ended_when_all_of_it_is_closed() -> None:
    async def body() -> None:
        expected, ended = Expected(), list[str]()
        begun = asyncio.Event()

        async def answer(name: str) -> bytes | None:
            try:
                begun.set()
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                ended.append(name)
            return None

        for name in ("given up", "taken", "left"):
            expected.ask(name, ".ls", answer(name))
        await begun.wait()
        taken = expected.take("taken", ".ls")
        expected.give_up(["given up"])
        await expected.close()
        assert sorted(ended) == ["given up", "left", "taken"]
        assert taken is not None and taken.cancelled()

    asyncio.run(body())
