"""Views and connections: what is in use is not closed, whoever leaves."""

from __future__ import annotations

import asyncio

import pytest

from veneer.daemon import sessions as module
from veneer.daemon.sessions import Session, Sessions
from veneer.sources.chain import SourceChain
from veneer.store.verify import TrustPolicy
from veneer.store.views import View, ViewConfig


class Chain(SourceChain):
    """No sources; closing waits for ``go``."""

    def __init__(self) -> None:
        super().__init__([], clock=lambda: 0.0)
        self.closing, self.go, self.closed = asyncio.Event(), asyncio.Event(), False

    async def close(self) -> None:
        self.closing.set()
        await self.go.wait()
        self.closed = True


class Bench:
    def __init__(self) -> None:
        self.chains: dict[str, Chain] = {}
        self.downloading: set[str] = set()
        self.sessions = Sessions(self._view, lambda: self.downloading)

    def _view(self, config: ViewConfig) -> View:
        chain = self.chains[config.netrc or ""] = Chain()
        return View(config.identity(), chain, TrustPolicy(()), frozenset(), frozenset(), 1.0, "/nix/store")

    def enter(self, name: str) -> Session:
        config = ViewConfig(netrc=name)
        return self.sessions.enter(config, may_control=True, peer=name, send=lambda _: None)


def test_a_view_that_is_entered_while_another_closes_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VIEWS_KEPT", 3)

    async def main() -> None:
        bench = Bench()
        entered = [bench.enter(name) for name in "abc"]
        for session in entered:
            await bench.sessions.leave(session)
        monkeypatch.setattr(module, "VIEWS_KEPT", 1)
        last = bench.enter("d")
        leaving = asyncio.create_task(bench.sessions.leave(last))
        await bench.chains["a"].closing.wait()
        again = bench.enter("b")
        for chain in bench.chains.values():
            chain.go.set()
        await leaving
        assert again.view.chain is bench.chains["b"]
        assert not bench.chains["b"].closed
        assert bench.chains["c"].closed

    asyncio.run(asyncio.wait_for(main(), 10))


def test_a_view_whose_sources_are_read_from_outlives_its_last_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "VIEWS_KEPT", 0)

    async def main() -> None:
        bench = Bench()
        session = bench.enter("a")
        bench.downloading = {session.view.identity}
        await bench.sessions.leave(session)
        assert not bench.chains["a"].closed
        bench.downloading = set()
        bench.chains["a"].go.set()
        await bench.sessions.leave(bench.enter("a"))
        assert bench.chains["a"].closed

    asyncio.run(asyncio.wait_for(main(), 10))
