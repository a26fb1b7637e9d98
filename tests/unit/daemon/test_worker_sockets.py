"""Worker sockets over caches written by real Nix: what is answered, refused, bounded, and how long a socket lives."""

from __future__ import annotations

import asyncio
import shutil
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.support import golden
from tests.support.caches import Clock, open_cache
from tests.support.golden import FOREIGN, GOLDEN, KEY
from tests.support.worker_client import EndedError, RefusedError, WorkerClient, client_hello, encode_request
from veneer.cache.cache import Cache
from veneer.daemon import worker
from veneer.daemon.compose import build_view
from veneer.daemon.sessions import Session, Sessions
from veneer.daemon.worker import WorkerSockets
from veneer.daemon.worker_answers import Answers
from veneer.formats import worker_wire as wire
from veneer.formats.narinfo import parse_narinfo
from veneer.formats.request_wire import Frame, Kind
from veneer.model.errors import DaemonError, UsageError
from veneer.model.store_path import StorePath
from veneer.store.store import Limits, Notices, Store
from veneer.store.views import ViewConfig

PATHS = {
    name: path.absolute()
    for name, path in golden.PATHS.items()
    if (GOLDEN / "zstd" / f"{path.hash_part}.narinfo").exists()
}
NOWHERE = "/nix/store/00000000000000000000000000000000-nowhere"
T = TypeVar("T")


class Daemon:
    """The daemon's worker sockets in this process. Clients run in threads."""

    def __init__(self, cache: Cache, clock: Clock, *, shared: bool = False) -> None:
        self.cache = cache
        self.sessions = Sessions(lambda config: build_view(config, cache, clock))
        notices = Notices(self.sessions.dropped, self.sessions.condemned, self.sessions.present)
        self.store = Store(cache, clock, notices, Limits(prefetch=False))
        self.workers = WorkerSockets(self.store, self.sessions, shared=shared, parallel=8, answer_seconds=5)
        self.sent: list[Frame] = []

    def enter(self, cache: str = f"file://{GOLDEN}/zstd", key: str = KEY) -> Session:
        config = ViewConfig.from_json({"sources": [{"url": cache}], "keys": [key]})
        return self.sessions.enter(config, may_control=True, peer="test", send=self.sent.append)

    async def socket(self, name: str = "test", **view: str) -> Path:
        return await self.workers.open(self.enter(**view), name)


def run(tmp_path: Path, body: Callable[[Daemon], Awaitable[None]], *, shared: bool = False) -> None:
    async def main() -> None:
        clock = Clock()
        with open_cache(tmp_path / "cache", clock) as cache:
            daemon = Daemon(cache, clock, shared=shared)
            try:
                await asyncio.wait_for(body(daemon), 50)
            finally:
                await daemon.workers.close()
                await daemon.store.close()
                await daemon.sessions.close()

    asyncio.run(main())


async def aside(function: Callable[..., T], *arguments: Any) -> T:
    """A blocking client, away from the event loop that serves it."""
    return await asyncio.to_thread(function, *arguments)


def copied(tmp_path: Path) -> Path:
    return shutil.copytree(GOLDEN / "zstd", tmp_path / "binary-cache")


def narinfo(cache: Path, name: str) -> Path:
    return cache / f"{StorePath.parse_absolute(PATHS[name]).hash_part}.narinfo"


@pytest.mark.parametrize("version", [0x115, 0x11A, 0x11B, 0x122, 0x123, 0x125, 0x126])
def test_every_version_is_told_what_the_narinfo_says(tmp_path: Path, version: int) -> None:
    def client(socket_path: Path) -> None:
        with WorkerClient(socket_path, version) as nix:
            assert nix.ask(wire.SET_OPTIONS, *[0] * 12, [("cores", "4")]) == []
            for name, text in PATHS.items():
                info = parse_narinfo(narinfo(GOLDEN / "zstd", name).read_bytes())
                assert nix.ask(wire.IS_VALID_PATH, text) == [1]
                deriver = f"/nix/store/{info.deriver}" if info.deriver else ""
                references = [f"/nix/store/{reference}" for reference in info.references]
                assert nix.ask(wire.QUERY_PATH_INFO, text) == [
                    *(1, deriver, info.nar_hash.digest.hex(), references, 0, info.nar_size, 0),
                    *(list(info.signatures), info.ca),
                ]
                assert nix.ask(wire.QUERY_PATH_FROM_HASH_PART, text[11:43]) == [text]
            if version >= 0x123:
                assert nix.trust == 2
            assert nix.program.startswith("veneer" if version >= 0x121 else "")

    async def body(daemon: Daemon) -> None:
        await aside(client, await daemon.socket())
        assert daemon.cache.index.totals().nars == 0

    run(tmp_path, body)


