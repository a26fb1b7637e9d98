"""A closure's bundle spares its requests, and a bad one costs nothing but itself. Over HTTP, requests counted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.callers import eventually
from tests.support.faulty_http import Body, Fault, FaultyServer, Reset, Stall, Status
from tests.support.published import SECRET, closure_path, make_closure, publish_closure
from tests.support.store_bench import Bench, run
from veneer.daemon.compose import build_view
from veneer.daemon.worker_paths import KnownPaths
from veneer.formats.bundle import CHUNKS, LISTING, NARINFO, Entry, parse_bundle, write_bundle
from veneer.formats.narinfo import parse_narinfo, write_narinfo
from veneer.formats.signature import SecretKey, fingerprint
from veneer.model.errors import SourceError
from veneer.model.store_path import StorePath
from veneer.store import bundled
from veneer.store.remembered import RememberedSource
from veneer.store.views import View, ViewConfig

COUNT = 20
INFOS = make_closure(COUNT)
ROOT = INFOS[-1].store_path
FIRST = closure_path(0)
BUNDLE = f"/{ROOT.hash_part}.bundle"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("published")
    publish_closure(directory, INFOS)
    return directory


def view_of(bench: Bench, url: str, key: str = str(SECRET.public_key())) -> View:
    """With stories."""
    config = ViewConfig.from_json({"sources": [{"url": url}], "keys": [key]})
    view = build_view(config, bench.cache, bench.clock, lambda at, error: bench.store.stories.add(at, error))
    bench.views.append(view)
    return view


def source_of(view: View) -> RememberedSource:
    (source,) = view.chain.sources
    assert isinstance(source, RememberedSource)
    return source


def over_http(
    tmp_path: Path, place: Path, body: Callable[[Bench, View, FaultyServer], Awaitable[None]]
) -> None:
    async def within(bench: Bench) -> None:
        await body(bench, view_of(bench, server.url), server)

    with FaultyServer(place) as server:
        run(tmp_path, within)


def entries_of(place: Path) -> list[Entry]:
    return list(parse_bundle((place / BUNDLE.lstrip("/")).read_bytes(), ROOT.hash_part))


def changed(place: Path, change: Callable[[Entry], Entry | None], root: str = ROOT.hash_part) -> Body:
    """An answer with the bundle whose entries were changed or left out."""
    entries = [new for entry in entries_of(place) if (new := change(entry)) is not None]
    return Body(write_bundle(root, entries))


async def everything(bench: Bench, view: View) -> None:
    """The closure, then each path's tree and content; with what was published, whatever the bundle was."""
    found = await bench.store.closure(view, [ROOT], bench.account)
    assert {path: (info.info.nar_hash, info.info.nar_size) for path, info in found.items()} == {
        info.store_path: (info.nar_hash, info.nar_size) for info in INFOS
    }
    for path in found:
        assert (await bench.store.lookup(view, path, bench.account)).store_path == path
        await bench.store.whole(view, path, bench.account)


def test_a_closure_and_its_listings_come_in_two_requests(tmp_path: Path, place: Path) -> None:
    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        found = await bench.store.closure(view, [ROOT], bench.account)
        assert len(found) == COUNT
        assert server.count("*.narinfo") == 1 and server.count(BUNDLE) == 1
        for path in found:
            await bench.store.lookup(view, path, bench.account)
        assert server.count() == 2, server.seen
        await everything(bench, view)
        assert server.count() == 2 + COUNT
        assert bench.stories() == ""

    over_http(tmp_path, place, body)


def test_chunk_maps_come_in_it_too_and_each_is_handed_out_once(tmp_path: Path, place: Path) -> None:
    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        await bench.store.closure(view, [ROOT], bench.account)
        source, file = source_of(view), place / f"{FIRST.hash_part}{CHUNKS}"
        for expected in (0, 1):
            data = await source.sidecar(FIRST.hash_part, CHUNKS, 1 << 20)
            assert data == file.read_bytes()
            assert server.count(f"*{CHUNKS}") == expected
        assert await source.sidecar(closure_path(1).hash_part, CHUNKS, 1 << 20)
        with pytest.raises(SourceError):
            await source.sidecar(closure_path(2).hash_part, CHUNKS, 10)

    over_http(tmp_path, place, body)


def test_what_the_bundle_told_outlasts_the_view(tmp_path: Path, place: Path) -> None:
    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        await bench.store.closure(view, [ROOT], bench.account)
        await bench.store.closure(view_of(bench, server.url), [ROOT], bench.account)
        assert server.count() == 2

    over_http(tmp_path, place, body)


