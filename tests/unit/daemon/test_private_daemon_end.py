"""The end of a private daemon: what it leaves is safe, and nobody waits for that."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.golden import KEY, PATHS, url
from tests.support.request_server import hello_frame, serving
from veneer.cache.cache import Cache
from veneer.cache.directory import wait_until_free
from veneer.daemon import run
from veneer.daemon.requests import RequestServer


def test_a_cache_that_is_opened_on_another_boot_is_not_read_again(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    sources = ["--cache", url("zstd"), "--trusted-public-key", KEY]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "veneer.cli.main",
            "fetch",
            *sources,
            "--cache-dir",
            str(cache),
            PATHS["text"].absolute(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert wait_until_free(cache, 20)
    with Cache.open(cache, clock=lambda: 0.0, boot_id=lambda: "another") as opened:
        assert opened.index.totals().nars == 1
        assert opened.repaired.rehashed == 0


def test_a_client_that_comes_meanwhile_puts_the_end_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "IDLE_SECONDS", 0.0)

    async def main() -> None:
        began, finish, stopped = asyncio.Event(), asyncio.Event(), asyncio.Event()
        asked: list[Callable[[], bool]] = []

        async def last(go_on: Callable[[], bool]) -> None:
            asked.append(go_on)
            began.set()
            await finish.wait()

        idle = run._IdleEnd(stopped.set, last)
        idle.connections(1)
        idle.connections(0)
        await began.wait()
        assert asked[0]()
        idle.connections(1)
        assert not asked[0]()
        began.clear()
        finish.set()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not stopped.is_set()
        idle.connections(0)
        await stopped.wait()
        assert began.is_set()
        idle.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_what_is_done_last_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(run, "LAST_SYNC_SECONDS", 0.0)

    async def main() -> None:
        stopped = asyncio.Event()

        async def last(go_on: Callable[[], bool]) -> None:
            assert not go_on()

        idle = run._IdleEnd(stopped.set, last)
        idle.connections(0)
        await stopped.wait()
        idle.close()

    asyncio.run(asyncio.wait_for(main(), 20))


class Greeting:
    """A connection whose client's HELLO arrives when the test says so."""

    def __init__(self, server: RequestServer, path: Path) -> None:
        self._server = server
        self._path = path
        self._accepted: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def open(self) -> None:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._accepted.put((reader, writer))

        self._listener = await asyncio.start_unix_server(accept, self._path)
        self.client, self._writer = await asyncio.open_unix_connection(self._path)
        self._reader, there = await self._accepted.get()
        self.served = asyncio.create_task(self._server.connected(self._reader, there))

    def say_hello(self) -> None:
        """It arrives within this step of the loop."""
        self._reader.feed_data(hello_frame().encode())

    def close(self) -> None:
        self._writer.close()
        self._listener.close()


@pytest.mark.parametrize("when", ["with-its-hello", "ending", "unheard"])
def test_a_client_that_comes_with_the_end_is_let_go(tmp_path: Path, when: str) -> None:
    """Else the daemon would wait for it, and it for a daemon on whose socket nobody else can connect any more."""

    async def main() -> None:
        async with serving(tmp_path) as served:
            server, greeting = served.server, Greeting(served.server, served.path)
            try:
                if when == "unheard":
                    await server.close()
                elif when == "ending":
                    server.refuse()
                await greeting.open()
                if when == "with-its-hello":
                    for _ in range(5):
                        await asyncio.sleep(0)  # until it waits for the HELLO
                greeting.say_hello()
                if when != "ending":
                    await server.close()
                await greeting.served
                assert await greeting.client.read() == b""
            finally:
                greeting.close()

    asyncio.run(asyncio.wait_for(main(), 20))
