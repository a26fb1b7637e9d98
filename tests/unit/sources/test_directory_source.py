"""What is particular to a cache in a directory."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from tests.support.source_cache import ABSENT, entry, write_cache
from veneer.model.errors import SourceError, SourceMissingError
from veneer.sources.directory import DirectoryObjects
from veneer.sources.object_store import ObjectStoreSource
from veneer.sources.options import SourceOptions, parse_source_url

SMALL = entry(1)
T = TypeVar("T")


def ask(root: Path, body: Callable[[ObjectStoreSource], Awaitable[T]], in_flight: int = 64) -> T:
    async def main() -> T:
        source = ObjectStoreSource(
            parse_source_url(str(root)), SourceOptions(backoff_seconds=0.001, in_flight=in_flight)
        )
        try:
            return await body(source)
        finally:
            await source.close()

    return asyncio.run(asyncio.wait_for(main(), 10))


def nar(source: ObjectStoreSource) -> Awaitable[bytes]:
    async def body() -> bytes:
        return b"".join([chunk async for chunk in source.nar(SMALL.info)])

    return body()


def test_an_absent_directory_is_a_failure_and_not_an_empty_cache(tmp_path: Path) -> None:
    for question in (lambda source: source.path_info(ABSENT), lambda source: source.nix_cache_info(), nar):
        with pytest.raises(SourceError, match="no such directory") as caught:
            ask(tmp_path / "unmounted", question)
        assert not isinstance(caught.value, SourceMissingError)


@pytest.mark.parametrize(
    "question",
    [lambda source: source.path_info(SMALL.hash_part), lambda source: source.listing(SMALL.hash_part), nar],
    ids=["narinfo", "listing", "nar"],
)
def test_a_file_system_that_does_not_answer_keeps_nobody_waiting(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    question: Callable[[ObjectStoreSource], Awaitable[object]],
) -> None:
    """A dead mount cannot be had without a network: opening a file waits for a socket that nobody writes to."""
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(DirectoryObjects, "_open", lambda *_: ours.recv(1))

    async def main() -> None:
        source = ObjectStoreSource(parse_source_url(str(tmp_path)), SourceOptions(stall_seconds=0.2))
        try:
            await question(source)
        finally:
            await source.close()

    with ours, theirs:
        try:
            with pytest.raises(SourceError, match=r"no answer for 0\.2 s"):
                asyncio.run(asyncio.wait_for(main(), 10))
        finally:
            theirs.close()


def test_a_directory_that_appears_later_is_used(tmp_path: Path) -> None:
    async def body(source: ObjectStoreSource) -> None:
        with pytest.raises(SourceError):
            await source.path_info(SMALL.hash_part)
        write_cache(tmp_path / "late", SMALL)
        assert await source.path_info(SMALL.hash_part) == SMALL.info

    ask(tmp_path / "late", body)


def test_links_are_followed(tmp_path: Path) -> None:
    write_cache(tmp_path / "real", SMALL)
    (tmp_path / "link").symlink_to("real")
    assert ask(tmp_path / "link", nar) == SMALL.file


def test_what_is_no_regular_file_is_missing_and_nobody_waits_for_it(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", SMALL)
    file = root / SMALL.info.url
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(SourceMissingError):
        ask(root, nar)
    file.unlink()
    file.mkdir()
    with pytest.raises(SourceMissingError):
        ask(root, nar)


def test_a_file_that_shrinks_while_it_is_read_is_not_taken_for_whole(tmp_path: Path) -> None:
    big = entry(2, 3_000_000)
    root = write_cache(tmp_path / "cache", big)

    async def body(source: ObjectStoreSource) -> None:
        chunks = source.nar(big.info)
        await anext(chunks)
        os.truncate(root / big.info.url, 1_500_000)
        with pytest.raises(SourceError):
            async for _ in chunks:
                pass

    ask(root, body)


def test_a_forbidden_file_is_a_failure(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    root = write_cache(tmp_path / "cache", SMALL)
    (root / f"{SMALL.hash_part}.narinfo").chmod(0)
    with pytest.raises(SourceError, match="Permission denied"):
        ask(root, lambda source: source.path_info(SMALL.hash_part))


@pytest.mark.parametrize("url", ["nar/%00", "nar/" + "x" * 5000])
def test_impossible_names_are_refused(tmp_path: Path, url: str) -> None:
    root = write_cache(tmp_path / "cache")

    async def body(source: ObjectStoreSource) -> None:
        async for _ in source.nar(entry(1, url=url).info):
            raise AssertionError

    with pytest.raises(SourceError):
        ask(root, body)


def test_leaving_a_nar_at_any_moment_closes_its_file(tmp_path: Path) -> None:
    big = entry(2, 3_000_000)
    root = write_cache(tmp_path / "cache", big)

    async def once(source: ObjectStoreSource) -> None:
        async for _ in source.nar(big.info):
            pass

    async def body(source: ObjectStoreSource) -> None:
        await once(source)
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        for turns in range(60):
            task = asyncio.create_task(once(source))
            for _ in range(turns % 20):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await source.path_info(big.hash_part)  # with one thread, all earlier jobs are done when this one is
        assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208

    ask(root, body, in_flight=1)
