"""Sources that cheat, stall, stop and come back: what programs in an environment meet, and what ``veneer status`` tells."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.test_end_to_end_trees import Census, Serve
from tests.support.callers import Caller, eventually
from tests.support.damage import flip, nar_file_of
from tests.support.faulty_http import FaultyServer, Stall
from tests.support.nginx import nar_requests
from tests.support.sample import SampleStore

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.nix, pytest.mark.nginx]

LIMIT = 20.0
"""Seconds after which a read of what cannot be had must have failed: tries and pauses included, on a busy machine."""


def nar_file(cache: Path, sample: SampleStore, attribute: str) -> Path:
    return nar_file_of(cache, sample.hash_part(attribute))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.fixture
def damaged(nix_cache: SampleStore, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a cache in which the NAR of ``big`` is not what was signed."""

    def make(damage: Callable[[Path], None], compression: str, *, listings: bool = True) -> Path:
        cache = tmp_path / "damaged"
        shutil.copytree(nix_cache.cache(compression, listings=listings), cache)
        damage(nar_file(cache, nix_cache, "big"))
        return cache

    return make


# Content that is not what was signed.


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("damage", [flip, cut])
def test_damaged_content_is_an_io_error_and_never_wrong_bytes(
    damage: Callable[[Path], None],
    compression: str,
    caller: Caller,
    nix_cache: SampleStore,
    damaged: Callable[..., Path],
    nginx: Serve,
) -> None:
    server = nginx(damaged(damage, compression))
    caller.use(server.url, key=nix_cache.public)
    big = nix_cache.paths["big"]
    with caller.environment_probe() as probe:
        assert probe.ask("look", path=f"{big}/data")["size"] == 3145728
        for name in ("data", "again"):
            answer = probe.ask("read", path=f"{big}/{name}")
            assert (answer["error"], answer["size"]) == ("EIO", 0)
            assert answer["seconds"] < LIMIT
        stories = caller.stories()
        assert nix_cache.basename("big") in stories
        assert server.url in stories
        if damage is flip:
            assert "quarantine" in stories
            assert len(nar_requests(server.requests())) == 1  # nobody asks for it again
        assert probe.ask("read", path=nix_cache.paths["note"])["size"] == 7
        assert probe.finish() == 0
    assert "EIO" in probe.errors


def test_damaged_content_without_listing_fails_the_name(
    as_root: Caller, nix_cache: SampleStore, damaged: Callable[..., Path], nginx: Serve
) -> None:
    as_root.use(nginx(damaged(flip, "zstd", listings=False)).url, key=nix_cache.public)
    with as_root.environment_probe() as probe:
        assert probe.ask("look", path=nix_cache.paths["big"])["error"] == "EIO"


@pytest.mark.parametrize("damage", [flip, cut])
def test_the_next_source_serves_what_the_first_has_damaged(
    damage: Callable[[Path], None],
    caller: Caller,
    nix_cache: SampleStore,
    unpacked: Census,
    damaged: Callable[..., Path],
    nginx: Serve,
) -> None:
    bad = nginx(damaged(damage, "zstd"))
    good = nginx(nix_cache.cache("xz"))
    caller.use(bad.url + "?priority=1", good.url + "?priority=2", key=nix_cache.public)
    big = nix_cache.paths["big"]
    with caller.environment_probe() as probe:
        found = probe.ask("census", tops=[big])["trees"][big]
        assert found == unpacked[big]
        stories = caller.stories()
    assert bad.url in stories
    assert len(nar_requests(bad.requests())) >= 1
    assert len(nar_requests(good.requests())) == 1


# Servers that stop, and come back.


def test_a_stopped_server_is_an_io_error_until_it_is_back(
    caller: Caller, nix_cache: SampleStore, unpacked: Census, nginx: Serve
) -> None:
    server = nginx(nix_cache.cache("zstd"))
    caller.use(server.url, key=nix_cache.public)
    note, big, many = (nix_cache.paths[name] for name in ("note", "big", "many"))
    data = unpacked[big]["/data"]
    with caller.environment_probe() as probe:
        assert probe.ask("read", path=note)["size"] == 7
        assert probe.ask("look", path=f"{big}/data")["size"] == data[1]
        server.stop()
        for answer in (probe.ask("read", path=f"{big}/data"), probe.ask("look", path=many)):
            assert answer["error"] == "EIO"
            assert answer["seconds"] < LIMIT
        assert probe.ask("read", path=note, cold=True)["size"] == 7
        server.start()
        answer = eventually(lambda: _unless_failed(probe.ask("read", path=f"{big}/data")))
        assert (answer["digest"], answer["size"]) == (data[2], data[1])
        assert (
            eventually(lambda: _unless_failed(probe.ask("census", tops=[many])))["trees"][many]
            == unpacked[many]
        )
        assert probe.finish() == 0


def _unless_failed(answer: dict[str, object]) -> dict[str, object] | None:
    return None if "error" in answer else answer


