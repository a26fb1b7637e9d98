"""Who is told that a path is a directory and no more: only clients that said that they take it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.request_server import serving
from tests.support.signed_cache import SignedCache, make_path
from veneer.cache.index import NarState
from veneer.formats import request_wire as wire
from veneer.formats.request_wire import Frame, Kind
from veneer.store.heads import LARGE
from veneer.store.views import ViewConfig


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
        async with serving(tmp_path, config) as served:
            asked = Frame(Kind.LOOKUP, 2, made.path.basename.encode())
            frames = await served.ask(asked, answers=2, **said)
            assert [frame.kind for frame in frames] == [Kind.WELCOME, answer]
            number, size = wire.found(frames[1].body)
            row = served.cache.index.path(number)
            assert row is not None and (row.store_path, size, row.nar) == (made.path, len(made.nar), nar)

    asyncio.run(asyncio.wait_for(main(), 20))
