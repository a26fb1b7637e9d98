"""The faulty server fails exactly as told, so that a test of ours cannot pass by accident."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import faulty_http as faults
from tests.support.faulty_http import FaultyServer

CONTENT = bytes(range(256)) * 8


@pytest.fixture
def server(tmp_path: Path, faulty_http: Callable[[Path], FaultyServer]) -> FaultyServer:
    (tmp_path / "file").write_bytes(CONTENT)
    return faulty_http(tmp_path)


def get(server: FaultyServer, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    try:
        connection.request("GET", "/file", headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_serves_files_and_ranges(server: FaultyServer) -> None:
    assert get(server) == (200, CONTENT)
    assert get(server, Range="bytes=10-19") == (206, CONTENT[10:20])
    assert get(server, Range="bytes=2000-") == (206, CONTENT[2000:])
    assert get(server, Range="bytes=9999-") == (416, b"")
    assert server.count("/file") == 4


def test_a_fault_ends_after_its_number_of_times(server: FaultyServer) -> None:
    server.fail("/f*", faults.Status(503), times=2)
    assert [get(server)[0] for _ in range(3)] == [503, 503, 200]


def test_truncated(server: FaultyServer) -> None:
    server.fail("*", faults.Truncated(after=100))
    with pytest.raises(http.client.IncompleteRead) as caught:
        get(server)
    assert caught.value.partial == CONTENT[:100]


@pytest.mark.parametrize("after", [-1, 0, 100])
def test_reset(server: FaultyServer, after: int) -> None:
    server.fail("*", faults.Reset(after))
    with pytest.raises(ConnectionResetError):
        get(server)


@pytest.mark.parametrize("after", [-1, 100])
def test_stalled_answer_goes_on_when_healed(server: FaultyServer, after: int) -> None:
    server.fail("*", faults.Stall(after))
    with (
        pytest.raises(TimeoutError),
        socket.create_connection(("127.0.0.1", server.port), timeout=0.2) as connection,
    ):
        connection.sendall(b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n")
        while connection.recv(65536):
            pass
    answers: list[tuple[int, bytes]] = []
    reader = threading.Thread(target=lambda: answers.append(get(server)))
    reader.start()
    reader.join(0.1)
    assert answers == []
    server.heal()
    reader.join(5)
    assert answers == [(200, CONTENT)]


def test_wrong_lengths(server: FaultyServer) -> None:
    server.fail("*", faults.WrongLength(5), times=1)
    server.fail("*", faults.WrongLength(-5))
    with pytest.raises(http.client.IncompleteRead):
        get(server)
    assert get(server) == (200, CONTENT[:-5])


def test_wrong_bytes_and_ranges(server: FaultyServer) -> None:
    server.fail("*", faults.Flipped(-1), times=1)
    server.fail("*", faults.RangeIgnored(), times=1)
    server.fail("*", faults.WrongRange(1, hidden=True), times=1)
    server.fail("*", faults.Body(b"other"), times=1)
    assert get(server) == (200, CONTENT[:-1] + bytes([CONTENT[-1] ^ 0xFF]))
    assert get(server, Range="bytes=10-19") == (200, CONTENT)
    assert get(server, Range="bytes=10-19") == (206, CONTENT[11:21])
    assert get(server) == (200, b"other")


def test_refused_and_accepted_again(server: FaultyServer) -> None:
    port = server.port
    server.refuse()
    with pytest.raises(ConnectionRefusedError):
        get(server)
    server.accept()
    assert server.port == port
    assert get(server) == (200, CONTENT)
