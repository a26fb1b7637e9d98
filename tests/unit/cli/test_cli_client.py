"""The daemon's client: greetings, answers, failures, and a daemon that is not there."""

from __future__ import annotations

import errno
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from veneer.cli import client
from veneer.cli.client import Client, LostDaemonError, connect, open_socket
from veneer.formats import request_wire as wire
from veneer.formats.request_wire import Frame, Kind
from veneer.model.errors import CacheError, DaemonError, NotFoundError, VeneerError

Reply = Callable[[Frame], list[Frame]]
GENERATION = bytes(range(16))


def welcome(frame: Frame) -> list[Frame]:
    return [
        Frame(Kind.WELCOME, frame.id, json.dumps({"version": 1, "generation": GENERATION.hex()}).encode())
    ]


def document(kind: Kind, frame: Frame, value: object) -> Frame:
    return Frame(kind, frame.id, json.dumps(value).encode())


class FakeDaemon:
    """Answers each frame by ``replies`` in turn, then closes."""

    def __init__(self, *replies: Reply) -> None:
        self.ours, self._theirs = socket.socketpair()
        self.seen: list[Frame] = []
        self._replies = replies
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        splitter, frames = wire.Splitter(), list[Frame]()
        with self._theirs:
            for reply in self._replies:
                while not frames:
                    data = self._theirs.recv(65536)
                    if not data:
                        return
                    frames = splitter.feed(data)
                self.seen.append(frames[0])
                for frame in reply(frames.pop(0)):
                    self._theirs.sendall(frame.encode())

    def join(self) -> None:
        self._thread.join(5)
        assert not self._thread.is_alive()


@pytest.fixture
def daemon_of() -> Iterator[Callable[..., FakeDaemon]]:
    made: list[FakeDaemon] = []

    def make(*replies: Reply) -> FakeDaemon:
        made.append(FakeDaemon(*replies))
        return made[-1]

    yield make
    for daemon in made:
        daemon.ours.close()
        daemon.join()


def test_a_greeting_brings_the_view_and_learns_the_generation(daemon_of: Callable[..., FakeDaemon]) -> None:
    daemon = daemon_of(welcome)
    with Client(daemon.ours, {"sources": []}, "there") as client:
        assert client.greet() == GENERATION
    daemon.join()
    assert json.loads(daemon.seen[0].body) == {"version": 1, "view": {"sources": []}}


def test_a_client_does_not_wait_for_a_daemon_that_is_starting() -> None:
    ours, theirs = socket.socketpair()
    with theirs, Client(ours, None, "there"):
        assert theirs.recv(4)


def test_results_come_after_progress_and_notices_are_skipped(daemon_of: Callable[..., FakeDaemon]) -> None:
    daemon = daemon_of(
        welcome,
        lambda f: [
            Frame(Kind.DROPPED, 0, wire.path_number_body(3)),
            document(Kind.PROGRESS, f, {"paths_done": 1}),
            document(Kind.RESULT, f, {"evicted": 2}),
        ],
    )
    told: list[object] = []
    with Client(daemon.ours, None, "there") as client:
        assert client.control("gc", {"dry_run": True}, told.append) == {"evicted": 2}
    assert told == [{"paths_done": 1}]
    assert json.loads(daemon.seen[1].body) == {"do": "gc", "dry_run": True}


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, VeneerError), (errno.ENOENT, NotFoundError)])
def test_a_failure_keeps_its_story_and_hint(
    daemon_of: Callable[..., FakeDaemon], number: int, kind: type[VeneerError]
) -> None:
    daemon = daemon_of(
        welcome,
        lambda f: [Frame(Kind.FAILED, f.id, wire.failed_body(number, "it broke (there)\nhint: mend it"))],
    )
    with Client(daemon.ours, None, "there") as client, pytest.raises(VeneerError) as caught:
        client.control("fetch")
    assert type(caught.value) is kind
    assert (caught.value.what, caught.value.hint) == ("it broke (there)", "mend it")


def test_absent_is_not_found(daemon_of: Callable[..., FakeDaemon]) -> None:
    daemon = daemon_of(welcome, lambda f: [Frame(Kind.ABSENT, f.id, wire.absent_body(1000))])
    with Client(daemon.ours, None, "there") as client, pytest.raises(NotFoundError):
        client.control("tree")


@pytest.mark.parametrize(
    ("reply", "what"),
    [
        (lambda f: [], "closed the connection"),
        (lambda f: [Frame(Kind.RESULT, f.id, b"nonsense")], "broke the protocol"),
        (lambda f: [Frame(Kind.RESULT, f.id, b"[]")], "broke the protocol"),
        (lambda f: [Frame(Kind.FOUND, f.id, wire.found_body(1, 2))], "answered with FOUND"),
    ],
)
def test_a_daemon_that_breaks_off_or_talks_nonsense_is_an_error(
    daemon_of: Callable[..., FakeDaemon], reply: Reply, what: str
) -> None:
    daemon = daemon_of(welcome, reply)
    with Client(daemon.ours, None, "there") as client, pytest.raises(DaemonError, match=what):
        client.control("status")


def test_a_silent_daemon_is_an_error_after_the_limit() -> None:
    ours, theirs = socket.socketpair()
    with theirs, Client(ours, None, "there") as client, pytest.raises(DaemonError, match="does not answer"):
        client.greet(0.01)


def test_what_a_daemon_said_before_it_left_is_still_heard() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(Frame(Kind.FAILED, 1, wire.failed_body(errno.EIO, "no such scheme")).encode())
    theirs.close()
    with Client(ours, None, "there") as client, pytest.raises(VeneerError, match="no such scheme"):
        client.greet()


def test_no_daemon_is_no_error(tmp_path: Path) -> None:
    assert connect(tmp_path / "missing", None) is None
    assert open_socket(tmp_path) is None
    socket_path = tmp_path / wire.SOCKET_NAME
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(socket_path))
    assert open_socket(tmp_path) is None


def test_long_cache_directories_have_reachable_sockets(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listening:
        short = tmp_path / "s"
        listening.bind(str(short))
        listening.listen()
        short.rename(deep / wire.SOCKET_NAME)
        found = open_socket(deep)
        assert found is not None
        found.close()


def test_a_cache_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError):
        open_socket(tmp_path / "file")


@pytest.mark.parametrize("reads", [True, False])
def test_a_daemon_that_ends_while_it_is_asked_is_none(tmp_path: Path, reads: bool) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / wire.SOCKET_NAME))
        listening.listen()

        def end() -> None:
            with listening.accept()[0] as caller:
                caller.recv(65536 if reads else 1, 0 if reads else socket.MSG_PEEK)

        ending = threading.Thread(target=end)
        ending.start()
        assert connect(tmp_path, None) is None
        ending.join(5)


def test_a_daemon_that_takes_nobody_is_given_up_though_its_queue_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.1)
    failures: list[str] = []

    def try_it() -> None:
        try:
            connect(tmp_path, None)
        except DaemonError as error:
            failures.append(error.what)

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / wire.SOCKET_NAME))
        listening.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(tmp_path / wire.SOCKET_NAME))
            trying = threading.Thread(target=try_it, daemon=True)
            trying.start()
            trying.join(20)
            assert failures == ["cannot reach the daemon: Resource temporarily unavailable"]


def test_a_client_that_was_closed_has_lost_its_daemon() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        client = Client(ours, None, "there")
        client.close()
        with pytest.raises(LostDaemonError, match="lost the daemon"):
            client.control("report", seconds=1)
