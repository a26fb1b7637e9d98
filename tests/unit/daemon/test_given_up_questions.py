"""What several sessions wait for may be ended with one of them: the others are told, and do not wait for an answer that never comes."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from tests.support.caches import Clock, open_cache
from veneer.daemon.admission import Admission
from veneer.daemon.requests import RequestServer
from veneer.daemon.sessions import Session, Sessions
from veneer.formats import request_wire as wire
from veneer.formats.request_wire import Frame, Kind
from veneer.store.store import Limits, Notices, Store
from veneer.store.views import ViewConfig


@pytest.mark.parametrize("kind", [Kind.CONTENT, Kind.CONTROL])
@pytest.mark.parametrize("own", [False, True], ids=["shared-work-ended", "own-connection-ended"])
def test_a_request_is_answered_unless_its_own_connection_ended(tmp_path: Path, kind: Kind, own: bool) -> None:
    async def main() -> list[Frame]:
        clock = Clock()
        sent: list[Frame] = []
        with open_cache(tmp_path / "cache", clock) as cache:
            store = Store(cache, clock, Notices(lambda n: None, lambda n, p: None, lambda p: None), Limits())
            sessions = Sessions(lambda config: None)  # type: ignore[arg-type,return-value]
            server = RequestServer(store, sessions, None, ViewConfig(), lambda n: None)  # type: ignore[arg-type]
            shared = asyncio.get_running_loop().create_future()
            waits = asyncio.Event()

            async def shares(session: Session, frame: Frame) -> Frame:
                waits.set()
                await asyncio.shield(shared)
                return frame

            server._reply = shares  # type: ignore[method-assign]
            session = sessions.enter(ViewConfig(), may_control=True, peer="test", send=sent.append)
            user = Admission().enter(0)
            answering = asyncio.create_task(server._answer(session, user, Frame(kind, 7, b"")))
            try:
                await waits.wait()
                (answering if own else shared).cancel()
                await asyncio.wait({answering})
                assert answering.cancelled() == own
            finally:
                await store.close()
        return sent

    sent = asyncio.run(asyncio.wait_for(main(), 20))
    assert [(frame.kind, frame.id) for frame in sent] == ([] if own else [(Kind.FAILED, 7)])
    for frame in sent:
        number, story = wire.failed(frame.body)
        assert number == errno.EIO
        assert "given up" in story
