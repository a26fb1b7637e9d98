"""Who is told that a path is a directory and no more: only clients that said that they take it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.support.caches import Clock, open_cache
from tests.support.signed_cache import SignedCache, make_path
from veneer.cache.index import NarState
from veneer.daemon.compose import build_view
from veneer.daemon.requests import RequestServer
from veneer.daemon.sessions import Session, Sessions
from veneer.formats import request_wire as wire
from veneer.formats.request_wire import Frame, Kind
from veneer.store.heads import LARGE
from veneer.store.store import Limits, Notices, Store
from veneer.store.views import ViewConfig


async def no_control(session: Session, request: dict[str, object], progress: object) -> dict[str, object]:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("said", "answer", "nar"),
    [
        ({"directories": True}, Kind.DIRECTORY, NarState.NONE),
        ({"directories": "yes"}, Kind.FOUND, NarState.WHOLE),
        ({}, Kind.FOUND, NarState.WHOLE),
    ],
    ids=["takes-them", "nonsense", "older"],
)
def test_a_client_that_does_not_know_them_gets_the_tree(
    tmp_path: Path, said: dict[str, object], answer: Kind, nar: NarState
) -> None:
    made = make_path("big", LARGE)
    source = SignedCache(tmp_path / "source", [made], listings=False)
    config = ViewConfig.from_json({"sources": [{"url": source.url}], "keys": [source.key]})

    async def main() -> None:
        clock = Clock()
        with open_cache(tmp_path / "cache", clock) as cache:
            sessions = Sessions(lambda config: build_view(config, cache, clock))
            notices = Notices(sessions.dropped, sessions.condemned, sessions.present)
            store = Store(cache, clock, notices, Limits(prefetch=False))
            server = RequestServer(store, sessions, no_control, config, lambda _: None)
            listener = await asyncio.start_unix_server(server.connected, tmp_path / "socket")
            try:
                reader, writer = await asyncio.open_unix_connection(tmp_path / "socket")
                hello = json.dumps({"version": wire.VERSION, "view": None, **said}).encode()
                writer.write(Frame(Kind.HELLO, 1, hello).encode())
                writer.write(Frame(Kind.LOOKUP, 2, made.path.basename.encode()).encode())
                splitter, frames = wire.Splitter(), list[Frame]()
                while len(frames) < 2:
                    frames += splitter.feed(await reader.read(1 << 16))
                assert [frame.kind for frame in frames] == [Kind.WELCOME, answer]
                number, size = wire.found(frames[1].body)
                row = cache.index.path(number)
                assert row is not None and (row.store_path, size, row.nar) == (made.path, len(made.nar), nar)
                writer.close()
            finally:
                listener.close()
                await server.close()
                await store.close()
                await sessions.close()

    asyncio.run(asyncio.wait_for(main(), 20))
