"""How many narinfos per second a source answers, against the bare object store client.

::

    ./dev bench narinfo_rate [--narinfos N] [--rounds N] [--in-flight N]

Loopback nginx, one process; generated narinfos with ten references and one signature each, all different. ``obstore`` fetches the bytes
and does nothing with them; ``path_info`` parses and checks them as well. Both share the machine with nginx, so the figure
is for the whole.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import obstore
from obstore.store import HTTPStore

from benchmarks.support.results import Table
from tests.support.nginx import Nginx, find_nginx
from veneer.formats.narinfo import write_narinfo
from veneer.model.hashes import Hash, nix32_encode
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath
from veneer.sources.object_store import ObjectStoreSource
from veneer.sources.options import SourceOptions, parse_source_url

TARGET = 3000
"""Answers per second."""
_BARE, _OURS = "obstore, bytes only", "path_info, parsed"
_WORK = "one narinfo"

Question = Callable[[str], Awaitable[object]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--narinfos", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--in-flight", type=int, default=64)
    options = parser.parse_args()
    with served(options.narinfos) as (url, hash_parts):
        table = asyncio.run(measure(url, hash_parts, options.rounds, options.in_flight))
    print(table.markdown())
    for column in (_BARE, _OURS):
        seconds = table.median(_WORK, column)
        assert seconds is not None
        print(
            f"{column}: {1e6 / seconds:,.0f} per second"
            + (f" (target {TARGET:,})" if column == _OURS else "")
        )


async def measure(url: str, hash_parts: list[str], rounds: int, in_flight: int) -> Table:
    """Turn by turn, so that both meet the same disturbances."""
    store = HTTPStore(url, client_options={"allow_http": True}, retry_config={"max_retries": 0})
    source = ObjectStoreSource(parse_source_url(url), SourceOptions(in_flight=in_flight))

    async def bare(hash_part: str) -> object:
        answer = await obstore.get_async(store, f"{hash_part}.narinfo")
        return await answer.bytes_async()

    table = Table(f"{len(hash_parts)} narinfos over loopback, {in_flight} in flight", [_BARE, _OURS], "us")
    ways: dict[str, Question] = {_BARE: bare, _OURS: source.path_info}
    for _ in range(rounds):
        for way, question in ways.items():
            seconds = await ask_all(hash_parts, question, in_flight)
            table.add(_WORK, way, 1e6 * seconds / len(hash_parts))
    await source.close()
    return table


async def ask_all(hash_parts: list[str], question: Question, in_flight: int) -> float:
    """Seconds to ask ``question`` of all of them, ``in_flight`` at a time."""
    left = iter(hash_parts)

    async def worker() -> None:
        for hash_part in left:
            assert await question(hash_part) is not None

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return time.perf_counter() - began


@contextmanager
def served(count: int) -> Iterator[tuple[str, list[str]]]:
    """(URL, hash parts) of ``count`` narinfos behind nginx."""
    with tempfile.TemporaryDirectory(prefix="veneer-bench-") as directory:
        home = Path(directory).resolve()
        root = home / "cache"
        root.mkdir()
        root.chmod(0o755)
        home.chmod(0o755)
        hash_parts = write_narinfos(root, count)
        with Nginx(find_nginx(), home / "nginx", root, extra="access_log off;") as server:
            yield server.url, hash_parts


def write_narinfos(root: Path, count: int) -> list[str]:
    """``count`` narinfos with references among themselves."""
    chance = random.Random(0)
    paths = [StorePath(nix32_encode(chance.randbytes(20)), f"package-{n}-1.{n}.0") for n in range(count)]
    for path in paths:
        digest = hashlib.sha256(str(path).encode()).digest()
        info = UnverifiedPathInfo(
            store_path=path,
            url=f"nar/{nix32_encode(digest)}.nar.zst",
            compression="zstd",
            nar_hash=Hash("sha256", digest),
            nar_size=chance.randrange(1000, 1 << 30),
            references=tuple(sorted(chance.sample(paths, min(10, count)))),
            file_hash=Hash("sha256", digest),
            file_size=chance.randrange(1000, 1 << 28),
            deriver=f"{nix32_encode(chance.randbytes(20))}-package.drv",
            signatures=(f"cache.example-1:{base64.b64encode(chance.randbytes(64)).decode()}",),
        )
        (root / f"{path.hash_part}.narinfo").write_bytes(write_narinfo(info))
    return [path.hash_part for path in paths]


if __name__ == "__main__":
    main()
