"""A view is closed while somebody waits for its sources: he is told, and whatever he does besides goes on to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.support.caches import Clock, open_cache
from veneer.model.errors import SourceError
from veneer.store.remembered import RememberedSource

PART = "0" * 32


class Silent:
    """A source that answers nothing."""

    url = "https://silent.example"

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def path_info(self, *_: object) -> None:
        self.asked.set()
        await asyncio.Event().wait()

    listing = sidecar = path_info

    async def close(self) -> None: ...


def path_info(source: RememberedSource) -> Awaitable[object]:
    return source.path_info(PART)


def listing(source: RememberedSource) -> Awaitable[object]:
    source.expect_listing(PART, lambda _: None)
    return source.listing(PART)


@pytest.mark.parametrize("own", [False, True], ids=["closed", "cancelled"])
@pytest.mark.parametrize("question", [path_info, listing])
def test_who_waits_for_a_source_that_is_closed_gets_an_error(
    tmp_path: Path, question: Callable[[RememberedSource], Awaitable[object]], own: bool
) -> None:
    async def main() -> None:
        clock = Clock()
        with open_cache(tmp_path / "cache", clock) as cache:
            silent = Silent()
            source = RememberedSource(
                silent,  # type: ignore[arg-type]
                cache.index,
                clock,
                negative_ttl=10,
                store_dir="/nix/store",
            )
            waiting = asyncio.ensure_future(question(source))
            await silent.asked.wait()
            if own:
                waiting.cancel()
                await asyncio.wait({waiting})
            await source.close()
            with pytest.raises(asyncio.CancelledError if own else SourceError):
                await waiting

    asyncio.run(asyncio.wait_for(main(), 20))
