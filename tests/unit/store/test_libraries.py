"""What a program is linked with comes beside it: exactly that, once, in the background, whatever goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from pathlib import Path

import pytest

from tests.support.callers import eventually
from tests.support.elf_files import make_elf
from tests.support.faulty_http import FaultyServer, Flipped, Stall, Status
from tests.support.published_cache import FRAME, PublishedCache
from tests.support.signed_cache import MadePath, SignedCache, make_files
from tests.support.store_bench import Bench, eager, run, settled
from veneer.cache.index import NarState, PathRow
from veneer.model.errors import VeneerError
from veneer.model.tree import Symlink
from veneer.store import libraries
from veneer.store.views import View

LIBRARY = 150_000
"""Bytes of each."""
BULK = 2_000_000
"""Bytes in each path that no program needs."""


def noise(name: str, size: int) -> bytes:
    return hashlib.shake_256(name.encode()).digest(size)


def store_name(name: str) -> str:
    return f"/nix/store/{make_files(name, {'x': b''}).path}"


def path(name: str, files: dict[str, bytes | Symlink], bulk: int = BULK) -> MadePath:
    """With something in it that nobody reads, so that it is not fetched whole."""
    return make_files(name, {**files, "zz-bulk": noise(name, bulk)})


def runpath(*names: str) -> bytes:
    return ":".join(f"{store_name(name)}/lib" for name in names).encode()


def library(name: str, *needed: bytes, runpath: bytes | None = None) -> bytes:
    return make_elf(needed, filling=noise(name, LIBRARY), runpath=runpath)


def world() -> list[MadePath]:
    """tool -> libA (by a link) -> libD (by name) -> libc; tool -> libB (through a link of another path), libc; libA and libc are a circle."""
    loader = f"{store_name('libc')}/lib/ld.so".encode()
    program = make_elf(
        [b"libA.so.1", b"libB.so", b"libc.so.6", b"libnowhere.so"],
        interpreter=loader,
        runpath=b"/usr/lib:" + runpath("liba", "linkb", "libc"),
        filling=noise("tool", 5000),
    )
    script = f"#! {store_name('tool')}/bin/tool -x\nprint 1\n".encode()
    return [
        path("tool", {"bin/tool": program, "bin/other": b"other" * 5000}),
        path(
            "liba",
            {
                "lib/libA.so.1": Symlink(b"libA.so.1.2"),
                "lib/libA.so.1.2": library(
                    "A", b"libD.so", b"libc.so.6", b"libown.so", runpath=b"$ORIGIN/own"
                ),
                "lib/own/libown.so": library("own"),
            },
        ),
        path("linkb", {"lib/libB.so": Symlink(f"{store_name('libb')}/lib/libB.so".encode())}),
        path("libb", {"lib/libB.so": library("B")}),
        path("libc", {"lib/ld.so": library("ld"), "lib/libc.so.6": library("c", b"ld.so", b"libA.so.1")}),
        path("libd", {"usr/lib/x86/libD.so": library("D", b"libc.so.6")}),
        path("unused", {"lib/libA.so.1": library("wrong")}),
        path("script", {"bin/script": script}),
    ]


REFERENCES = {
    "tool": ["liba", "linkb", "libc", "unused"],
    "liba": ["libd", "libc"],
    "linkb": ["libb"],
    "libd": ["libc"],
    "libc": ["libc"],
    "script": ["tool"],
}
LINKED = {
    "liba": ["lib/libA.so.1.2", "lib/own/libown.so"],
    "libb": ["lib/libB.so"],
    "libc": ["lib/ld.so", "lib/libc.so.6"],
    "libd": ["usr/lib/x86/libD.so"],
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> PublishedCache:
    return PublishedCache(tmp_path_factory.mktemp("published") / "cache", world(), references=REFERENCES)


async def looked_up(bench: Bench, view: View, made: MadePath) -> PathRow:
    row = await bench.looked_up(view, made)
    await settled()
    return row


async def read(bench: Bench, view: View, row: PathRow, file: str, at: int = 0, size: int = 4096) -> None:
    entry = bench.tree(row.number).find(file.encode())
    assert entry is not None
    await bench.store.content(view, row.number, entry.offset + at, min(size, entry.size - at), bench.account)


async def started(bench: Bench, view: View, cache: PublishedCache, name: str, file: str) -> PathRow:
    """The first read of a program, and all that comes of it."""
    row = await looked_up(bench, view, cache.paths[name])
    await read(bench, view, row, file)
    await settled()
    return row


def held(bench: Bench, made: MadePath) -> int:
    """Bytes of its content that were fetched."""
    count = bench.account.paths.get(made.path)
    return 0 if count is None else count.nar


async def assert_is_here(bench: Bench, view: View, made: MadePath, *files: str) -> None:
    """Reading all of these files asks nobody."""
    row = await bench.store.lookup(view, made.path, bench.account)
    before = bench.account.requests
    for file in files:
        await read(bench, view, row, file, size=1 << 30)
    await settled()
    assert bench.account.requests == before, made.path.name


# What is loaded.


def test_all_that_a_program_is_linked_with_comes_and_nothing_else(
    tmp_path: Path, cache: PublishedCache
) -> None:
    async def body(bench: Bench) -> None:
        view = bench.view(cache.url, keys=(cache.key,))
        await started(bench, view, cache, "tool", "bin/tool")
        for name, made in cache.paths.items():
            files = LINKED.get(name, [])
            assert held(bench, made) <= (len(files) or name == "tool") * (LIBRARY + 4 * FRAME), name
        for name, files in LINKED.items():
            await assert_is_here(bench, view, cache.paths[name], *files)
        assert bench.account.linked_bytes < 6 * (LIBRARY + 5000)
        assert bench.store.stories.rows() == []

    run(tmp_path, eager(body))


def test_a_script_brings_its_interpreter_and_what_that_is_linked_with(
    tmp_path: Path, cache: PublishedCache
) -> None:
    async def body(bench: Bench) -> None:
        view = bench.view(cache.url, keys=(cache.key,))
        await started(bench, view, cache, "script", "bin/script")
        await assert_is_here(bench, view, cache.paths["tool"], "bin/tool")
        for name, files in LINKED.items():
            await assert_is_here(bench, view, cache.paths[name], *files)

    run(tmp_path, eager(body))


@pytest.mark.parametrize(("file", "at"), [("bin/other", 0), ("bin/tool", 4096), ("zz-bulk", 4096)])
def test_other_reads_bring_nothing(tmp_path: Path, cache: PublishedCache, file: str, at: int) -> None:
    async def body(bench: Bench) -> None:
        view = bench.view(cache.url, keys=(cache.key,))
        row = await looked_up(bench, view, cache.paths["tool"])
        await read(bench, view, row, file, at)
        assert not bench.store._libraries.tasks
        await settled()
        assert all(held(bench, cache.paths[name]) == 0 for name in LINKED)

    run(tmp_path, eager(body))


def test_without_prefetching_nothing_comes(tmp_path: Path, cache: PublishedCache) -> None:
    async def body(bench: Bench) -> None:
        view = bench.view(cache.url, keys=(cache.key,))
        await started(bench, view, cache, "tool", "bin/tool")
        assert all(held(bench, cache.paths[name]) == 0 for name in LINKED)

    run(tmp_path, body)


def test_nothing_is_loaded_twice_in_a_session(tmp_path: Path, cache: PublishedCache) -> None:
    async def body(bench: Bench) -> None:
        view = bench.view(cache.url, keys=(cache.key,))
        row = await started(bench, view, cache, "tool", "bin/tool")
        await read(bench, view, row, "bin/tool")
        assert not bench.store._libraries.tasks
        libc = await looked_up(bench, view, cache.paths["libc"])
        await read(bench, view, libc, "lib/libc.so.6")
        assert not bench.store._libraries.tasks

    run(tmp_path, eager(body))


def test_no_more_is_loaded_than_a_program_may_have(
    tmp_path: Path, cache: PublishedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "BYTES", 2 * (LIBRARY + 5000))

    async def body(bench: Bench) -> None:
        view = bench.view(cache.url, keys=(cache.key,))
        await started(bench, view, cache, "tool", "bin/tool")
        assert 0 < bench.account.linked_bytes <= libraries.BYTES

    run(tmp_path, eager(body))


def test_no_more_is_loaded_than_half_of_what_the_cache_may_hold(
    tmp_path: Path, cache: PublishedCache
) -> None:
    async def body(bench: Bench) -> None:
        bench.cache.max_bytes = 3 * LIBRARY
        view = bench.view(cache.url, keys=(cache.key,))
        await started(bench, view, cache, "tool", "bin/tool")
        assert 0 < bench.account.linked_bytes <= 1.5 * LIBRARY

    run(tmp_path, eager(body))


def test_of_a_large_library_only_the_beginning_comes(tmp_path: Path) -> None:
    large = make_elf([b"libnext.so"], filling=noise("large", 5_000_000))
    cache = PublishedCache(
        tmp_path / "published",
        [
            path("tool", {"bin/tool": make_elf([b"liblarge.so"])}),
            path("large", {"lib/liblarge.so": large}, bulk=8_000_000),
            path("next", {"lib/libnext.so": library("next")}),
        ],
        references={"tool": ["large"], "large": ["next"]},
    )

    async def body(bench: Bench) -> None:
        view = bench.view(cache.url, keys=(cache.key,))
        await started(bench, view, cache, "tool", "bin/tool")
        assert 500_000 < held(bench, cache.paths["large"]) < 1_000_000
        await assert_is_here(bench, view, cache.paths["next"], "lib/libnext.so")

    run(tmp_path, eager(body))


@pytest.mark.parametrize("verify", ["strict", "deferred"])
@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_from_an_ordinary_cache_the_linked_paths_come_whole(
    tmp_path: Path, compression: str, verify: str
) -> None:
    made = world()
    cache = SignedCache(tmp_path / "ordinary", made, compression=compression, references=REFERENCES)

    async def body(bench: Bench) -> None:
        view = bench.view(f"file://{cache.directory}", keys=(cache.key,), verify=verify)
        row = await looked_up(bench, view, cache.paths["tool"])
        await read(bench, view, row, "bin/tool")
        await settled()
        whole = {
            name
            for name, info in cache.infos.items()
            if (now := bench.cache.index.path_of(info.store_path, info.nar_hash))
            and now.nar is NarState.WHOLE
        }
        assert whole == {"tool", *LINKED}

    run(tmp_path, eager(body))


# Readers go first, and nothing that goes wrong is theirs.


def test_a_reader_does_not_wait_behind_it(tmp_path: Path, cache: PublishedCache) -> None:
    """All places of the background are taken by answers that do not come: demanded reads are answered all the same."""

    async def body(bench: Bench) -> None:
        view = bench.view(server.url, keys=(cache.key,))
        rows = {name: await looked_up(bench, view, made) for name, made in cache.paths.items()}
        for name in LINKED:
            server.fail(f"/nar/{cache.nar(name).name}", Stall())
        await read(bench, view, rows["tool"], "bin/tool")
        nars = [f"/nar/{cache.nar(name).name}" for name in ("liba", "libb", "libc")]
        await asyncio.to_thread(eventually, lambda: all(map(server.count, nars)))
        async with asyncio.timeout(10):
            await read(bench, view, rows["unused"], "lib/libA.so.1")
            await read(bench, view, rows["tool"], "zz-bulk", 500_000)
        server.heal()
        await settled()
        for name, files in LINKED.items():
            await assert_is_here(bench, view, cache.paths[name], *files)

    with FaultyServer(cache.directory) as server:
        run(tmp_path, eager(body))


def test_a_reader_asks_himself_for_what_waits_in_the_background(
    tmp_path: Path, cache: PublishedCache
) -> None:
    """libd is found while the places of the background are taken: its reader does not wait for them."""

    async def body(bench: Bench) -> None:
        view = bench.view(server.url, keys=(cache.key,))
        rows = {name: await looked_up(bench, view, made) for name, made in cache.paths.items()}
        places = bench.store.parts._fetch._unasked
        while not places.locked():
            await places.acquire()
        await read(bench, view, rows["tool"], "bin/tool")
        await asyncio.to_thread(eventually, lambda: places._waiters)
        async with asyncio.timeout(10):
            for name, files in LINKED.items():
                for file in files:
                    await read(bench, view, rows[name], file)
        places.release()
        await settled()

    with FaultyServer(cache.directory) as server:
        run(tmp_path, eager(body))


def test_a_library_that_cannot_be_had_is_a_story_and_the_others_come(
    tmp_path: Path, cache: PublishedCache
) -> None:
    async def body(bench: Bench) -> None:
        view = bench.view(server.url, keys=(cache.key,))
        for made in cache.paths.values():
            await looked_up(bench, view, made)
        server.fail(f"/nar/{cache.nar('liba').name}", Status(404))
        await started(bench, view, cache, "tool", "bin/tool")
        await assert_is_here(bench, view, cache.paths["libb"], "lib/libB.so")
        await assert_is_here(bench, view, cache.paths["libc"], "lib/ld.so", "lib/libc.so.6")
        assert any("liba" in story.path for story in bench.store.stories.rows())
        assert held(bench, cache.paths["liba"]) == 0

    with FaultyServer(cache.directory) as server:
        run(tmp_path, eager(body))


def test_a_program_that_turns_out_wrong_is_its_readers_failure(tmp_path: Path) -> None:
    """A deferred reader sees its beginning before the rest is known to be wrong: no library is asked for on its word then."""
    cache = SignedCache(tmp_path / "ordinary", world(), compression="zstd", references=REFERENCES)

    async def body(bench: Bench) -> None:
        view = bench.view(server.url, keys=(cache.key,), verify="deferred")
        row = await looked_up(bench, view, cache.paths["tool"])
        server.fail(cache.file("tool", "nar"), Flipped(-1_000_000))
        with contextlib.suppress(VeneerError):  # when the end was faster
            await read(bench, view, row, "bin/tool")
        await settled()
        assert not any(story.path.startswith("libraries") for story in bench.store.stories.rows())
        assert bench.condemned
        assert server.count(cache.file("libb", "nar")) == 0

    with FaultyServer(cache.directory) as server:
        run(tmp_path, eager(body))


def test_the_end_of_the_store_ends_it(tmp_path: Path, cache: PublishedCache) -> None:
    async def body(bench: Bench) -> None:
        view = bench.view(server.url, keys=(cache.key,))
        row = await looked_up(bench, view, cache.paths["tool"])
        for name in LINKED:
            server.fail(f"/nar/{cache.nar(name).name}", Stall())
        await read(bench, view, row, "bin/tool")
        assert bench.store._libraries.tasks
        assert view.identity in bench.store.owners
        async with asyncio.timeout(10):
            await bench.store.close()

    with FaultyServer(cache.directory) as server:
        run(tmp_path, eager(body))


@pytest.mark.parametrize(
    "program",
    [
        b"\x7fELF" + bytes(5000),
        b"#!",
        b"#!\n" * 100,
        b"#!/nix/store/\xff\n",
        b"#! /nix/store/../../etc/passwd\n",
        make_elf([b"x" * 3000] * 200, runpath=b":".join([b"/nix/store/" + b"0" * 32 + b"-x/lib"] * 500)),
        make_elf([b"../../../../etc/passwd", b"/etc/passwd", b""], interpreter=b"/nix/store"),
        make_elf([b"libtool.so"], runpath=b"$ORIGIN/../../../../lib:$LIB:${ORIGIN}/../bin"),
        make_elf([b"libtool.so"], filling=noise("f", 900))[:1000],
    ],
    ids=["zeros", "short", "lines", "no text", "above", "many", "outside", "origin", "cut"],
)
def test_what_is_no_program_or_a_strange_one_harms_nobody(tmp_path: Path, program: bytes) -> None:
    cache = PublishedCache(
        tmp_path / "published",
        [path("tool", {"bin/tool": program, "bin/libtool.so": make_elf([b"libtool.so"])})],
    )

    async def body(bench: Bench) -> None:
        view = bench.view(cache.url, keys=(cache.key,))
        await started(bench, view, cache, "tool", "bin/tool")
        assert bench.store.stories.rows() == []

    run(tmp_path, eager(body))
