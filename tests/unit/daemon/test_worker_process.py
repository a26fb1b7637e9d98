"""The daemon as a process: where its worker sockets are and how long they stay."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.golden import KEY, PATHS, url
from tests.support.worker_client import WorkerClient
from veneer.cli.client import Client, connect
from veneer.formats import worker_wire as wire
from veneer.model.errors import VeneerError

VIEW: dict[str, object] = {"sources": [{"url": url("zstd")}], "keys": [KEY]}
TEXT = PATHS["text"].absolute()


def start(cache: Path, *options: str) -> subprocess.Popen[bytes]:
    """A daemon to which clients may connect."""
    cache.mkdir(exist_ok=True)
    ours, theirs = os.pipe()
    command = [sys.executable, "-m", "veneer.daemon", "--cache", str(cache), "--ready-fd", str(theirs)]
    process = subprocess.Popen([*command, *options], stdin=subprocess.DEVNULL, pass_fds=(theirs,))
    os.close(theirs)
    try:
        assert os.read(ours, 1) == b"1"
    finally:
        os.close(ours)
    return process


def client_of(cache: Path) -> Client:
    client = connect(cache, VIEW)
    assert client is not None
    return client


def test_a_client_gets_a_socket_that_ends_with_its_connection(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    daemon = start(cache)
    try:
        with client_of(cache) as client:
            place = Path(str(client.control("nix-socket", {"name": "build-1"})["path"]))
            assert place == cache / "nix" / "build-1.sock"
            with client_of(cache) as rival, pytest.raises(VeneerError, match="another session"):
                rival.control("nix-socket", {"name": "build-1"})
            with pytest.raises(VeneerError, match="not a name"):
                client.control("nix-socket", {"name": "../daemon"})
            nix = WorkerClient(place)
            assert nix.ask(wire.IS_VALID_PATH, TEXT) == [1]
        assert nix.ended()
        nix.close()
        assert not place.exists()
        assert not (cache / "nix.sock").exists()  # the default view has no sources
    finally:
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(20) == 0


def test_the_default_view_has_a_socket_which_a_new_daemon_takes_over(tmp_path: Path) -> None:
    cache, view = tmp_path / "cache", tmp_path / "view.json"
    view.write_text(json.dumps(VIEW))
    for number in (signal.SIGKILL, signal.SIGTERM):
        daemon = start(cache, "--view", str(view))
        try:
            with WorkerClient(cache / "nix.sock") as nix:
                assert nix.ask(wire.IS_VALID_PATH, TEXT) == [1]
        finally:
            daemon.send_signal(number)
            daemon.wait(20)
    assert not (cache / "nix.sock").exists()
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(FileNotFoundError):
        late.connect(str(cache / "nix.sock"))
