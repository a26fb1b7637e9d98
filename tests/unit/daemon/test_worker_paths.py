"""Path infos known to the worker protocol: each asked once, closures ahead of the questions, bounded waits and memory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tests.support.caches import Clock, open_cache
from veneer.daemon import worker_paths
from veneer.daemon.compose import build_view
from veneer.daemon.worker_paths import KnownPaths, NoAnswerError
from veneer.formats import worker_wire as wire
from veneer.model.errors import SourceError
from veneer.model.hashes import Hash
from veneer.model.path_info import PathInfo, UnverifiedPathInfo
from veneer.model.store_path import StorePath
from veneer.store.account import Account, Stories
from veneer.store.resolve import AbsentError, Resolver
from veneer.store.views import View, ViewConfig

ACCOUNT = Account()
SOON = 5.0


def path(name: str) -> StorePath:
    return StorePath("0" * 32, name)


class NoMemory:
    """Of signatures: nothing is signed here."""

    def signature_verified(self, digest: bytes) -> bool:
        return False

    def put_signature_verified(self, digest: bytes) -> None:
        pass


class Graph(Resolver):
    """Names and their references, a word per line: "a: b c". What is held is not answered before it is let go."""

    def __init__(self, text: str) -> None:
        super().__init__(Stories(Clock()), NoMemory())
        self.references = {
            name: rest.split() for name, _, rest in (line.partition(":") for line in text.split(";"))
        }
        self.asked: list[str] = []
        self.held: dict[str, asyncio.Event] = {}
        self.failing: set[str] = set()

    async def path_info(self, view: View, path: StorePath, account: Account) -> PathInfo:
        self.asked.append(path.name)
        await asyncio.sleep(0)
        if path.name in self.held:
            await self.held[path.name].wait()
        if path.name in self.failing:
            raise SourceError("connection refused")
        if path.name not in self.references:
            raise AbsentError(path, 1.0)
        references = tuple(StorePath("0" * 32, name) for name in self.references[path.name])
        info = UnverifiedPathInfo(path, "nar/x", "none", Hash("sha256", bytes(32)), 1000, references)
        return PathInfo(info, ("key-1",))


class Endless(Graph):
    """Every path refers to two new ones."""

    async def path_info(self, view: View, path: StorePath, account: Account) -> PathInfo:
        self.references[path.name] = [path.name + "x", path.name + "y"]
        return await super().path_info(view, path, account)


Body = Callable[[KnownPaths], Awaitable[None]]


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    def runner(resolver: Graph, body: Body, *, parallel: int = 8, kept: int = 1000) -> None:
        async def main() -> None:
            with open_cache(tmp_path_factory.mktemp("cache") / "c") as cache:
                view = build_view(ViewConfig(), cache, Clock())
                known = KnownPaths(resolver, view, lambda _: None, parallel=parallel, kept=kept)
                try:
                    await asyncio.wait_for(body(known), 20)
                finally:
                    await known.close()
                    await view.close()

        asyncio.run(main())

    return runner


async def ask(known: KnownPaths, name: str, seconds: float = SOON) -> PathInfo | None:
    return await known.info(path(name), ACCOUNT, seconds)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for is the event loop's own progress
        await asyncio.sleep(0)


def test_the_first_question_resolves_the_closure_and_each_path_is_asked_once(
    run: Callable[..., None],
) -> None:
    graph = Graph("a: a b c;b: d;c: d e;d:;e:")

    async def body(known: KnownPaths) -> None:
        assert await ask(known, "a")
        await until(lambda: len(known) == 5)
        for name in "abcde":
            assert known.known(path(name))
            assert await ask(known, name)
        assert sorted(graph.asked) == list("abcde")

    run(graph, body)


class Remembering(Graph):
    """Everything but ``unknown`` can be told without asking."""

    unknown = frozenset("c")

    def remembered(self, view: View, path: StorePath) -> PathInfo | None:
        if path.name in self.unknown:
            return None
        references = tuple(StorePath("0" * 32, name) for name in self.references[path.name])
        return PathInfo(
            UnverifiedPathInfo(path, "nar/x", "none", Hash("sha256", bytes(32)), 1, references), ()
        )


def test_what_is_remembered_is_looked_up_ahead_and_only_the_rest_is_asked(run: Callable[..., None]) -> None:
    graph = Remembering("a: b c;b: d;c: d e;d: f;e:;f:")

    async def body(known: KnownPaths) -> None:
        known.ask_ahead([path("a")], ACCOUNT)
        await until(lambda: len(known) == 6)
        assert graph.asked == ["c"]
        for name in "abcdef":
            text = path(name).absolute()
            for operation in (wire.IS_VALID_PATH, wire.QUERY_PATH_INFO):
                reply = known.replies.get(wire.encode((operation.number, text)))
                assert reply is not None
                assert reply.path == path(name)
            assert known.replies.get(wire.encode((wire.QUERY_VALID_PATHS.number, [text], 0)))

    run(graph, body)


def test_a_question_joins_the_resolution_under_way(run: Callable[..., None]) -> None:
    graph = Graph("a: b;b:")

    async def body(known: KnownPaths) -> None:
        graph.held["b"] = asyncio.Event()
        await ask(known, "a")
        await until(lambda: "b" in graph.asked)
        questions = [asyncio.create_task(ask(known, "b")) for _ in range(3)]
        await asyncio.sleep(0)
        graph.held["b"].set()
        assert all(await asyncio.gather(*questions))
        assert graph.asked == ["a", "b"]

    run(graph, body)


def test_a_question_does_not_queue_behind_what_is_asked_ahead(run: Callable[..., None]) -> None:
    graph = Graph("a: b c;b:;c:")

    async def body(known: KnownPaths) -> None:
        graph.held["b"] = asyncio.Event()
        await ask(known, "a")
        await until(lambda: "b" in graph.asked)
        assert await ask(known, "c")
        assert graph.asked == ["a", "b", "c"]

    run(graph, body, parallel=1)


def test_a_missing_reference_fails_only_its_own_question(run: Callable[..., None]) -> None:
    graph = Graph("a: gone b;b: c;c:")

    async def body(known: KnownPaths) -> None:
        assert await ask(known, "a")
        await until(lambda: len(known) == 3)
        assert await ask(known, "gone") is None
        graph.references["gone"] = []
        assert await ask(known, "gone")  # absence is not kept here

    run(graph, body)


def test_a_failure_is_told_and_the_next_question_asks_again(run: Callable[..., None]) -> None:
    graph = Graph("a: b;b:")
    graph.failing = {"b"}

    async def body(known: KnownPaths) -> None:
        assert await ask(known, "a")
        with pytest.raises(SourceError, match="refused"):
            await ask(known, "b")
        graph.failing.clear()
        assert await ask(known, "b")

    run(graph, body)


def test_waiting_is_bounded_and_the_late_answer_is_not_lost(run: Callable[..., None]) -> None:
    graph = Graph("a:")

    async def body(known: KnownPaths) -> None:
        graph.held["a"] = asyncio.Event()
        for _ in range(2):
            with pytest.raises(NoAnswerError, match=r"within 0\.01 s") as error:
                await ask(known, "a", 0.01)
            assert "valid" not in str(error.value)
        graph.held["a"].set()
        assert await ask(known, "a")
        assert graph.asked == ["a"]

    run(graph, body)


def test_a_client_that_leaves_does_not_stop_the_resolution(run: Callable[..., None]) -> None:
    graph = Graph("a: b;b:")

    async def body(known: KnownPaths) -> None:
        graph.held["a"] = asyncio.Event()
        question = asyncio.create_task(ask(known, "a"))
        await until(lambda: bool(graph.asked))
        question.cancel()
        graph.held["a"].set()
        await until(lambda: len(known) == 2)

    run(graph, body)


def test_memory_is_bounded_and_what_is_used_stays(run: Callable[..., None]) -> None:
    graph = Graph(";".join(f"p{i}:" for i in range(100)))

    async def body(known: KnownPaths) -> None:
        for i in range(100):
            assert await ask(known, f"p{i}")
            assert await ask(known, "p0")
            assert len(known) <= 10
        assert graph.asked.count("p0") == 1

    run(graph, body, kept=10)


def test_a_cache_without_end_is_not_followed_for_ever(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_paths, "AHEAD", 20)
    graph = Endless("")

    async def body(known: KnownPaths) -> None:
        await ask(known, "a")
        for _ in range(200):
            await asyncio.sleep(0)
        assert len(graph.asked) == 21

    run(graph, body)


def test_without_asking_ahead_only_the_question_is_asked(run: Callable[..., None]) -> None:
    graph = Graph("a: b;b:")

    async def body(known: KnownPaths) -> None:
        await ask(known, "a")
        known.ask_ahead([path("b")], ACCOUNT)
        for _ in range(20):
            await asyncio.sleep(0)
        assert graph.asked == ["a"]

    run(graph, body, parallel=0)


def test_referrers_follow_what_becomes_known(run: Callable[..., None]) -> None:
    graph = Graph("a: b;b:;c: b c")

    async def body(known: KnownPaths) -> None:
        assert known.referrers(path("b")) == []
        await ask(known, "a")
        assert known.referrers(path("b")) == [path("a")]
        await ask(known, "c")
        assert known.referrers(path("b")) == [path("a"), path("c")]
        assert known.referrers(path("c")) == [path("c")]

    run(graph, body)