def test_what_no_source_has_is_absent_in_every_answer(tmp_path: Path) -> None:
    def client(socket_path: Path) -> None:
        known = PATHS["text"]
        with WorkerClient(socket_path) as nix:
            assert nix.ask(wire.IS_VALID_PATH, NOWHERE) == [0]
            assert nix.ask(wire.QUERY_PATH_INFO, NOWHERE) == [0]
            assert nix.ask(wire.QUERY_VALID_PATHS, [NOWHERE, known], 0) == [[known]]
            assert nix.ask(wire.QUERY_PATH_FROM_HASH_PART, "0" * 32) == [""]
            assert nix.ask(wire.QUERY_REFERRERS, NOWHERE) == [[]]
            assert nix.ask(wire.QUERY_VALID_DERIVERS, NOWHERE) == [[]]
            assert nix.ask(wire.QUERY_MISSING, [NOWHERE, known, f"{known}.drv!out"]) == [
                *([], [], sorted([NOWHERE, f"{known}.drv"]), 0, 0)
            ]
            assert nix.ask(wire.QUERY_REALISATION, f"sha256:{'0' * 64}!out") == [[]]
            assert nix.ask(wire.ADD_TEMP_ROOT, NOWHERE) == [1]
            for operation in (wire.ENSURE_PATH, wire.NAR_FROM_PATH):
                with pytest.raises(RefusedError, match="no source has"):
                    nix.ask(operation, NOWHERE)
            assert nix.ask(wire.ENSURE_PATH, known) == [1]

    async def body(daemon: Daemon) -> None:
        await aside(client, await daemon.socket())

    run(tmp_path, body)


@pytest.mark.parametrize("version", [0x115, 0x122, 0x124, 0x126])
def test_paths_that_are_there_need_no_build_and_nothing_else_is_built(tmp_path: Path, version: int) -> None:
    def client(socket_path: Path) -> None:
        known = [PATHS["text"], PATHS["leaf"]]
        with WorkerClient(socket_path, version) as nix:
            assert nix.ask(wire.BUILD_PATHS, known, 0) == [1]
            with pytest.raises(RefusedError, match="no source has"):
                nix.ask(wire.BUILD_PATHS, [*known, NOWHERE], 0)
            with pytest.raises(RefusedError, match="does not build"):
                nix.ask(wire.BUILD_PATHS, [f"{known[0]}.drv!out"], 0)
            if version >= 0x122:
                nix.send(encode_request(wire.BUILD_PATHS_WITH_RESULTS, (known, 0), version))
                nix.expect_last()
                assert nix.integer() == len(known)
                for text in known:
                    assert (nix.string(), nix.integer(), nix.string()) == (text, 2, "")
                    assert [nix.integer() for _ in range(7 if version >= 0x125 else 5)][-1] == 0
            assert nix.ask(wire.IS_VALID_PATH, known[0]) == [1]

    async def body(daemon: Daemon) -> None:
        await aside(client, await daemon.socket())

    run(tmp_path, body)


def test_arguments_that_are_no_store_paths_are_refused_and_the_connection_goes_on(tmp_path: Path) -> None:
    def client(socket_path: Path) -> None:
        with WorkerClient(socket_path) as nix:
            for text in ("", "/nix/store", "/etc/passwd", "/nix/store/x", f"{NOWHERE}/bin", "\udcff" * 50):
                for operation in (wire.IS_VALID_PATH, wire.QUERY_PATH_INFO, wire.NAR_FROM_PATH):
                    with pytest.raises(RefusedError) as refusal:
                        nix.ask(operation, text)
                    assert "is not valid" not in str(refusal.value)
            with pytest.raises(RefusedError, match="hash part"):
                nix.ask(wire.QUERY_PATH_FROM_HASH_PART, "../../etc/passwd")
            assert nix.ask(wire.IS_VALID_PATH, PATHS["text"]) == [1]

    async def body(daemon: Daemon) -> None:
        await aside(client, await daemon.socket())

    run(tmp_path, body)


