"""A reader of a slow but healthy download is told that it gets on; of a stuck one, nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.support.caches import Clock, open_cache
from veneer.daemon.requests import RequestServer
from veneer.daemon.sessions import Session, Sessions
from veneer.formats import request_wire as wire
from veneer.formats.request_wire import Frame, Kind
from veneer.store.store import Limits, Notices, Store
from veneer.store.views import ViewConfig


def frames_while(tmp_path: Path, moves: bool) -> list[Kind]:
    """What a CONTENT request that is never answered gets in a while, with and without bytes arriving."""

    async def main() -> list[Kind]:
        clock = Clock()
        cache = open_cache(tmp_path / "cache", clock)
        sent: list[Kind] = []
        store = Store(cache, clock, Notices(lambda n: None, lambda n, p: None, lambda p: None), Limits())
        sessions = Sessions(lambda config: None)  # type: ignore[arg-type,return-value]
        server = RequestServer(store, sessions, None, ViewConfig(), lambda n: None, 0.01)  # type: ignore[arg-type]
        for_ever = asyncio.Event()

        async def stuck(session: Session, frame: Frame) -> Frame:
            await for_ever.wait()
            return frame

        server._reply = stuck  # type: ignore[method-assign]

        class Spy:
            def send(self, frame: Frame) -> None:
                sent.append(frame.kind)
                if len(sent) == 3:
                    enough.set()

        enough = asyncio.Event()
        frame = Frame(Kind.CONTENT, 7, wire.content_body(1, 0, 1))
        asking = asyncio.create_task(server._with_signs(Spy(), frame))  # type: ignore[arg-type]
        try:
            deadline = asyncio.get_running_loop().time() + (10 if moves else 0.2)
            while not enough.is_set() and asyncio.get_running_loop().time() < deadline:
                store.fetcher.moved += int(moves)
                await asyncio.wait({asking}, timeout=0.02)
        finally:
            asking.cancel()
            await asyncio.wait({asking})
            await store.close()
            cache.close()
        return sent

    return asyncio.run(main())


def test_a_download_that_gets_on_is_told_to_who_waits(tmp_path: Path) -> None:
    assert frames_while(tmp_path, moves=True) == [Kind.PROGRESS] * 3


def test_a_stuck_download_gives_no_sign(tmp_path: Path) -> None:
    assert frames_while(tmp_path, moves=False) == []
