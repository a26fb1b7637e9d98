"""NAR files of undeclared length whose connection ends too early: the transfer is bad, not what is stored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.damage import nar_file_of
from tests.support.golden import GOLDEN, PATHS, copy_of, url
from tests.support.raw_http import RawServer, Request, response
from tests.support.store_bench import Bench, run
from veneer.model.errors import FormatError, SourceError


class Lengthless:
    """A cache that tells neither FileSize nor the length of NAR files; ``cut``: bytes missing, NAR by NAR."""

    def __init__(self, name: str, cut: list[int]) -> None:
        self.directory = GOLDEN / name
        self.cut = cut
        self.nars = 0

    def answer(self, request: Request) -> Iterator[bytes]:
        file = self.directory / request.target.lstrip("/")
        if not file.is_file():
            yield response(b"", "404 Not Found")
        elif file.suffix == ".narinfo":
            lines = file.read_text().splitlines()
            yield response("\n".join(line for line in lines if not line.startswith("File")).encode() + b"\n")
        elif file.parent.name == "nar":
            body = file.read_bytes()
            missing = self.cut[min(self.nars, len(self.cut) - 1)]
            self.nars += 1
            yield b"HTTP/1.0 200 OK\r\nConnection: close\r\n\r\n" + body[: len(body) - missing]
        else:
            yield response(file.read_bytes())


async def read(bench: Bench, *urls: str) -> bytes:
    view = bench.view(*urls)
    row = await bench.store.lookup(view, PATHS["leaf"], bench.account)
    ready = await bench.store.content(view, row.number, 0, row.nar_size, bench.account)
    return bench.nar(ready.number)


async def quarantined(bench: Bench, source: str) -> str | None:
    row = await bench.store.lookup(bench.view(source), PATHS["leaf"], bench.account)
    return bench.cache.index.quarantined(row.store_path, row.nar_hash, source, bench.clock())


@pytest.mark.parametrize("name", ["zstd", "xz"])
def test_a_body_that_was_cut_is_asked_for_again(tmp_path: Path, name: str) -> None:
    cache = Lengthless(name, [0, 0])
    whole = nar_file_of(GOLDEN / "none", PATHS["leaf"].hash_part).read_bytes()

    async def body(bench: Bench) -> None:
        with RawServer(cache.answer) as server:
            cache.cut = [0, 9, 0]  # the first request only shows that no length is declared
            assert await read(bench, server.url) == whole
            assert cache.nars == 3
            assert await quarantined(bench, server.url) is None

    run(tmp_path, body)


def test_a_body_that_is_cut_each_time_is_a_failed_source_and_the_next_one_serves(tmp_path: Path) -> None:
    cache = Lengthless("zstd", [9])

    async def body(bench: Bench) -> None:
        with RawServer(cache.answer) as server:
            with pytest.raises(SourceError, match="ended early"):
                await read(bench, server.url)
            assert await quarantined(bench, server.url) is None
            cache.cut = [0]
            assert await read(bench, server.url)  # no hour to wait for
            assert not list((tmp_path / "cache" / "quarantine").iterdir())

    run(tmp_path, body)

    async def with_another(bench: Bench) -> None:
        cache.cut = [9]
        with RawServer(cache.answer) as server:
            assert await read(bench, server.url, url("zstd"))
            assert await quarantined(bench, server.url) is None

    (tmp_path / "other").mkdir()
    run(tmp_path / "other", with_another)


def test_a_file_that_is_as_long_as_said_and_ends_early_is_corrupt(tmp_path: Path) -> None:
    cache = copy_of("zstd", tmp_path / "source")
    nar = nar_file_of(cache, PATHS["leaf"].hash_part)
    nar.write_bytes(nar.read_bytes()[:-9])
    narinfo = cache / f"{PATHS['leaf'].hash_part}.narinfo"
    lines = narinfo.read_text().splitlines()
    size = f"FileSize: {nar.stat().st_size}"
    narinfo.write_text("\n".join(size if line.startswith("FileSize:") else line for line in lines) + "\n")

    async def body(bench: Bench) -> None:
        with pytest.raises(FormatError, match="truncated"):
            await read(bench, f"file://{cache}")
        assert await quarantined(bench, f"file://{cache}")

    run(tmp_path, body)