def test_a_path_that_nobody_trusted_signed_is_an_error_and_never_absent(tmp_path: Path) -> None:
    def client(socket_path: Path) -> None:
        text = PATHS["text"]
        with WorkerClient(socket_path) as nix:
            for operation, *arguments in (
                (wire.IS_VALID_PATH, text),
                (wire.QUERY_PATH_INFO, text),
                (wire.QUERY_VALID_PATHS, [text], 0),
                (wire.QUERY_PATH_FROM_HASH_PART, text[11:43]),
                (wire.NAR_FROM_PATH, text),
            ):
                with pytest.raises(RefusedError, match="signature of a trusted key") as refusal:
                    nix.ask(operation, *arguments)
                assert "is not valid" not in str(refusal.value)

    async def body(daemon: Daemon) -> None:
        await aside(client, await daemon.socket(key=FOREIGN))
        assert daemon.store.stories.rows()

    run(tmp_path, body)


def test_referrers_are_those_that_were_asked_about(tmp_path: Path) -> None:
    def client(socket_path: Path) -> None:
        text = PATHS["self-reference"]
        with WorkerClient(socket_path) as nix:
            assert nix.ask(wire.QUERY_REFERRERS, text) == [[text]]

    async def body(daemon: Daemon) -> None:
        await aside(client, await daemon.socket())

    run(tmp_path, body)


def test_nars_are_the_verified_ones_byte_for_byte(tmp_path: Path) -> None:
    def client(socket_path: Path) -> None:
        with WorkerClient(socket_path) as nix:
            for name, text in PATHS.items():
                expected = (GOLDEN / f"{name}.nar").read_bytes()
                nix.send(encode_request(wire.NAR_FROM_PATH, [text], nix.version))
                nix.expect_last()
                assert nix.read(len(expected)) == expected
                assert nix.ask(wire.IS_VALID_PATH, text) == [1]  # nothing more, nothing less came

    async def body(daemon: Daemon) -> None:
        await aside(client, await daemon.socket())

    run(tmp_path, body)


def test_a_nar_that_differs_from_its_hash_is_an_error_before_its_first_byte(tmp_path: Path) -> None:
    cache = copied(tmp_path)
    info = narinfo(cache, "leaf")
    info_of_other = parse_narinfo(narinfo(cache, "outputs").read_bytes())
    lines = [
        f"URL: {info_of_other.url}" if line.startswith("URL: ") else line
        for line in info.read_text().splitlines()
        if not line.startswith("File")
    ]
    info.write_text("\n".join(lines) + "\n")

    def client(socket_path: Path) -> None:
        with WorkerClient(socket_path) as nix:
            with pytest.raises(RefusedError, match="signed"):
                nix.ask(wire.NAR_FROM_PATH, PATHS["leaf"])
            assert nix.ask(wire.IS_VALID_PATH, PATHS["text"]) == [1]

    async def body(daemon: Daemon) -> None:
        await aside(client, await daemon.socket(cache=f"file://{cache}"))

    run(tmp_path, body)


def test_a_nar_that_ends_early_ends_the_connection(tmp_path: Path) -> None:
    async def body(daemon: Daemon) -> None:
        session = daemon.enter()
        path = StorePath.parse_absolute(PATHS["leaf"])
        row = await daemon.store.whole(session.view, path, session.account)
        file = daemon.cache.nars.path(row.number)
        file.chmod(0o600)
        with open(file, "r+b") as nar:
            nar.truncate(row.nar_size - 8)
        daemon.store._is_whole = lambda row: True  # type: ignore[method-assign]  # it was cut after it was looked at

        def client(socket_path: Path) -> None:
            with WorkerClient(socket_path) as nix:
                nix.send(encode_request(wire.NAR_FROM_PATH, [PATHS["leaf"]], nix.version))
                nix.expect_last()
                with pytest.raises(EndedError):
                    nix.read(row.nar_size)

        await aside(client, await daemon.workers.open(session, "x"))
        assert any("ended after" in story.text for story in daemon.store.stories.rows())

    run(tmp_path, body)