def test_a_server_that_says_nothing_costs_no_more_than_the_patience(
    caller: Caller, nix_cache: SampleStore, faulty_http: Callable[[Path], FaultyServer]
) -> None:
    server = faulty_http(nix_cache.cache("zstd"))
    caller.use(server.url, key=nix_cache.public)
    big = nix_cache.paths["big"]
    with caller.environment_probe("--patience", "2") as probe:
        assert probe.ask("read", path=nix_cache.paths["note"])["size"] == 7
        server.fail("/nar/*", Stall())
        answer = probe.ask("read", path=f"{big}/data")
        assert answer["error"] == "EIO"
        assert 2 <= answer["seconds"] < 8
        # The download goes on for whoever asks later.
        server.heal()
        assert eventually(lambda: _unless_failed(probe.ask("read", path=f"{big}/data")))["size"] == 3145728
        probe.finish()
    assert "did not get on with it for 2 s" in probe.errors


@pytest.mark.parametrize("way", ["run", "mount"])
def test_a_path_that_a_cache_gains_appears(
    way: str, caller: Caller, nix_cache: SampleStore, unpacked: Census, nginx: Serve, tmp_path: Path
) -> None:
    complete, cache = nix_cache.cache("zstd"), tmp_path / "cache"
    shutil.copytree(complete, cache)
    narinfo = cache / f"{nix_cache.hash_part('hello')}.narinfo"
    narinfo.unlink()
    caller.use(nginx(cache).url, key=nix_cache.public)
    caller.configure(negative_ttl=1)
    hello, target = nix_cache.paths["hello"], caller.home / "mnt"
    seen = hello if way == "run" else str(target / nix_cache.basename("hello"))
    with caller.environment_probe() if way == "run" else caller.mount_probe(target) as probe:
        for _ in range(3):
            assert probe.ask("look", path=seen)["error"] == "ENOENT"
        shutil.copy(complete / narinfo.name, narinfo)
        eventually(lambda: "error" not in probe.ask("look", path=seen), 4)
        assert probe.ask("census", tops=[seen])["trees"][seen] == unpacked[hello]


# Readers that wait.


def test_a_slow_download_delays_no_other_path_and_an_interrupt_ends_only_its_reader(
    caller: Caller, nix_cache: SampleStore, unpacked: Census, faulty_http: Callable[[Path], FaultyServer]
) -> None:
    cache = nix_cache.cache("none")
    server = faulty_http(cache)
    caller.use(server.url, key=nix_cache.public)
    big, many = nix_cache.paths["big"], nix_cache.paths["many"]
    slow = "/" + str(nar_file(cache, nix_cache, "big").relative_to(cache))
    server.fail(slow, Stall(after=1 << 20))
    with caller.environment_probe() as patient, caller.environment_probe() as other:
        patient.tell("read", path=f"{big}/data")
        eventually(lambda: server.count(slow))
        impatient = caller.popen(caller.words("run", "--quiet", "--", "cat", f"{big}/data"))
        with impatient:
            try:
                eventually(lambda: _waits_for_content(impatient.pid))
                answer = other.ask("census", tops=[many])
                assert answer["trees"][many] == unpacked[many]
                began = time.monotonic()
                os.killpg(impatient.pid, signal.SIGINT)
                assert impatient.wait(10) == -signal.SIGINT
                assert time.monotonic() - began < 5
            finally:
                impatient.kill()
        assert not patient.has_answer()
        server.heal()
        assert patient.answer()["digest"] == unpacked[big]["/data"][2]
    assert server.count(slow) == 1


def _waits_for_content(supervisor: int) -> bool:
    """Whether the command ``cat`` of this run sleeps in the kernel for bytes of a file."""
    for pid in _descendants(supervisor):
        process = Path(f"/proc/{pid}")
        with contextlib.suppress(OSError):  # it ended meanwhile
            stack = (process / "stack").read_text()
            if (process / "comm").read_text() == "cat\n" and re.search("fuse|folio_wait|filemap", stack):
                return True
    return False


def _descendants(pid: int) -> list[int]:
    try:
        children = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [d for child in children for d in _descendants(child)]


def test_ctrl_c_on_a_terminal_ends_a_waiting_run_at_once(
    caller: Caller, nix_cache: SampleStore, faulty_http: Callable[[Path], FaultyServer]
) -> None:
    server = faulty_http(nix_cache.cache("zstd"))
    server.fail("/nar/*", Stall())
    caller.use(server.url, key=nix_cache.public)
    ours, theirs = pty.openpty()
    words = ["setsid", "--ctty", *caller.words("run", "--", "cat", nix_cache.paths["big"] + "/data")]
    process = caller.popen(words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=False)
    os.close(theirs)
    try:
        eventually(lambda: _waits_for_content(process.pid))
        began = time.monotonic()
        os.write(ours, b"\x03")
        assert process.wait(10) == -signal.SIGINT
        assert time.monotonic() - began < 5
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(ours)