def test_after_an_interrupted_start_the_next_one_fetches_the_bundle(tmp_path: Path, place: Path) -> None:
    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        server.fail(BUNDLE, Stall())
        await bench.store.resolver.path_info(view, ROOT, bench.account)
        await view.close()
        server.heal()
        later = view_of(bench, f"{server.url}?priority=50")  # of the same source, with no memory of its own
        assert source_of(later).url == source_of(view).url
        assert len(await bench.store.closure(later, [ROOT], bench.account)) == COUNT
        assert server.count(f"*{NARINFO}") == 1
        for _ in range(3):
            await bench.store.closure(later, [ROOT], bench.account)
        assert server.count(BUNDLE) <= 2

    over_http(tmp_path, place, body)


def test_many_who_ask_at_once_share_one_bundle(tmp_path: Path, place: Path) -> None:
    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(bench.store.closure(view, [ROOT], bench.account))
        assert server.count() == 2

    over_http(tmp_path, place, body)


def test_what_nix_asks_through_its_socket_profits_too(tmp_path: Path, place: Path) -> None:
    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        told: set[StorePath] = set()
        complete = asyncio.Event()

        def trusted(path: StorePath) -> None:
            told.add(path)
            if len(told) == COUNT:
                complete.set()

        known = KnownPaths(bench.store.resolver, view, trusted, parallel=64)
        assert await known.info(ROOT, bench.account, 10)
        await asyncio.wait_for(complete.wait(), 10)
        assert server.count() == 2
        await known.close()

    over_http(tmp_path, place, body)


def test_who_looks_up_one_path_does_not_wait_for_a_slow_bundle(tmp_path: Path, place: Path) -> None:
    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        server.fail(BUNDLE, Stall())
        await bench.store.lookup(view, ROOT, bench.account)
        await asyncio.wait_for(bench.store.lookup(view, FIRST, bench.account), 10)
        closure = asyncio.create_task(bench.store.closure(view, [ROOT], bench.account))
        server.heal()
        assert len(await closure) == COUNT
        assert server.count(f"*{NARINFO}") == 2

    over_http(tmp_path, place, body)


def test_who_asks_for_many_does_not_wait_for_ever(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "WAIT_SECONDS", 0.05)

    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        server.fail(BUNDLE, Stall())
        assert len(await bench.store.closure(view, [ROOT], bench.account)) == COUNT
        assert server.count(f"*{NARINFO}") == COUNT

    over_http(tmp_path, place, body)


def test_a_lookup_under_way_takes_the_bundles_answer_when_that_is_faster(tmp_path: Path, place: Path) -> None:
    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        server.fail(BUNDLE, Stall())
        server.fail(f"/{FIRST.hash_part}.*", Stall())
        await bench.store.lookup(view, ROOT, bench.account)
        lookup = asyncio.create_task(bench.store.lookup(view, FIRST, bench.account))
        await asyncio.to_thread(eventually, lambda: server.count(f"/{FIRST.hash_part}.*"))
        server.heal()
        assert (await lookup).store_path == FIRST

    over_http(tmp_path, place, body)