def test_a_refused_operation_is_named_and_the_client_may_finish_sending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LINGER_SECONDS", 0.2)

    def client(socket_path: Path) -> None:
        with WorkerClient(socket_path) as nix:
            nix.send(wire.encode((39, NOWHERE)) + bytes(4 << 20))
            with pytest.raises(RefusedError, match=r"only be read: AddToStoreNar \(39\)"):
                nix.expect_last()
            assert nix.ended()

    async def body(daemon: Daemon) -> None:
        await aside(client, await daemon.socket())

    run(tmp_path, body)


def test_malformed_bytes_end_one_connection_and_disturb_no_other(tmp_path: Path) -> None:
    def client(socket_path: Path) -> None:
        with WorkerClient(socket_path) as steady:
            for noise in (b"GET / HTTP/1.1\r\n\r\n", wire.encode((wire.CLIENT_MAGIC, 0x200))):
                stranger = WorkerClient(socket_path, greet=False)
                stranger.send(noise)
                with pytest.raises(EndedError):
                    stranger.read(1000)
                stranger.close()
            old = WorkerClient(socket_path, 0x110, greet=False)
            old.send(wire.encode((wire.CLIENT_MAGIC, 0x110)))
            old.read(16)
            with pytest.raises(RefusedError, match=r"1\.16.*Nix 2\.3"):
                old.expect_last()
            old.close()
            huge = WorkerClient(socket_path)
            huge.send(wire.encode((1, 1 << 60)))
            with pytest.raises(RefusedError, match="announced"):
                huge.expect_last()
            huge.close()
            assert steady.ask(wire.IS_VALID_PATH, PATHS["text"]) == [1]

    async def body(daemon: Daemon) -> None:
        await aside(client, await daemon.socket())

    run(tmp_path, body)


def test_a_client_that_does_not_read_is_not_read_from_and_loses_nothing(tmp_path: Path) -> None:
    question = encode_request(wire.QUERY_PATH_INFO, [PATHS["outputs"]], wire.VERSION)

    def clients(socket_path: Path) -> int:
        lazy = WorkerClient(socket_path)
        lazy.socket.settimeout(0.3)
        sent = 0
        with pytest.raises(TimeoutError):
            while True:
                sent += lazy.socket.send(question[sent % len(question) :])
        lazy.socket.settimeout(10)
        with WorkerClient(socket_path) as other:
            assert other.ask(wire.IS_VALID_PATH, PATHS["text"]) == [1]
        for _ in range(sent // len(question)):
            assert lazy.reply(wire.QUERY_PATH_INFO)[0] == 1
        lazy.close()
        return sent

    async def body(daemon: Daemon) -> None:
        assert await aside(clients, await daemon.socket()) < 4 << 20

    run(tmp_path, body)


def test_silent_and_surplus_clients_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "GREETING_SECONDS", 0.5)
    monkeypatch.setattr(worker, "CONNECTIONS", 2)

    def clients(socket_path: Path) -> None:
        with WorkerClient(socket_path) as first, WorkerClient(socket_path) as second:
            surplus = WorkerClient(socket_path, greet=False)
            assert surplus.read(28) == b"veneer: too many connections"
            while surplus.socket.recv(1000):
                pass
            surplus.close()
            second.close()
            silent = WorkerClient(socket_path, greet=False)
            silent.send(client_hello()[:20])
            with pytest.raises(EndedError):
                silent.read(1000)
            silent.close()
            assert first.ask(wire.IS_VALID_PATH, PATHS["text"]) == [1]

    async def body(daemon: Daemon) -> None:
        await aside(clients, await daemon.socket())

    run(tmp_path, body)


def test_unfinished_requests_of_all_clients_together_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "MAX_HELD", 2 << 20)

    def clients(socket_path: Path) -> None:
        greedy = [WorkerClient(socket_path) for _ in range(2)]
        body = wire.encode((31, 100)) + wire.encode(("x" * wire.MAX_STRING,)) * 20
        greedy[0].send(body)
        with pytest.raises(RefusedError, match="too many unfinished"):
            greedy[1].send(body)
            greedy[1].expect_last()
        for client in greedy:
            client.close()

    async def body(daemon: Daemon) -> None:
        await aside(clients, await daemon.socket())

    run(tmp_path, body)


