"""What a mount server missed while it or the daemon was away, it is told when it connects."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from tests.support.caches import Clock, add_row, open_cache, store_path
from veneer.daemon.compose import build_view
from veneer.daemon.requests import RequestServer
from veneer.daemon.sessions import Session, Sessions
from veneer.formats import request_wire as wire
from veneer.formats.request_wire import Frame, Kind
from veneer.store.store import Limits, Notices, Store
from veneer.store.views import ViewConfig


async def no_control(session: Session, request: dict[str, object], progress: object) -> dict[str, object]:
    raise NotImplementedError


def test_a_number_condemned_while_nobody_was_connected_is_told_after_the_welcome(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        with open_cache(tmp_path / "cache", clock) as cache:
            old = add_row(cache, 1)
            cache.index.replace_path(old.number, 2.0)
            sessions = Sessions(lambda config: build_view(config, cache, clock))
            notices = Notices(sessions.dropped, sessions.condemned, sessions.present)
            store = Store(cache, clock, notices, Limits())
            server = RequestServer(store, sessions, no_control, ViewConfig(), lambda _: None)
            listener = await asyncio.start_unix_server(server.connected, tmp_path / "socket")
            try:
                reader, writer = await asyncio.open_unix_connection(tmp_path / "socket")
                hello = json.dumps({"version": wire.VERSION, "view": None}).encode()
                writer.write(Frame(Kind.HELLO, 1, hello).encode())
                splitter, frames = wire.Splitter(), list[Frame]()
                while len(frames) < 2:
                    frames += splitter.feed(await reader.read(1 << 16))
                assert [frame.kind for frame in frames] == [Kind.WELCOME, Kind.QUARANTINED]
                assert wire.quarantined(frames[1].body) == (old.number, store_path(1).basename)
                writer.close()
            finally:
                listener.close()
                await server.close()
                await store.close()
                await sessions.close()

    asyncio.run(asyncio.wait_for(main(), 20))
