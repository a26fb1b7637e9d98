"""Real Nix reads a view through a worker socket, as a plain store URL: every version, healthy and not."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.faulty_http import FaultyServer, Stall, Status
from tests.support.nginx import Nginx, nar_requests
from tests.support.nix import NixError, RealNix
from tests.support.sample import SampleStore
from tests.support.trees import differences

pytestmark = pytest.mark.nix
SECONDS = 60


class ServedStore:
    """A store daemon with a default view, and its socket's store URL."""

    def __init__(self, home: Path, url: str, key: str, *options: str) -> None:
        self.cache = home / f"cache-{secrets.token_hex(4)}"
        self.cache.mkdir()
        self._view = home / f"{self.cache.name}.json"
        self._view.write_text(json.dumps({"sources": [{"url": url}], "keys": [key], "negative_ttl": 0}))
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"unix://{self.cache}/nix.sock"

    def start(self) -> None:
        """Returns when clients may connect."""
        ours, theirs = os.pipe()
        command: list[str | Path] = [sys.executable, "-m", "veneer.daemon"]
        command += ["--cache", self.cache, "--view", self._view]
        try:
            self._process = subprocess.Popen(
                [*command, "--ready-fd", str(theirs), *self._options],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs,),
            )
            os.close(theirs)
            assert os.read(ours, 1) == b"1", "the daemon did not start"
        finally:
            os.close(ours)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(SECONDS)
            self._process = None


@pytest.fixture
def serve(open_directory: Path) -> Iterator[Callable[..., ServedStore]]:
    """``serve(url, key, *options)``: a running daemon; all are stopped after the test."""
    served: list[ServedStore] = []

    def start(url: str, key: str, *options: str) -> ServedStore:
        served.append(ServedStore(open_directory, url, key, *options))
        return served[-1]

    yield start
    for each in served:
        each.stop()


SSH = """\
#!/bin/sh
# In place of ssh: "ssh HOST OPTIONS -- COMMAND" runs the command here.
case $1 in -O) exit 255 ;; esac
shift
while :; do
  case $1 in
    -oLocalCommand=*) ${1#-oLocalCommand=} ;;
    -*) ;;
    *) break ;;
  esac
  shift
done
exec sh -c "$*"
"""

RELAY = """\
#!{python}
import os, socket, sys, threading
sock = socket.socket(socket.AF_UNIX)
sock.connect({path!r})
def up():
    while data := os.read(0, 65536):
        sock.sendall(data)
    sock.shutdown(socket.SHUT_RDWR)
threading.Thread(target=up, daemon=True).start()
while data := sock.recv(65536):
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
"""