def test_a_bug_is_an_error_with_a_story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> list[wire.Value]:
        raise ZeroDivisionError("seven")

    monkeypatch.setattr(Answers, "later", broken)

    def client(socket_path: Path) -> None:
        with WorkerClient(socket_path) as nix, pytest.raises(RefusedError, match="seven"):
            nix.ask(wire.IS_VALID_PATH, PATHS["text"])

    async def body(daemon: Daemon) -> None:
        await aside(client, await daemon.socket())
        assert any("seven" in story.text for story in daemon.store.stories.rows())

    run(tmp_path, body)


def test_what_was_given_up_with_another_session_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def given_up(*_: object) -> list[wire.Value]:
        shared = asyncio.get_running_loop().create_future()
        shared.cancel()
        await shared
        return []

    monkeypatch.setattr(Answers, "later", given_up)

    def client(socket_path: Path) -> None:
        with WorkerClient(socket_path) as nix, pytest.raises(RefusedError, match="given up"):
            nix.ask(wire.IS_VALID_PATH, PATHS["text"])

    async def body(daemon: Daemon) -> None:
        await aside(client, await daemon.socket())

    run(tmp_path, body)


def test_a_socket_belongs_to_a_session_and_ends_with_it(tmp_path: Path) -> None:
    async def body(daemon: Daemon) -> None:
        trusting, strict = daemon.enter(), daemon.enter(key=FOREIGN)
        first = await daemon.workers.open(trusting, "first")
        second = await daemon.workers.open(strict, "second")
        assert await daemon.workers.open(trusting, "first") == first
        assert first == tmp_path / "cache" / "nix" / "first.sock"
        with pytest.raises(DaemonError, match="another session"):
            await daemon.workers.open(strict, "first")
        for bad in ("", "..", "a/b", "x" * 65, ".hidden", "a\n"):
            with pytest.raises(UsageError):
                await daemon.workers.open(strict, bad)
        assert stat.S_IMODE(first.stat().st_mode) == 0o600
        one, two = await aside(WorkerClient, first), await aside(WorkerClient, second)
        assert await aside(one.ask, wire.IS_VALID_PATH, PATHS["text"]) == [1]
        with pytest.raises(RefusedError, match="other-1"):
            await aside(two.ask, wire.IS_VALID_PATH, PATHS["text"])
        await daemon.sessions.leave(trusting)
        assert not first.exists()
        assert await aside(one.ended)
        one.close()
        with pytest.raises(RefusedError):
            await aside(two.ask, wire.IS_VALID_PATH, PATHS["text"])
        two.close()

    run(tmp_path, body)


def test_sockets_of_a_shared_daemon_are_open_to_other_users(tmp_path: Path) -> None:
    async def body(daemon: Daemon) -> None:
        first = await daemon.socket("first")
        assert stat.S_IMODE(first.stat().st_mode) == 0o666
        assert stat.S_IMODE(first.parent.stat().st_mode) == 0o755

    run(tmp_path, body, shared=True)


def test_what_a_killed_daemon_left_is_removed(tmp_path: Path) -> None:
    async def body(daemon: Daemon) -> None:
        left = await daemon.socket("left")
        stale = left.with_name("stale.sock")
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(stale))
        await daemon.workers.close()
        daemon.workers.remove_stale()
        assert list(left.parent.iterdir()) == []
        assert await daemon.socket("stale") == stale

    run(tmp_path, body)


def test_a_path_found_by_nix_is_announced_to_mounts_that_were_told_it_is_absent(tmp_path: Path) -> None:
    async def body(daemon: Daemon) -> None:
        session = daemon.enter()
        path = StorePath.parse_absolute(PATHS["text"])
        session.remember_absent(path)
        nix = await aside(WorkerClient, await daemon.workers.open(session, "x"))
        assert await aside(nix.ask, wire.IS_VALID_PATH, PATHS["text"]) == [1]
        nix.close()
        assert daemon.sent == [Frame(Kind.PRESENT, 0, path.basename.encode())]

    run(tmp_path, body)
