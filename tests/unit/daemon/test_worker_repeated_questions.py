"""Nix asks the same questions with each new database: the second answer comes from memory and is the first one's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.golden import FOREIGN
from tests.support.worker_client import RefusedError, WorkerClient, encode_request
from tests.unit.daemon.test_worker_sockets import NOWHERE, PATHS, Daemon, aside, run
from veneer.daemon.worker_replies import Replies
from veneer.formats import worker_wire as wire
from veneer.model.hashes import Hash
from veneer.model.path_info import PathInfo, UnverifiedPathInfo
from veneer.model.store_path import DEFAULT_STORE_DIR, StorePath

QUESTIONS = [
    (operation, values)
    for text in PATHS.values()
    for operation, values in (
        (wire.IS_VALID_PATH, (text,)),
        (wire.QUERY_PATH_INFO, (text,)),
        (wire.QUERY_VALID_PATHS, ([text], 0)),
    )
]


def answers(socket_path: Path, version: int) -> list[object]:
    with WorkerClient(socket_path, version) as nix:
        return [nix.ask(operation, *values) for operation, values in QUESTIONS]


@pytest.mark.parametrize("version", [0x115, 0x11B, 0x126])
def test_repeated_questions_have_the_same_answers_and_are_booked(tmp_path: Path, version: int) -> None:
    async def body(daemon: Daemon) -> None:
        session = daemon.enter()
        path = await daemon.workers.open(session, "one")
        first = await aside(answers, path, version)
        assert await aside(answers, path, version) == first
        assert await aside(answers, path, version) == first
        booked = session.account.report()
        assert booked["closure_paths"] == len(PATHS)

        config = daemon.enter()
        again = await daemon.workers.open(config, "two")
        assert await aside(answers, again, version) == first
        assert config.account.report()["closure_paths"] == len(PATHS)

    run(tmp_path, body)


def test_a_question_in_pieces_and_many_at_once_are_answered_as_ever(tmp_path: Path) -> None:
    def client(path: Path) -> None:
        version = wire.VERSION
        with WorkerClient(path) as nix:
            expected = [nix.ask(operation, *values) for operation, values in QUESTIONS]
            encoded = [encode_request(operation, values, version) for operation, values in QUESTIONS]
            nix.send(b"".join(encoded))
            assert [nix.reply(operation) for operation, _ in QUESTIONS] == expected
            for (operation, values), data, answer in zip(QUESTIONS, encoded, expected, strict=True):
                nix.send(data[:-8])
                nix.send(data[-8:] + encode_request(operation, values, version))
                assert nix.reply(operation) == answer
                assert nix.reply(operation) == answer

    async def body(daemon: Daemon) -> None:
        await aside(client, await daemon.socket())

    run(tmp_path, body)


def test_a_view_with_other_keys_inherits_no_answer(tmp_path: Path) -> None:
    def refused(path: Path) -> None:
        with WorkerClient(path) as nix:
            for operation, values in QUESTIONS:
                with pytest.raises(RefusedError, match="no valid signature"):
                    nix.ask(operation, *values)

    async def body(daemon: Daemon) -> None:
        trusting = await daemon.socket("trusting")
        for _ in range(2):
            await aside(answers, trusting, wire.VERSION)
        await aside(refused, await daemon.socket("other", key=FOREIGN))

    run(tmp_path, body)


def test_absence_is_asked_again_each_time(tmp_path: Path) -> None:
    def client(path: Path) -> None:
        with WorkerClient(path) as nix:
            for _ in range(3):
                assert nix.ask(wire.IS_VALID_PATH, NOWHERE) == [0]
                assert nix.ask(wire.QUERY_VALID_PATHS, [NOWHERE], 0) == [[]]

    async def body(daemon: Daemon) -> None:
        session = daemon.enter()
        await aside(client, await daemon.workers.open(session, "one"))
        assert session.account.report()["closure_paths"] == 0

    run(tmp_path, body)


def info(number: int) -> PathInfo:
    path = StorePath("0" * 32, f"path-{number}")
    return PathInfo(UnverifiedPathInfo(path, "nar/x", "none", Hash("sha256", bytes(32)), 1000), ())


def question(number: int) -> bytes:
    return encode_request(wire.IS_VALID_PATH, (info(number).store_path.absolute(),), wire.VERSION)


def test_replies_in_memory_are_bounded() -> None:
    replies = Replies(DEFAULT_STORE_DIR, limit=10_000)
    kept = 0
    for number in range(300):
        replies.keep(info(number))
        kept = max(kept, sum(replies.get(question(n)) is not None for n in range(number)))
    assert replies.get(question(299)) is not None
    assert kept < 20


def test_keeping_replies_twice_takes_no_more_memory() -> None:
    replies = Replies(DEFAULT_STORE_DIR, limit=10_000)
    for _ in range(300):
        replies.keep(info(1))
    assert not replies.full
