"""The store over caches written by real Nix, on disk: what is served, what is refused, what is moved how often."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from tests.support.damage import flip, nar_file_of
from tests.support.golden import FOREIGN, GOLDEN, PATHS, copy_of, url
from tests.support.store_bench import Bench, eager, run
from veneer.model.errors import HashMismatchError, SourceError, TrustError, VeneerError
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath
from veneer.sources.base import Meter, unmetered
from veneer.store import access
from veneer.store.remembered import RememberedSource
from veneer.store.resolve import AbsentError


@pytest.mark.parametrize("cache", ["none", "xz", "zstd", "zstd-without-listings"])
def test_every_path_is_served_with_the_bytes_that_nix_packed(tmp_path: Path, cache: str) -> None:
    async def body(bench: Bench) -> None:
        view = bench.view(url(cache))
        for name, path in PATHS.items():
            if not (GOLDEN / cache / f"{path.hash_part}.narinfo").exists():
                continue
            row = await bench.store.lookup(view, path, bench.account)
            ready = await bench.store.content(view, row.number, 0, row.nar_size, bench.account)
            assert (ready.number, ready.end, ready.whole) == (row.number, row.nar_size, True)
            assert bench.nar(row.number) == (GOLDEN / f"{name}.nar").read_bytes()
            bench.tree(row.number).verify()
        assert bench.condemned == []

    run(tmp_path, body)


def test_metadata_with_listings_moves_no_nar(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        view = bench.view(url("zstd"))
        row = await bench.store.lookup(view, PATHS["outputs"], bench.account)
        assert bench.tree(row.number).root.kind
        assert bench.cache.index.totals().nars == 0

    run(tmp_path, body)


def test_a_path_without_a_trusted_signature_is_refused_and_the_story_names_the_keys(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        with pytest.raises(TrustError, match="golden-1") as refusal:
            await bench.store.lookup(bench.view(url("zstd"), keys=(FOREIGN,)), PATHS["text"], bench.account)
        assert "other-1" in str(refusal.value)
        assert bench.store.stories.rows()

    run(tmp_path, body)


def test_a_source_called_trusted_needs_no_signature(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        view = bench.view(url("zstd") + "?trusted=true", keys=())
        assert (await bench.store.lookup(view, PATHS["text"], bench.account)).number

    run(tmp_path, body)


def test_a_path_that_came_through_one_view_is_not_served_in_a_view_without_its_key(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        await bench.store.whole(bench.view(url("zstd")), PATHS["text"], bench.account)
        with pytest.raises(TrustError):
            await bench.store.lookup(bench.view(url("zstd"), keys=(FOREIGN,)), PATHS["text"], bench.account)

    run(tmp_path, body)


def test_an_absent_path_is_absent_until_its_time_and_then_asked_again(tmp_path: Path) -> None:
    cache = copy_of("zstd", tmp_path / "source")
    path = PATHS["text"]
    narinfo = cache / f"{path.hash_part}.narinfo"
    content = narinfo.read_bytes()
    narinfo.unlink()

    async def body(bench: Bench) -> None:
        view = bench.view(f"file://{cache}", ttl=10)
        with pytest.raises(AbsentError):
            await bench.store.lookup(view, path, bench.account)
        narinfo.write_bytes(content)
        with pytest.raises(AbsentError):
            await bench.store.lookup(view, path, bench.account)
        bench.clock.now += 11
        assert (await bench.store.lookup(view, path, bench.account)).store_path == path
        assert bench.present == [path]

    run(tmp_path, body)


def test_an_absence_is_told_with_what_is_left_of_its_time(tmp_path: Path) -> None:
    path = PATHS["text"]
    empty = copy_of("zstd", tmp_path / "empty")
    (empty / f"{path.hash_part}.narinfo").unlink()

    async def body(bench: Bench) -> None:
        first = bench.view(f"file://{empty}", ttl=10)
        both = bench.view(f"file://{empty}", f"file://{empty}?priority=50&other=1", ttl=10)
        with pytest.raises(AbsentError) as caught:
            await bench.store.lookup(first, path, bench.account)
        assert caught.value.seconds == 10
        bench.clock.now += 7
        for view in (first, both):  # the second source is asked now, and its answer holds longer
            with pytest.raises(AbsentError) as caught:
                await bench.store.lookup(view, path, bench.account)
            assert caught.value.seconds == pytest.approx(3)
        with pytest.raises(AbsentError) as caught:
            await bench.store.lookup(bench.view(f"file://{empty}", ttl=0), path, bench.account)
        assert caught.value.seconds == 0

    run(tmp_path, body)


def test_another_name_with_the_same_hash_part_is_absent(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        with pytest.raises(AbsentError):
            await bench.store.lookup(
                bench.view(url("zstd")), StorePath(PATHS["text"].hash_part, "other"), bench.account
            )

    run(tmp_path, body)


def test_a_corrupt_nar_is_quarantined_and_the_next_source_serves(tmp_path: Path) -> None:
    bad = copy_of("none", tmp_path / "bad")
    path = PATHS["leaf"]
    nar = nar_file_of(bad, path.hash_part)
    flip(nar)

    async def body(bench: Bench) -> None:
        view = bench.view(f"file://{bad}?priority=1", url("zstd") + "?priority=2")
        row = await bench.store.whole(view, path, bench.account)
        assert bench.nar(row.number) == (GOLDEN / "leaf.nar").read_bytes()
        assert any("leaf" in story.path for story in bench.store.stories.rows())
        alone = bench.view(f"file://{bad}")
        bench.cache.nars.drop(row.number)
        with pytest.raises((HashMismatchError, VeneerError), match="quarantined"):
            await bench.store.whole(alone, path, bench.account)

    run(tmp_path, body)


def test_a_truncated_nar_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    bad = copy_of("xz", tmp_path / "bad")
    nar = nar_file_of(bad, PATHS["leaf"].hash_part)
    nar.write_bytes(nar.read_bytes()[:-20])

    async def body(bench: Bench) -> None:
        with pytest.raises(VeneerError):
            await bench.store.whole(bench.view(f"file://{bad}"), PATHS["leaf"], bench.account)
        assert not list((bench.cache.root / "incoming").iterdir())
        assert bench.cache.index.totals().nars == 0

    run(tmp_path, body)


def test_a_listing_that_lied_condemns_its_number_and_the_path_lives_on(tmp_path: Path) -> None:
    lying = copy_of("none", tmp_path / "lying")
    path = PATHS["text"]
    listing = lying / f"{path.hash_part}.ls"
    document = json.loads(listing.read_bytes())
    document["root"]["executable"] = True
    document["root"].pop("narOffset")
    listing.write_text(json.dumps(document))

    async def body(bench: Bench) -> None:
        view = bench.view(f"file://{lying}")
        try:
            first = await bench.store.lookup(view, path, bench.account)
        except VeneerError as error:  # a listing whose length does not fit is not even published
            raise AssertionError(error) from error
        row = await bench.store.whole(view, path, bench.account)
        assert not bench.tree(row.number).root.mode & 0o111
        if first.number != row.number:
            assert bench.condemned == [(first.number, path)]
            with pytest.raises(HashMismatchError):
                await bench.store.content(view, first.number, 0, 1, bench.account)
        assert (await bench.store.lookup(view, path, bench.account)).number == row.number

    run(tmp_path, body)


class CountingSource:
    """A real source whose NAR stream waits for a signal and is counted."""

    def __init__(self, inner: RememberedSource) -> None:
        self.inner = inner
        self.nars = 0
        self.asked = asyncio.Event()
        self.go = asyncio.Event()
        original = inner.nar

        def nar(info: UnverifiedPathInfo, meter: Meter = unmetered) -> AsyncGenerator[bytes, None]:
            self.nars += 1
            self.asked.set()
            return self._after(original(info, meter))

        inner.nar = nar  # type: ignore[method-assign]

    async def _after(self, chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        await self.go.wait()
        async for chunk in chunks:
            yield chunk


def test_a_hundred_readers_share_one_download_and_one_that_leaves_stops_nobody(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        view = bench.view(url("zstd"))
        source = view.chain.sources[0]
        assert isinstance(source, RememberedSource)
        counting = CountingSource(source)
        row = await bench.store.lookup(view, PATHS["leaf"], bench.account)
        readers = [
            asyncio.create_task(bench.store.content(view, row.number, 0, 10, bench.account))
            for _ in range(100)
        ]
        await counting.asked.wait()
        readers[0].cancel()
        counting.go.set()
        results = await asyncio.gather(*readers, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert {r.number for r in results[1:] if not isinstance(r, BaseException)} == {row.number}
        assert counting.nars == 1

    run(tmp_path, body)


def test_deferred_serves_a_prefix_while_the_rest_is_under_way(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        view = bench.view(url("none"), verify="deferred")
        row = await bench.store.lookup(view, PATHS["leaf"], bench.account)
        ready = await bench.store.content(view, row.number, 0, 1, bench.account)
        assert ready.number == row.number
        assert ready.end >= 1
        whole = await bench.store.content(view, row.number, 0, row.nar_size, bench.account)
        assert whole.end == row.nar_size

    run(tmp_path, body)


def test_the_closure_is_found_whole_and_each_narinfo_is_asked_once(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        view = bench.view(url("zstd"))
        found = await bench.store.closure(view, [PATHS["outputs"]], bench.account)
        for info in found.values():
            assert set(info.info.references) <= set(found)
        before = bench.account.wire_bytes
        again = await bench.store.closure(view, [PATHS["outputs"]], bench.account)
        assert list(again) and set(again) == set(found)
        assert bench.account.wire_bytes == before

    run(tmp_path, body)


def test_a_hole_in_a_closure_is_an_error_and_not_a_smaller_closure(tmp_path: Path) -> None:
    cache = copy_of("zstd", tmp_path / "holed")

    async def body(bench: Bench) -> None:
        found = await bench.store.closure(bench.view(url("zstd")), [PATHS["outputs.dev"]], bench.account)
        missing = next(path for path in found if path != PATHS["outputs.dev"])
        (cache / f"{missing.hash_part}.narinfo").unlink()
        with pytest.raises(AbsentError, match=missing.name):
            await bench.store.closure(bench.view(f"file://{cache}"), [PATHS["outputs.dev"]], bench.account)

    run(tmp_path, body)


def test_an_evicted_path_is_announced_and_comes_back_on_the_next_read(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        view = bench.view(url("zstd"))
        row = await bench.store.whole(view, PATHS["leaf"], bench.account)
        assert [path for path, _ in bench.store.evict(0)] == [PATHS["leaf"]]
        assert bench.dropped == [row.number]
        ready = await bench.store.content(view, row.number, 0, 1, bench.account)
        assert ready.number == row.number
        assert bench.cache.nars.has(row.number)

    run(tmp_path, body)


def test_a_source_that_is_gone_is_an_error_of_the_source_and_never_absence(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        with pytest.raises(SourceError):
            await bench.store.lookup(bench.view("http://127.0.0.1:9"), PATHS["leaf"], bench.account)

    run(tmp_path, body)


def test_a_session_that_asks_for_most_of_a_closure_gets_the_rest_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "MIN_PATHS", 1)
    monkeypatch.setattr(access, "SHARE", 0.0)

    async def body(bench: Bench) -> None:
        view = bench.view(url("zstd"))
        closure = await bench.store.closure(view, [PATHS["outputs.dev"]], bench.account)
        row = await bench.store.lookup(view, PATHS["outputs.dev"], bench.account)
        await bench.store.content(view, row.number, 0, 1, bench.account)
        while bench.cache.index.totals().nars < len(closure):
            rest = [task for task in asyncio.all_tasks() if task.get_name() == "content ahead"]
            assert rest, "nobody fetches the rest"
            await asyncio.wait(rest)

    run(tmp_path, eager(body))


def test_a_clock_that_was_set_back_does_not_prolong_an_absence(tmp_path: Path) -> None:
    cache = copy_of("zstd", tmp_path / "source")
    narinfo = cache / f"{PATHS['text'].hash_part}.narinfo"
    content = narinfo.read_bytes()
    narinfo.unlink()

    async def body(bench: Bench) -> None:
        view = bench.view(f"file://{cache}", ttl=10)
        with pytest.raises(AbsentError):
            await bench.store.lookup(view, PATHS["text"], bench.account)
        narinfo.write_bytes(content)
        bench.clock.now -= 3600
        assert (await bench.store.lookup(view, PATHS["text"], bench.account)).number

    run(tmp_path, body)


def test_a_closure_larger_than_the_cache_is_never_fetched_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "MIN_PATHS", 1)
    monkeypatch.setattr(access, "SHARE", 0.0)

    async def body(bench: Bench) -> None:
        view = bench.view(url("zstd"))
        await bench.store.closure(view, [PATHS["outputs.dev"]], bench.account)
        bench.cache.max_bytes = bench.account.closure_bytes - 1
        row = await bench.store.lookup(view, PATHS["outputs.dev"], bench.account)
        await bench.store.content(view, row.number, 0, 1, bench.account)
        assert "content ahead" not in {task.get_name() for task in asyncio.all_tasks()}

    run(tmp_path, eager(body))


def test_what_was_opened_stays_readable_when_a_better_source_has_another_build_of_it(tmp_path: Path) -> None:
    path, other = PATHS["leaf"], PATHS["text"]
    better = copy_of("none", tmp_path / "better")
    narinfo = better / f"{path.hash_part}.narinfo"
    narinfo.unlink()

    async def body(bench: Bench) -> None:
        view = bench.view(f"file://{better}?priority=1&trusted=true", url("none") + "?priority=2", ttl=10)
        row = await bench.store.lookup(view, path, bench.account)
        text = (better / f"{other.hash_part}.narinfo").read_text()
        narinfo.write_text(
            text.replace(other.basename, path.basename).replace(other.hash_part, path.hash_part)
        )
        bench.clock.now += 11
        assert await bench.store.tree(view, row.number, bench.account) == row.number
        assert (await bench.store.content(view, row.number, 0, 1, bench.account)).whole
        assert bench.nar(row.number) == (GOLDEN / "leaf.nar").read_bytes()
        assert (await bench.store.lookup(view, path, bench.account)).number != row.number

    run(tmp_path, body)