def test_a_bundle_is_not_fetched_when_most_of_it_is_known(tmp_path: Path, place: Path) -> None:
    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        for info in INFOS[: COUNT // 2 - 4]:
            await bench.store.resolver.path_info(view, info.store_path, bench.account)
        assert len(await bench.store.closure(view, [ROOT], bench.account)) == COUNT
        assert server.count(BUNDLE) == 0

    over_http(tmp_path, place, body)


def cut(place: Path) -> Body:
    return Body((place / BUNDLE.lstrip("/")).read_bytes()[:-100])


def of_another_root(place: Path) -> Body:
    entries = entries_of(place)
    return Body(write_bundle(FIRST.hash_part, [e for e in entries if e.hash_part == FIRST.hash_part]))


def mislabelled(place: Path) -> Body:
    """One path's narinfo under another one's name."""
    other = next(e for e in entries_of(place) if e.hash_part == closure_path(1).hash_part)
    return changed(place, lambda e: replace(e, body=other.body) if _is(e, FIRST.hash_part, NARINFO) else e)


def of_another_build(place: Path) -> Body:
    info = parse_narinfo(entries_of(place)[0].body)
    body = write_narinfo(replace(info, nar_hash=INFOS[0].nar_hash))
    return changed(place, lambda e: replace(e, body=body) if _is(e, ROOT.hash_part, NARINFO) else e)


def unreadable(place: Path) -> Body:
    return changed(place, lambda e: replace(e, body=b"no") if _is(e, FIRST.hash_part, NARINFO) else e)


def _is(entry: Entry, hash_part: str, suffix: str) -> bool:
    return (entry.hash_part, entry.suffix) == (hash_part, suffix)


@pytest.mark.parametrize("bad", [cut, of_another_root, mislabelled, of_another_build, unreadable])
def test_a_bundle_that_is_wrong_anywhere_is_told_and_not_used(
    tmp_path: Path, place: Path, bad: Callable[[Path], Body]
) -> None:
    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        server.fail(BUNDLE, bad(place))
        await everything(bench, view)
        assert (server.count(f"*{NARINFO}"), server.count(f"*{LISTING}")) == (COUNT, COUNT)
        assert server.count(BUNDLE) == 1
        assert BUNDLE in bench.stories()

    over_http(tmp_path, place, body)


@pytest.mark.parametrize("fault", [Status(404), Status(403), Reset(10), Status(400), Body(b"")])
def test_a_bundle_that_cannot_be_had_is_told_and_done_without(
    tmp_path: Path, place: Path, fault: Fault
) -> None:
    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        server.fail(BUNDLE, fault)
        await everything(bench, view)
        assert server.count(f"*{NARINFO}") == COUNT
        assert BUNDLE in bench.stories()

    over_http(tmp_path, place, body)


def test_a_bundle_beyond_the_limit_is_not_read(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.formats.bundle.MAX_SIZE", 1000)

    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        await everything(bench, view)
        assert server.count(f"*{NARINFO}") == COUNT
        assert BUNDLE in bench.stories()

    over_http(tmp_path, place, body)


def test_a_narinfo_in_it_that_nobody_signed_is_asked_for_by_itself(tmp_path: Path, place: Path) -> None:
    stranger = SecretKey.generate("published-1")

    def resigned(entry: Entry) -> Entry:
        if entry.suffix != NARINFO or entry.hash_part not in (
            FIRST.hash_part,
            closure_path(COUNT // 2).hash_part,
        ):
            return entry
        info = replace(parse_narinfo(entry.body), nar_hash=INFOS[3].nar_hash)
        return replace(
            entry, body=write_narinfo(replace(info, signatures=(stranger.sign(fingerprint(info)),)))
        )

    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        server.fail(BUNDLE, changed(place, resigned))
        await everything(bench, view)
        assert server.count(f"*{NARINFO}") == 3
        assert f"{FIRST}: {FIRST} has no valid signature" in bench.stories()

    over_http(tmp_path, place, body)


def test_a_narinfo_in_it_whose_nar_is_not_there_is_asked_for_by_itself(tmp_path: Path, place: Path) -> None:
    def moved(entry: Entry) -> Entry:
        if not _is(entry, FIRST.hash_part, NARINFO):
            return entry
        return replace(entry, body=entry.body.replace(b"URL: nar/", b"URL: nar/gone-"))

    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        server.fail(BUNDLE, changed(place, moved))
        await everything(bench, view)
        assert server.count(f"*{NARINFO}") == 2
        assert "404" in bench.stories()

    over_http(tmp_path, place, body)


def test_a_path_that_the_bundle_alone_has_is_no_endless_question(tmp_path: Path, place: Path) -> None:
    def moved(entry: Entry) -> Entry:
        return replace(entry, body=entry.body.replace(b"URL: nar/", b"URL: nar/gone-"))

    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        server.fail(BUNDLE, changed(place, lambda e: moved(e) if _is(e, FIRST.hash_part, NARINFO) else e))
        server.fail(f"/{FIRST.hash_part}.*", Status(404))
        await bench.store.closure(view, [ROOT], bench.account)
        with pytest.raises(SourceError):
            await bench.store.whole(view, FIRST, bench.account)
        assert server.count(f"/{FIRST.hash_part}{NARINFO}") == 1

    over_http(tmp_path, place, body)


def test_what_the_source_itself_has_said_counts_more(tmp_path: Path, place: Path) -> None:
    def older(entry: Entry) -> Entry:
        if entry.hash_part != FIRST.hash_part:
            return entry
        if entry.suffix == NARINFO:
            return replace(entry, body=entry.body.replace(b"URL: nar/", b"URL: nar/gone-"))
        return replace(entry, body=b"{}")

    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        server.fail(BUNDLE, changed(place, older))
        known = await bench.store.resolver.path_info(view, FIRST, bench.account)
        found = await bench.store.closure(view, [ROOT], bench.account)
        assert found[FIRST] == known
        await bench.store.lookup(view, FIRST, bench.account)
        assert server.count(f"*{LISTING}") == 1
        assert server.count(f"*{NARINFO}") == 2

    over_http(tmp_path, place, body)


def test_what_waits_in_memory_is_bounded(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sizes(suffix: str) -> Sequence[int]:
        return [len(e.body) for e in entries_of(place) if e.suffix == suffix]

    monkeypatch.setattr(bundled, "KEPT", max(sizes(CHUNKS)) * 5)

    async def body(bench: Bench, view: View, server: FaultyServer) -> None:
        await bench.store.closure(view, [ROOT], bench.account)
        source = source_of(view)
        for info in INFOS:
            assert await source.sidecar(info.store_path.hash_part, CHUNKS, 1 << 20)
        assert COUNT - 5 <= server.count(f"*{CHUNKS}") < COUNT

    over_http(tmp_path, place, body)
