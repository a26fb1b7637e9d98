"""What a mount server missed while it or the daemon was away, it is told when it connects."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.support.caches import add_row, store_path
from tests.support.request_server import serving
from veneer.formats import request_wire as wire
from veneer.formats.request_wire import Kind


def test_a_number_condemned_while_nobody_was_connected_is_told_after_the_welcome(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as served:
            old = add_row(served.cache, 1)
            served.cache.index.replace_path(old.number, 2.0)
            frames = await served.ask(answers=2)
            assert [frame.kind for frame in frames] == [Kind.WELCOME, Kind.QUARANTINED]
            assert wire.quarantined(frames[1].body) == (old.number, store_path(1).basename)

    asyncio.run(asyncio.wait_for(main(), 20))
