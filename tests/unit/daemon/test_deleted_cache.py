"""A daemon whose cache directory was deleted: a private one stays for its clients, another one ends and says why."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from tests.support.caches import Clock, add_nar, open_cache
from tests.support.callers import eventually
from veneer.daemon import run
from veneer.model.errors import CacheError
from veneer.store.store import Limits, Notices, Store


@pytest.mark.parametrize("stay", [True, False])
def test_flushing_into_a_deleted_directory_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stay: bool
) -> None:
    monkeypatch.setattr(run, "FLUSH_SECONDS", 0.01)
    monkeypatch.setattr(run, "SYNC_SECONDS", 0.01)

    async def main() -> None:
        with open_cache(tmp_path / "cache") as cache:
            notices = Notices(lambda number: None, lambda number, path: None, lambda path: None)
            store = Store(cache, Clock(), notices, Limits(prefetch=False))
            add_nar(cache, 1)
            assert cache.is_in_place()
            shutil.rmtree(cache.root)
            assert not cache.is_in_place()
            flushing = asyncio.create_task(run._flush(cache, store, notices.dropped, stay=stay))
            try:
                if not stay:
                    with pytest.raises(CacheError):
                        await asyncio.wait_for(flushing, 20)
                    return
                await asyncio.to_thread(eventually, store.stories.rows)
                assert not flushing.done()
                assert str(cache.root) in store.stories.rows()[0].text
            finally:
                flushing.cancel()
                await store.close()

    asyncio.run(asyncio.wait_for(main(), 30))
