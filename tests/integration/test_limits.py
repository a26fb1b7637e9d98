"""What is beyond a limit waits, and nothing hangs: downloads, memory, rates; and readers go before what nobody waits for."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.support.callers import Caller, eventually
from tests.support.faulty_http import FaultyServer, Stall
from tests.support.published_cache import PublishedCache
from tests.support.signed_cache import SignedCache, make_path
from tests.support.store_bench import Bench, run
from veneer.store.store import STREAM_BYTES, Limits, Store


def run_with(tmp_path: Path, limits: Limits, body: Callable[[Bench], Awaitable[None]]) -> None:
    async def limited(bench: Bench) -> None:
        await bench.store.close()
        bench.store = Store(bench.cache, bench.clock, bench.notices, limits)
        await body(bench)

    run(tmp_path, limited)


async def asked(server: FaultyServer, count: int) -> None:
    """That many NARs are being sent."""
    await asyncio.to_thread(eventually, lambda: nars(server) >= count)


def nars(server: FaultyServer) -> int:
    return server.count("/nar/*")


@pytest.mark.parametrize(("paths", "most"), [(2, 3), (3, 3), (6, 3)])
def test_downloads_beyond_the_limit_wait_for_a_place(tmp_path: Path, paths: int, most: int) -> None:
    made = [make_path(f"slow-{n}", 200_000) for n in range(paths)]
    cache = SignedCache(tmp_path / "served", made)

    async def body(bench: Bench) -> None:
        with FaultyServer(cache.directory) as server:
            server.fail("/nar/*", Stall(1000))
            view = bench.view(server.url, keys=(cache.key,))
            tasks = [asyncio.create_task(bench.store.whole(view, each.path, bench.account)) for each in made]
            await asked(server, min(paths, most))
            done, _ = await asyncio.wait(tasks, timeout=0.3)
            assert not done
            assert nars(server) == min(paths, most)
            server.heal()
            rows = await asyncio.gather(*tasks)
            assert [bench.nar(row.number) for row in rows] == [each.nar for each in made]

    run_with(tmp_path, Limits(parallel_downloads=most, prefetch=False), body)


def test_a_reader_has_a_place_while_prefetching_takes_all_of_its_own(tmp_path: Path) -> None:
    ahead = [make_path(f"ahead-{n}", 200_000) for n in range(8)]
    wanted = make_path("wanted", 200_000)
    cache = SignedCache(tmp_path / "served", [*ahead, wanted])

    async def body(bench: Bench) -> None:
        with FaultyServer(cache.directory) as server:
            for each in ahead:
                server.fail(cache.file(each.path.name, "nar"), Stall(1000))
            view = bench.view(server.url, keys=(cache.key,))
            tasks = [asyncio.create_task(bench.store.ahead(view, p.path, bench.account)) for p in ahead]
            await asked(server, 2)
            row = await bench.store.lookup(view, wanted.path, bench.account)
            async with asyncio.timeout(10):
                await bench.store.content(view, row.number, 0, 100, bench.account)
            assert not any(task.done() for task in tasks)
            assert nars(server) == 2 + 1
            server.heal()
            assert all(await asyncio.gather(*tasks))

    run_with(tmp_path, Limits(parallel_downloads=4, prefetch=False), body)


def test_parts_under_way_hold_no_more_memory_than_allowed_and_all_arrive(tmp_path: Path) -> None:
    """32 MiB, half of it for whole NARs: forty readers at once, of what is five times as large."""
    big = make_path("big", 80 << 20)
    cache = PublishedCache(tmp_path / "served", [big], frame_size=1 << 20)
    limits = Limits(memory=32 << 20, prefetch=False)
    room = limits.memory - limits.whole_downloads * STREAM_BYTES
    assert room == 16 << 20
    most = 0

    async def body(bench: Bench) -> None:
        gate = bench.store.parts._fetch._memory

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, gate.held)
                await asyncio.sleep(0)

        view = bench.view(cache.url, keys=(cache.key,))
        row = await bench.store.lookup(view, big.path, bench.account)
        watching = asyncio.create_task(watch())
        starts = range(0, len(big.nar) - 1000, 2 << 20)
        found = await asyncio.gather(
            *(bench.store.content(view, row.number, at, 1000, bench.account) for at in starts)
        )
        watching.cancel()
        assert all(
            ready.start <= at < at + 1000 <= ready.end for ready, at in zip(found, starts, strict=True)
        )
        row = await bench.store.whole(view, big.path, bench.account)
        assert bench.nar(row.number) == big.nar
        assert gate.held == 0

    run_with(tmp_path, limits, body)
    assert room // 4 < most <= room


@pytest.mark.root
@pytest.mark.fuse
def test_with_every_limit_at_its_least_everything_is_read(as_root: Caller, tmp_path: Path) -> None:
    made = [make_path(f"least-{n}", 40_000 + n) for n in range(6)]
    cache = SignedCache(tmp_path / "served", made)
    as_root.configure()
    with open(as_root.home / "config.toml", "a") as config:
        config.write(
            f'trusted-public-keys = ["{cache.key}"]\n'
            "[limits]\nparallel-downloads = 1\nparallel-requests = 1\nmemory = '32M'\nanswer-seconds = 1\nparked-requests = 16\n"
            f"[[source]]\nurl = '{cache.directory}'\nbytes-per-second = '64K'\nrequests-per-second = 20\n"
        )
    files = [f"/nix/store/{each.path.basename}/data" for each in made]
    digests = [hashlib.sha256(each.data).hexdigest() for each in made]
    summed = as_root.veneer("run", "--", "sh", "-c", 'for f; do sha256sum "$f" & done; wait', "sh", *files)
    assert summed.returncode == 0, summed.stderr
    assert sorted(line.split()[0] for line in summed.stdout.splitlines()) == sorted(digests)
