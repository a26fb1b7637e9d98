"""What every source does, whatever lies behind it.

A new transport of binary caches is one more row in ``PLACES``, for tests with ``check``; another kind of source is one more
``Place``, for tests with ``place``, which every source passes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import brotli
import pytest
import zstandard

from tests.support.faulty_http import FaultyServer
from tests.support.nix_store import file_entry, write_store
from tests.support.raw_http import RawServer, Request, chunked, response
from tests.support.source_cache import ABSENT, LISTING, Entry, entry, write_cache
from veneer.formats.listing import parse_listing
from veneer.formats.nar import tree_of_nar
from veneer.model.errors import FormatError, LimitError, SourceError, SourceMissingError
from veneer.sources.base import RangesUnsupportedError, Source
from veneer.sources.object_store import ObjectStoreSource
from veneer.sources.options import SourceOptions, parse_source_url
from veneer.sources.store_directory import StoreDirectory

OPTIONS = SourceOptions(connect_seconds=5, stall_seconds=5, backoff_seconds=0.01)
SMALL = entry(1)
BIG = entry(2, 3_500_000, compression="zstd")
ODD = entry(3, url="nar/a%20b%2B%c3%a9.nar")
GONE = entry(5)
UNSIZED = entry(4, compression="xz", sized=False)

Open = Callable[[Path], contextlib.AbstractContextManager[Source]]


@contextlib.contextmanager
def directory_place(root: Path) -> Any:
    yield ObjectStoreSource(parse_source_url(f"file://{root}"), OPTIONS)


@contextlib.contextmanager
def http_place(root: Path) -> Any:
    with FaultyServer(root.parent) as server:
        yield ObjectStoreSource(parse_source_url(f"{server.url}/{root.name}/"), OPTIONS)


@contextlib.contextmanager
def s3_place(root: Path) -> Any:
    """S3's path style is a directory per bucket: any HTTP server will do for anonymous reading."""
    with FaultyServer(root.parent) as server:
        url = f"s3://{root.name}?endpoint={server.url}&region=nowhere-1"
        yield ObjectStoreSource(parse_source_url(url), OPTIONS)


@contextlib.contextmanager
def lengthless_place(root: Path) -> Any:
    """Bodies of undeclared length, as of caches that pack while they send; no ranges."""

    def answer(request: Request) -> Any:
        file = root / unquote(request.target).lstrip("/")
        yield chunked(file.read_bytes()) if file.is_file() else response(status="404 Not Found")

    with RawServer(answer) as server:
        yield ObjectStoreSource(parse_source_url(server.url), OPTIONS)


PLACES: dict[str, Open] = {
    "directory": directory_place,
    "http": http_place,
    "s3": s3_place,
    "http without lengths": lengthless_place,
}


Body = Callable[[Source], Coroutine[Any, Any, None]]
Check = Callable[[Body], None]
CACHES = [*PLACES, pytest.param("nginx", marks=pytest.mark.nginx)]


@dataclass(frozen=True)
class Place:
    """``check(body)`` runs ``body(source)`` on a source that has ``small`` (10 kB) and ``big`` (3.5 MB), and closes it.

    ``gone``: path info of a NAR that it has not. ``ranges``: it can read parts of ``small``.
    """

    check: Check
    small: Entry = SMALL
    big: Entry = BIG
    gone: Entry = GONE
    ranges: bool = True


