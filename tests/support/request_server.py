"""The daemon's request server in this process, with a store and sessions of its own and real connections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.caches import Clock, open_cache
from veneer.cache.cache import Cache
from veneer.daemon.compose import build_view
from veneer.daemon.requests import RequestServer
from veneer.daemon.sessions import Session, Sessions
from veneer.formats import request_wire as wire
from veneer.formats.request_wire import Frame, Kind
from veneer.store.store import Limits, Notices, Store
from veneer.store.views import ViewConfig


async def no_control(session: Session, request: dict[str, object], progress: object) -> dict[str, object]:
    raise NotImplementedError


@dataclass
class Served:
    """``path``: of the socket, once somebody listens there."""

    cache: Cache
    server: RequestServer
    path: Path

    async def ask(self, *frames: Frame, answers: int, **hello: object) -> list[Frame]:
        """The first ``answers`` frames after HELLO, with what it says besides, and ``frames``, on a new connection."""
        listener = await asyncio.start_unix_server(self.server.connected, self.path)
        try:
            reader, writer = await asyncio.open_unix_connection(self.path)
            for frame in (hello_frame(**hello), *frames):
                writer.write(frame.encode())
            splitter, got = wire.Splitter(), list[Frame]()
            while len(got) < answers:
                data = await reader.read(1 << 16)
                assert data, got
                got += splitter.feed(data)
            writer.close()
            return got
        finally:
            listener.close()


def hello_frame(**more: object) -> Frame:
    return Frame(Kind.HELLO, 1, json.dumps({"version": wire.VERSION, "view": None, **more}).encode())


@asynccontextmanager
async def serving(place: Path, config: ViewConfig | None = None) -> AsyncIterator[Served]:
    """``config``: of the daemon's own view."""
    clock = Clock()
    with open_cache(place / "cache", clock) as cache:
        sessions = Sessions(lambda config: build_view(config, cache, clock))
        notices = Notices(sessions.dropped, sessions.condemned, sessions.present)
        store = Store(cache, clock, notices, Limits(prefetch=False))
        server = RequestServer(store, sessions, no_control, config or ViewConfig(), lambda _: None)
        try:
            yield Served(cache, server, place / "socket")
        finally:
            await server.close()
            await store.close()
            await sessions.close()