def over_ssh(store: ServedStore, nix: RealNix) -> str:
    """The store as another machine reaches it: its Nix has ssh connect it with the socket."""
    tools = nix.home / "bin"
    tools.mkdir()
    relay = RELAY.format(python=sys.executable, path=f"{store.cache}/nix.sock")
    for name, text in (("ssh", SSH), ("relay", relay)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    nix.environment["PATH"] = f"{tools}:{nix.environment['PATH']}"
    return f"ssh-ng://somewhere?remote-program={tools}/relay"


def narinfos(nginx: Nginx) -> Counter[str]:
    return Counter(r.path for r in nginx.requests() if r.path.endswith(".narinfo"))


def test_every_version_reads_a_closure_and_each_narinfo_is_asked_for_once(
    each_nix: Callable[[], RealNix],
    nix_cache: SampleStore,
    nginx: Callable[..., Nginx],
    serve: Callable[..., ServedStore],
) -> None:
    server = nginx(nix_cache.cache())
    store = serve(server.url, nix_cache.public)
    root, closure = nix_cache.paths["everything"], nix_cache.closure("everything")
    nix = each_nix()
    listed = nix.run("nix", "path-info", "-r", "--json", "--store", store.url, root)
    rows: Any = json.loads(listed)
    rows = list(rows.values()) if isinstance(rows, dict) else rows
    assert len(rows) == len(closure)
    assert sorted(nix.run("nix", "path-info", "-r", "--store", store.url, root).split()) == sorted(closure)
    assert sorted(narinfos(server).values()) == [1] * len(closure)
    assert nar_requests(server.requests()) == []
    expected = nix_cache.nix.run("nix-store", "-q", "--references", root).split()
    assert sorted(nix.run("nix-store", "--store", store.url, "-q", "--references", root).split()) == sorted(
        expected
    )
    assert root in nix.run("nix-store", "--store", store.url, "-q", "--referrers", nix_cache.paths["several"])


def test_every_version_reads_and_copies_content_from_another_machine(
    each_nix: Callable[[], RealNix],
    nix_cache: SampleStore,
    nginx: Callable[..., Nginx],
    serve: Callable[..., ServedStore],
) -> None:
    server = nginx(nix_cache.cache())
    store = serve(server.url, nix_cache.public)
    nix, shapes = each_nix(), nix_cache.paths["shapes"]
    url = over_ssh(store, nix)
    listed = nix.run("nix", "store", "ls", "-R", "--store", url, shapes)
    assert "./deep/er/than/most/file" in listed
    assert nix.run("nix", "store", "cat", "--store", url, f"{shapes}/deep/er/than/most/file") == "bottom\n"
    dumped = subprocess.run(
        [nix.programs / "nix", "store", "dump-path", "--store", url, shapes],
        env=nix.environment,
        capture_output=True,
        check=True,
    )
    own = nix_cache.nix
    expected = subprocess.run(
        [own.programs / "nix", "store", "dump-path", shapes],
        env=own.environment,
        capture_output=True,
        check=True,
    )
    assert dumped.stdout == expected.stdout
    key = ["--option", "trusted-public-keys", nix_cache.public]
    nix.run("nix", "copy", "--from", url, *key, nix_cache.paths["everything"])
    for attribute in ("shapes", "big", "selfish", "hello", "pointer", "several.dev"):
        assert differences(nix_cache.truth(attribute), nix.unpacked(nix_cache.paths[attribute])) == []
    nix.run("nix", "store", "verify", "-r", "--store", url, *key, nix_cache.paths["everything"])
    assert set(Counter(r.path for r in nar_requests(server.requests())).values()) == {1}


@pytest.mark.root
@pytest.mark.fuse
def test_with_the_mount_beneath_it_the_socket_is_a_whole_store(
    each_nix: Callable[[], RealNix],
    nix_cache: SampleStore,
    nginx: Callable[..., Nginx],
    serve: Callable[..., ServedStore],
) -> None:
    server = nginx(nix_cache.cache())
    store = serve(server.url, nix_cache.public)
    nix, shapes = each_nix(), nix_cache.paths["shapes"]
    root = nix.home / "root"
    (root / "nix/store").mkdir(parents=True)
    url = f"{store.url}?root={root}"
    mount = [sys.executable, "-m", "veneer.cli.main", "mount", "--cache", server.url]
    mount += ["--trusted-public-key", nix_cache.public, "--cache-dir", str(store.cache)]
    (nix.home / "empty.toml").touch()
    mount += ["--config", str(nix.home / "empty.toml"), str(root / "nix/store")]
    mounted = subprocess.Popen(mount, stderr=subprocess.PIPE, text=True)
    with mounted:
        try:
            assert mounted.stderr is not None
            assert "mounted on" in mounted.stderr.readline()
            assert "./deep/er/than/most/file" in nix.run("nix", "store", "ls", "-R", "--store", url, shapes)
            file = f"{shapes}/deep/er/than/most/file"
            assert nix.run("nix", "store", "cat", "--store", url, file) == "bottom\n"
            key = ["--option", "trusted-public-keys", nix_cache.public]
            nix.run("nix", "copy", "--from", url, *key, nix_cache.paths["everything"])
            for attribute in ("shapes", "big", "selfish", "hello", "pointer", "several.dev"):
                assert differences(nix_cache.truth(attribute), nix.unpacked(nix_cache.paths[attribute])) == []
            nix.run("nix", "store", "verify", "-r", "--store", url, *key, nix_cache.paths["greet"])
        finally:
            mounted.send_signal(signal.SIGINT)
    assert set(narinfos(server).values()) == {1}


def test_what_would_change_the_store_is_refused_in_words(
    each_nix: Callable[[], RealNix], nix_cache: SampleStore, serve: Callable[..., ServedStore]
) -> None:
    store = serve(f"file://{nix_cache.cache()}", nix_cache.public)
    nix = each_nix()
    file = nix.home / "file"
    file.write_text("x" * (4 << 20))
    for command in (
        ("nix", "store", "gc", "--store", store.url),
        ("nix-store", "--store", store.url, "--add", file),
        ("nix-store", "--store", store.url, "--optimise"),
        ("nix-store", "--store", store.url, "--verify"),
    ):
        with pytest.raises(NixError, match="only be read"):
            nix.run(*command)
    nix.run("nix", "path-info", "--store", store.url, nix_cache.paths["note"])


def test_a_path_that_no_source_has_is_invalid_to_nix(
    each_nix: Callable[[], RealNix], nix_cache: SampleStore, serve: Callable[..., ServedStore]
) -> None:
    store = serve(f"file://{nix_cache.cache()}", nix_cache.public)
    with pytest.raises(NixError, match="is not valid"):
        each_nix().run("nix-store", "--store", store.url, "-q", "--references", f"/nix/store/{'0' * 32}-no")


def test_an_unsigned_closure_fails_with_the_names_of_the_keys(
    each_nix: Callable[[], RealNix], nix_cache: SampleStore, serve: Callable[..., ServedStore]
) -> None:
    store = serve(f"file://{nix_cache.cache(signed='stranger')}", nix_cache.public)
    with pytest.raises(NixError, match="stranger-1") as failure:
        each_nix().run("nix", "path-info", "--store", store.url, nix_cache.paths["greet"])
    assert "trusted-1" in str(failure.value)
    assert "is not valid" not in str(failure.value)


def test_a_reference_missing_in_the_cache_is_named(
    each_nix: Callable[[], RealNix],
    nix_cache: SampleStore,
    serve: Callable[..., ServedStore],
    tmp_path: Path,
) -> None:
    cache = shutil.copytree(nix_cache.cache(), tmp_path / "cache")
    (cache / f"{nix_cache.hash_part('libraries')}.narinfo").unlink()
    store = serve(f"file://{cache}", nix_cache.public)
    nix = each_nix()
    with pytest.raises(NixError, match=nix_cache.basename("libraries")):
        nix.run("nix", "path-info", "-r", "--store", store.url, nix_cache.paths["greet"])
    assert nix.run("nix", "path-info", "--store", store.url, nix_cache.paths["greet"])
    shutil.copy(nix_cache.cache() / f"{nix_cache.hash_part('libraries')}.narinfo", cache)
    assert nix.run("nix", "path-info", "-r", "--store", store.url, nix_cache.paths["greet"])


def test_a_source_that_fails_or_hangs_is_an_error_in_time_and_never_invalid(
    each_nix: Callable[[], RealNix],
    nix_cache: SampleStore,
    serve: Callable[..., ServedStore],
    faulty_http: Callable[[Path], FaultyServer],
) -> None:
    server = faulty_http(nix_cache.cache())
    nix, path = each_nix(), nix_cache.paths["greet"]
    for fault, seconds, words in ((Stall(), "1", "within 1 s"), (Status(500), "30", "500")):
        store = serve(server.url, nix_cache.public, "--answer-seconds", seconds)
        command = ["path-info", "-r", "--store", store.url, path]
        server.fail(f"/{nix_cache.hash_part('libraries')}.narinfo", fault)
        with pytest.raises(NixError, match=words) as failure:
            nix.run("nix", *command)
        assert "is not valid" not in str(failure.value)
        server.heal()
        store.stop()  # what rests after a failure is not what is tested
        store.start()
        assert nix.run("nix", *command)


def test_a_daemon_killed_in_the_middle_fails_nix_and_the_next_one_goes_on(
    each_nix: Callable[[], RealNix],
    nix_cache: SampleStore,
    serve: Callable[..., ServedStore],
    faulty_http: Callable[[Path], FaultyServer],
) -> None:
    server = faulty_http(nix_cache.cache())
    stalled = f"/{nix_cache.hash_part('libraries')}.narinfo"
    server.fail(stalled, Stall())
    store = serve(server.url, nix_cache.public)
    nix = each_nix()
    command = ["nix", "path-info", "-r", "--store", store.url, nix_cache.paths["greet"]]
    waiting = subprocess.Popen(
        [nix.programs / command[0], *command[1:]],
        env=nix.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not server.count(stalled):
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.02)
    store.kill()
    _, said = waiting.communicate(timeout=SECONDS)
    assert waiting.returncode
    # 2.8 says that it was an end of file, or what was left unread made of it.
    assert any(word in said for word in ("disconnected", "unexpected end-of-file", "reset by peer"))
    server.heal()
    store.start()
    assert nix.run(*command)
