"""The check of a cache in which NARs in parts are being read: what is dropped is forgotten by everybody who had it open."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.support.caches import Clock, open_cache, until_learnt
from tests.support.signed_cache import SignedCache, make_path
from veneer.cache.index import NarState
from veneer.daemon.checking import run_check
from veneer.daemon.compose import build_view
from veneer.daemon.sessions import Sessions
from veneer.formats.request_wire import Frame, Kind
from veneer.formats.tree_index import sparse_file
from veneer.store import access
from veneer.store.account import Account
from veneer.store.store import Limits, Notices, Store
from veneer.store.views import ViewConfig

BIG = make_path("big", 1_400_001)


@pytest.mark.parametrize("damage", ["flip", "cut", "unlink"])
def test_parts_that_a_check_drops_are_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(access, "FILE", 0)  # only what is asked for, and never the rest
    monkeypatch.setattr(access, "rest_pays", lambda waited, missing, rate, times: False)
    source = SignedCache(tmp_path / "source", [BIG])
    config = ViewConfig.from_json(
        {"sources": [{"url": f"file://{source.directory}", "verify": "strict"}], "keys": [source.key]}
    )
    told: list[Frame] = []

    async def main() -> None:
        with open_cache(tmp_path / "cache") as cache:
            sessions = Sessions(lambda config: build_view(config, cache, Clock()))
            session = sessions.enter(config, may_control=True, peer="test", send=told.append)
            notices = Notices(sessions.dropped, sessions.condemned, sessions.present)
            account = Account()
            store = Store(cache, Clock(), notices, Limits(prefetch=False))
            try:
                row = await store.whole(session.view, BIG.path, account)
                await until_learnt(cache, row.number)
                store.evict(1)
                row = await store.lookup(session.view, BIG.path, account)
                await store.content(session.view, row.number, 500_000, 1000, account)
                sparse = cache.root / sparse_file(row.number)
                before = cache.index.path(row.number)
                assert before is not None and before.nar is NarState.SPARSE
                told.clear()
                spoil(sparse, damage)
                report = await run_check(store, sessions, Clock(), drop=True, progress=lambda _: None)
                assert (report["found"], report["dropped"]) == (1, 1)
                kinds = [frame.kind for frame in told]
                assert kinds == [Kind.QUARANTINED if damage == "flip" else Kind.DROPPED]
                assert BIG.path.basename in store.stories.rows()[-1].path
                row = await store.lookup(session.view, BIG.path, account)
                ready = await store.content(session.view, row.number, 500_000, 1000, account)
                file = (
                    cache.nars.path(ready.number) if ready.whole else cache.root / sparse_file(ready.number)
                )
                with open(file, "rb") as opened:
                    assert os.pread(opened.fileno(), 1000, 500_000) == BIG.nar[500_000:501_000]
                report = await run_check(store, sessions, Clock(), drop=True, progress=lambda _: None)
                assert report["found"] == 0
            finally:
                await store.close()
                await sessions.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def spoil(file: Path, damage: str) -> None:
    if damage == "unlink":
        file.unlink()
    elif damage == "cut":
        os.truncate(file, 1000)
    else:
        file.chmod(0o600)
        with open(file, "r+b") as opened:
            os.pwrite(opened.fileno(), b"flipped!", 500_000)