@pytest.fixture(params=[*CACHES, "store directory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param != "store directory":
        return Place(cache_check(request, tmp_path), ranges=request.param != "http without lengths")
    small, big = write_store(tmp_path / "root", {1: 10_000, 2: 3_500_000})
    config = parse_source_url(f"local?root={tmp_path}/root")
    check = check_of(lambda: contextlib.nullcontext(StoreDirectory(config, OPTIONS)))
    return Place(check, small, big, gone=file_entry(5, 10), ranges=False)


@pytest.fixture(params=CACHES)
def check(request: pytest.FixtureRequest, tmp_path: Path) -> Check:
    """``check(body)`` runs ``body(source)`` on a cache in ``tmp_path / "cache"`` and closes it."""
    return cache_check(request, tmp_path)


def cache_check(request: pytest.FixtureRequest, tmp_path: Path) -> Check:
    root = tmp_path / "cache"
    write_cache(root, SMALL, UNSIZED, BIG)
    write_cache(root, ODD)
    (root / "nar/a%20b%2B%c3%a9.nar").rename(root / "nar/a b+é.nar")
    if request.param == "nginx":
        server = request.getfixturevalue("nginx")(root)
        config = parse_source_url(server.url)
        return check_of(lambda: contextlib.nullcontext(ObjectStoreSource(config, OPTIONS)))
    opened = PLACES[request.param]
    return check_of(lambda: opened(root))


def check_of(opened: Callable[[], contextlib.AbstractContextManager[Source]]) -> Check:
    def run(body: Body) -> None:
        async def main(source: Source) -> None:
            try:
                await body(source)
            finally:
                await source.close()

        with opened() as source:
            asyncio.run(asyncio.wait_for(main(source), 30))

    return run


async def gather(chunks: AsyncGenerator[bytes, None]) -> bytes:
    parts = []
    async for chunk in chunks:
        assert chunk
        parts.append(chunk)
    return b"".join(parts)


def test_path_info_says_what_is_there(place: Place) -> None:
    async def body(source: Source) -> None:
        for each in (place.small, place.big):
            assert await source.path_info(each.hash_part) == each.info

    place.check(body)


def test_path_info_says_what_the_narinfo_says(check: Check) -> None:
    async def body(source: Source) -> None:
        for each in (SMALL, BIG, ODD, UNSIZED):
            assert await source.path_info(each.hash_part) == each.info

    check(body)


def test_absent_path_is_none(place: Place) -> None:
    async def body(source: Source) -> None:
        assert await source.path_info(ABSENT) is None
        assert await source.listing(ABSENT) is None

    place.check(body)


def test_missing_nar_of_a_known_path_is_an_error(place: Place) -> None:
    async def body(source: Source) -> None:
        with pytest.raises(SourceMissingError) as caught:
            await gather(source.nar(place.gone.info))
        assert place.gone.info.url in caught.value.where

    place.check(body)


def test_nar_of_unknown_size_is_the_whole_file(check: Check) -> None:
    async def body(source: Source) -> None:
        assert await gather(source.nar(UNSIZED.info)) == UNSIZED.file

    check(body)


def test_nar_is_the_whole_file_in_chunks(place: Place) -> None:
    async def body(source: Source) -> None:
        for each in (place.small, place.big):
            assert await gather(source.nar(each.info)) == each.file
        sizes = [len(chunk) async for chunk in source.nar(place.big.info)]
        assert len(sizes) <= 8

    place.check(body)


def test_meters_count_the_bytes_of_a_nar(place: Place) -> None:
    async def body(source: Source) -> None:
        counted: list[int] = []
        await gather(source.nar(place.big.info, counted.append))
        assert sum(counted) == len(place.big.file)

    place.check(body)


def test_listing_is_of_the_nar_if_there_is_one(place: Place) -> None:
    if place.small is SMALL:
        return  # the caches' listings belong to no NAR
    listings: list[bytes | None] = []

    async def body(source: Source) -> None:
        listings.append(await source.listing(place.small.hash_part))

    place.check(body)
    assert listings[0] is not None
    tree = parse_listing(listings[0], nar_size=len(place.small.file))
    assert tree == tree_of_nar([place.small.file])


def test_nar_url_is_percent_decoded_once(check: Check) -> None:
    async def body(source: Source) -> None:
        assert await gather(source.nar(ODD.info)) == ODD.file

    check(body)


def test_meters_count_the_bytes_of_the_wire(check: Check, tmp_path: Path) -> None:
    narinfo = (tmp_path / "cache" / f"{SMALL.hash_part}.narinfo").stat().st_size

    async def body(source: Source) -> None:
        counted: list[int] = []
        await source.path_info(SMALL.hash_part, counted.append)
        assert sum(counted) == narinfo
        await source.path_info(ABSENT, counted.append)
        assert sum(counted) == narinfo
        counted.clear()
        await source.listing(SMALL.hash_part, counted.append)
        assert sum(counted) == len(LISTING)
        counted.clear()
        await gather(source.nar(BIG.info, counted.append))
        assert sum(counted) == len(BIG.file)

    check(body)


def test_listing_is_plain_json(check: Check, tmp_path: Path) -> None:
    (tmp_path / "cache" / f"{BIG.hash_part}.ls").write_bytes(zstandard.ZstdCompressor().compress(LISTING))

    async def body(source: Source) -> None:
        assert await source.listing(SMALL.hash_part) == LISTING
        assert await source.listing(BIG.hash_part) == LISTING

    check(body)


def test_compressed_narinfo_is_recognised(check: Check, tmp_path: Path) -> None:
    file = tmp_path / "cache" / f"{SMALL.hash_part}.narinfo"
    file.write_bytes(brotli.compress(file.read_bytes()))

    async def body(source: Source) -> None:
        assert await source.path_info(SMALL.hash_part) == SMALL.info

    check(body)


def test_any_part_of_a_nar_file_is_given_or_it_is_said_that_there_are_none(place: Place) -> None:
    async def body(source: Source) -> None:
        size = len(place.small.file)
        for offset, length in ((0, 1), (0, size), (size - 1, 1), (100, 5000)):
            if place.ranges:
                part = await source.part(place.small.info, offset, length)
                assert part == place.small.file[offset : offset + length]
            else:
                with pytest.raises(RangesUnsupportedError):
                    await source.part(place.small.info, offset, length)

    place.check(body)


def test_parts_are_of_the_file_as_it_is_stored(check: Check) -> None:
    async def body(source: Source) -> None:
        try:
            part = await source.part(BIG.info, 1000, 2000)
        except RangesUnsupportedError:
            pytest.skip("this server has no ranges")
        assert part == BIG.file[1000:3000] and BIG.info.compression != "none"

    check(body)


def test_a_part_outside_the_file_is_a_mistake_of_the_caller(check: Check) -> None:
    async def body(source: Source) -> None:
        for offset, size in ((len(SMALL.file), 1), (-1, 2), (0, 0)):
            with pytest.raises(ValueError, match="not inside"):
                await source.part(SMALL.info, offset, size)

    check(body)


def test_a_sidecar_is_given_as_it_is_stored(check: Check, tmp_path: Path) -> None:
    (tmp_path / "cache" / f"{SMALL.hash_part}.odd").write_bytes(b"\x28\xb5\x2f\xfd any bytes")

    async def body(source: Source) -> None:
        counted: list[int] = []
        assert (
            await source.sidecar(SMALL.hash_part, ".odd", 100, counted.append)
            == b"\x28\xb5\x2f\xfd any bytes"
        )
        assert sum(counted) == 14
        assert await source.sidecar(ABSENT, ".odd", 100) is None
        with pytest.raises(SourceError, match="too long"):
            await source.sidecar(SMALL.hash_part, ".odd", 13)

    check(body)


def test_nar_file_of_another_size_is_refused(check: Check, tmp_path: Path) -> None:
    file = tmp_path / "cache" / SMALL.info.url

    async def body(source: Source) -> None:
        for content in (SMALL.file[:-1], SMALL.file + b"x", b""):
            file.write_bytes(content)
            with pytest.raises(SourceError):
                await gather(source.nar(SMALL.info))

    check(body)


def test_nar_file_of_unknown_size_may_not_be_endless(check: Check, tmp_path: Path) -> None:
    (tmp_path / "cache" / UNSIZED.info.url).write_bytes(bytes(4 << 20))

    async def body(source: Source) -> None:
        with pytest.raises(SourceError, match="wrong size"):
            await gather(source.nar(UNSIZED.info))

    check(body)


def test_nar_that_points_out_of_its_cache_is_refused(check: Check) -> None:
    async def body(source: Source) -> None:
        for url in ("file:///etc/passwd", "nar/../../secret", "nar/%2e%2e/%2E./secret", "s3://bucket/x"):
            with pytest.raises((SourceError, FormatError)):
                await gather(source.nar(entry(9, url=url).info))

    check(body)


def test_abandoned_nar_leaves_the_source_usable(place: Place) -> None:
    async def body(source: Source) -> None:
        chunks = source.nar(place.big.info)
        assert await anext(chunks)
        await chunks.aclose()
        assert await gather(source.nar(place.big.info)) == place.big.file

    place.check(body)


def test_cancelled_question_leaves_the_source_usable(place: Place) -> None:
    async def body(source: Source) -> None:
        for _ in range(5):
            task = asyncio.create_task(source.path_info(place.small.hash_part))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert await source.path_info(place.small.hash_part) == place.small.info

    place.check(body)


def test_many_questions_at_once(place: Place) -> None:
    async def body(source: Source) -> None:
        wanted = list(itertools.islice(itertools.cycle((place.small, place.big)), 100))
        infos = await asyncio.gather(*(source.path_info(each.hash_part) for each in wanted))
        assert infos == [each.info for each in wanted]
        files = await asyncio.gather(*(gather(source.nar(place.small.info)) for _ in range(16)))
        assert set(files) == {place.small.file}

    place.check(body)


def test_cache_info_is_read_and_has_defaults(check: Check, tmp_path: Path) -> None:
    file = tmp_path / "cache/nix-cache-info"

    async def defaults(source: Source) -> None:
        assert source.priority == 50
        info = await source.nix_cache_info()
        assert (info.store_dir, info.priority) == ("/nix/store", 50)

    async def described(source: Source) -> None:
        assert (await source.nix_cache_info()).priority == 30
        assert source.priority == 30

    file.unlink()
    check(defaults)
    file.write_bytes(b"StoreDir: /nix/store\nPriority: 30\n")
    check(described)


def test_oversized_answers_are_refused(check: Check, tmp_path: Path) -> None:
    (tmp_path / "cache" / f"{SMALL.hash_part}.narinfo").write_bytes(b"StorePath: " + b"x" * (1 << 20))
    (tmp_path / "cache/nix-cache-info").write_bytes(b"StoreDir: /" + b"x" * (64 << 10))

    async def body(source: Source) -> None:
        with pytest.raises((SourceError, LimitError)):
            await source.path_info(SMALL.hash_part)
        with pytest.raises((SourceError, LimitError)):
            await source.nix_cache_info()

    check(body)


def test_malformed_answers_name_their_url(check: Check, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / f"{SMALL.hash_part}.narinfo").write_bytes(b"<html>please log in</html>\n")
    (cache / f"{BIG.hash_part}.narinfo").write_bytes((cache / f"{ODD.hash_part}.narinfo").read_bytes())
    (cache / f"{BIG.hash_part}.ls").write_bytes(b"\x28\xb5\x2f\xfd broken")

    async def body(source: Source) -> None:
        with pytest.raises(FormatError) as caught:
            await source.path_info(SMALL.hash_part)
        assert caught.value.where.endswith(f"/{SMALL.hash_part}.narinfo")
        with pytest.raises(FormatError, match="another path"):
            await source.path_info(BIG.hash_part)
        with pytest.raises(FormatError) as caught:
            await source.listing(BIG.hash_part)
        assert caught.value.where.endswith(f"/{BIG.hash_part}.ls")

    check(body)


def test_hash_parts_are_checked_before_they_are_asked_for(place: Place) -> None:
    async def body(source: Source) -> None:
        for text in ("", "../secret", "x" * 31, "é" * 32):
            with pytest.raises(ValueError, match="hash part"):
                await source.path_info(text)

    place.check(body)
