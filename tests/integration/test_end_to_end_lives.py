"""Whole lives of environments: killed processes, daemons that end, strangers' caches, eviction, layers, huge things."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from tests.integration.test_end_to_end_trees import Census, Serve
from tests.support.callers import Caller, eventually, read_line
from tests.support.nginx import nar_requests
from tests.support.sample import SampleStore
from veneer.cache.directory import wait_until_free
from veneer.formats.cache_info import CacheInfo, write_cache_info
from veneer.formats.listing import write_listing
from veneer.formats.nar import nar_of, nar_size, with_offsets
from veneer.formats.narinfo import write_narinfo
from veneer.formats.signature import SecretKey, fingerprint
from veneer.model.hashes import Hash
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import DEFAULT_STORE_DIR, StorePath
from veneer.model.tree import Directory, Node, RegularFile

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.nix, pytest.mark.nginx]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def members(supervisor: int) -> dict[str, int]:
    """The processes of ``veneer run``: itself, keeper, init, mount server and command."""
    by_name = {Path(f"/proc/{pid}/comm").read_text().strip(): pid for pid in children(supervisor)}
    keeper = by_name["veneer-keeper"]
    kept = {Path(f"/proc/{pid}/comm").read_text().strip(): pid for pid in children(keeper)}
    init, server = kept["veneer-init"], kept["veneer-mount"]
    (command,) = children(init)
    return {"run": supervisor, "keeper": keeper, "init": init, "mount server": server, "command": command}


@contextlib.contextmanager
def all_end(pids: Iterable[int], seconds: float = 20) -> Iterator[None]:
    """AssertionError when one of the processes is left ``seconds`` after the block."""
    handles = {pid: os.pidfd_open(pid) for pid in pids}
    try:
        yield
        for pid, handle in handles.items():
            assert select.select([handle], [], [], seconds)[0], f"process {pid} is left"
    finally:
        for handle in handles.values():
            os.close(handle)


# Killed processes.


@pytest.mark.parametrize("victim", ["run", "keeper", "init", "mount server", "command", "daemon"])
def test_whatever_is_killed_nothing_is_left(
    victim: str, caller: Caller, nix_cache: SampleStore, nginx: Serve
) -> None:
    caller.use(nginx(nix_cache.cache("zstd")).url, key=nix_cache.public)
    note, shapes = nix_cache.paths["note"], nix_cache.paths["shapes"]
    with caller.environment_probe() as probe:
        assert probe.ask("read", path=note)["size"] == 7
        pids = {**members(probe.process.pid), "daemon": caller.daemon_pid()}
        with all_end(pids.values()):
            os.kill(pids[victim], signal.SIGKILL)
            if victim == "daemon":
                assert probe.ask("read", path=note, cold=True)["size"] == 7
            if victim == "mount server":
                assert "error" not in probe.ask("look", path=shapes)
            probe.finish()
    assert str(caller.home) not in Path("/proc/self/mountinfo").read_text()
    again = caller.veneer("run", "--", "cat", note)
    assert again.stdout == "a note\n"
    assert list((caller.home / "environments").rglob("upper")) == []  # the next run swept what was left


def test_misses_continue_with_the_next_daemon(caller: Caller, nix_cache: SampleStore, nginx: Serve) -> None:
    caller.use(nginx(nix_cache.cache("zstd")).url, key=nix_cache.public)
    with caller.environment_probe("--patience", "30") as probe:
        assert probe.ask("read", path=nix_cache.paths["note"])["size"] == 7
        os.kill(caller.daemon_pid(), signal.SIGKILL)
        probe.tell("read", path=nix_cache.paths["hello"])
        with caller.environment_probe() as other:
            assert other.ask("look", path=nix_cache.paths["note"])["size"] == 7
            assert probe.answer()["size"] > 0
        assert probe.finish() == 0


def test_a_run_whose_own_daemon_was_killed_gets_another(
    caller: Caller, nix_cache: SampleStore, nginx: Serve
) -> None:
    caller.use(nginx(nix_cache.cache("zstd")).url, key=nix_cache.public)
    with caller.environment_probe("--patience", "5") as probe:
        assert probe.ask("read", path=nix_cache.paths["note"])["size"] == 7
        os.kill(caller.daemon_pid(), signal.SIGKILL)
        answer = probe.ask("read", path=nix_cache.paths["hello"])
        assert answer["seconds"] < 10
        assert "error" not in answer


@pytest.mark.parametrize("victim", ["mount", "daemon"])
def test_a_killed_mount_is_unmounted(
    victim: str, as_root: Caller, nix_cache: SampleStore, nginx: Serve
) -> None:
    as_root.use(nginx(nix_cache.cache("zstd")).url, key=nix_cache.public)
    target = as_root.home / "mnt"
    target.mkdir()
    process = as_root.popen(as_root.words("mount", target), stdin=subprocess.DEVNULL)
    with process:
        assert process.stderr is not None
        assert "mounted on" in read_line(process.stderr)
        daemon = as_root.daemon_pid()
        (server,) = (pid for pid in children(process.pid) if pid != daemon)
        with all_end([process.pid, server, daemon]):
            os.kill({"mount": process.pid, "daemon": daemon}[victim], signal.SIGKILL)
            if victim == "daemon":
                process.send_signal(signal.SIGTERM)
            process.communicate(timeout=20)
        eventually(lambda: str(target) not in Path("/proc/self/mountinfo").read_text())


# One cache directory, several users.


def test_another_users_cache_directory_is_refused_and_stays_good(
    as_root: Caller, unprivileged: Caller, nix_cache: SampleStore, unpacked: Census, nginx: Serve
) -> None:
    url, shapes = nginx(nix_cache.cache("zstd")).url, nix_cache.paths["shapes"]
    for caller in (as_root, unprivileged):
        caller.use(url, key=nix_cache.public)
    assert unprivileged.veneer("fetch", nix_cache.paths["note"]).returncode == 0
    unprivileged.wait_for_daemons_end()
    as_root.configure()
    intruder = replace(as_root, home=unprivileged.home, environment={**as_root.environment})
    refused = intruder.veneer("fetch", shapes)
    assert refused.returncode in (7, 8)
    assert "belongs to another user" in refused.stderr
    owners = {path.lstat().st_uid for path in unprivileged.cache.rglob("*")}
    assert owners == {unprivileged.home.stat().st_uid}
    with unprivileged.environment_probe() as probe:
        assert probe.ask("census", tops=[shapes])["trees"][shapes] == unpacked[shapes]


def test_a_private_cache_directory_is_closed_to_others(
    as_root: Caller, unprivileged: Caller, nix_cache: SampleStore, nginx: Serve
) -> None:
    url, note = nginx(nix_cache.cache("zstd")).url, nix_cache.paths["note"]
    as_root.use(url, key=nix_cache.public)
    with as_root.environment_probe() as probe:
        assert probe.ask("read", path=note)["size"] == 7
        unprivileged.use(url, key=nix_cache.public)
        words = unprivileged.words("fetch", note)
        words[words.index("--cache-dir") + 1] = str(as_root.cache)
        refused = subprocess.run(
            words, env=unprivileged.environment, cwd="/", capture_output=True, text=True, timeout=60
        )
        assert refused.returncode in (7, 8)
        assert "Permission denied" in refused.stderr
        assert str(as_root.cache) in refused.stderr
        assert probe.ask("read", path=nix_cache.paths["hello"])["size"] > 0


# Layers, status, signals: through the whole command line.


def test_named_writes_stay_and_temporary_ones_go(
    caller: Caller, nix_cache: SampleStore, nginx: Serve
) -> None:
    caller.use(nginx(nix_cache.cache("zstd")).url, key=nix_cache.public)
    note, shapes = nix_cache.paths["note"], nix_cache.paths["shapes"]
    write = f"echo new > /nix/store/new; cp {note} /nix/store/copy; chmod -R u+w {shapes}; mv {shapes} /nix/store/moved; cat /nix/store/copy; exit 3"
    first = caller.veneer("run", "--name", "kept", "--", "sh", "-ec", write)
    assert (first.returncode, first.stdout) == (3, "a note\n"), first.stderr
    look = f"cat /nix/store/new; cat /nix/store/moved/a-b; ls -d {shapes}"
    second = caller.veneer("run", "--name", "kept", "--", "sh", "-c", look)
    assert second.stdout == "new\nordered by bytes"
    assert second.returncode == 2
    assert caller.veneer("run", "--", "sh", "-ec", write).returncode == 3
    other = caller.veneer("run", "--", "sh", "-c", f"ls /nix/store; ls -d {shapes}")
    assert other.stdout == f"{shapes}\n"


def test_a_signal_to_the_run_reaches_the_command(
    caller: Caller, nix_cache: SampleStore, nginx: Serve
) -> None:
    caller.use(nginx(nix_cache.cache("zstd")).url, key=nix_cache.public)
    script = "trap 'echo caught; exit 9' TERM; echo ready; while :; do read -r line; done"
    process = caller.popen(caller.words("run", "--", nix_cache.paths["bash"] + "/bin/bash", "-c", script))
    with process:
        assert process.stdout is not None
        assert read_line(process.stdout) == "ready\n"
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
    assert (out, process.returncode) == ("caught\n", 9)


# Eviction.


def test_eviction_never_disturbs_readers(
    caller: Caller, nix_cache: SampleStore, unpacked: Census, nginx: Serve
) -> None:
    server = nginx(nix_cache.cache("none"))
    caller.use(server.url, key=nix_cache.public)
    wanted = {f"{path}{name}": row for path in (nix_cache.paths[n] for n in ("big", "selfish", "libraries", "bash", "shapes")) for name, row in unpacked[path].items() if row[0].startswith("-")}  # fmt: skip
    over = threading.Event()

    def collect() -> None:
        while not over.wait(0.1):
            caller.veneer("gc", "--max-size", "0", sources=False)

    with caller.environment_probe("--max-size", "4M") as one, caller.environment_probe("--max-size", "4M") as other:  # fmt: skip
        collector = threading.Thread(target=collect)
        collector.start()
        try:
            for _ in range(3):
                for mine, theirs in zip(wanted, reversed(wanted), strict=True):
                    one.tell("read", path=mine, cold=True)
                    other.tell("read", path=theirs, cold=True)
                    for probe, path in ((one, mine), (other, theirs)):
                        answer = probe.answer()
                        assert (path, answer["digest"]) == (path, wanted[path][2])
        finally:
            over.set()
            collector.join()
    assert len(nar_requests(server.requests())) > 5  # there are five: some were evicted and came again


# Huge things.


def put_path(cache: Path, name: str, tree: Node, content: Iterable[bytes], key: SecretKey) -> str:
    """A signed cache with one path, zstd, with its listing; the absolute store path. ``content``: of every file."""
    (cache / "nar").mkdir(parents=True)
    (cache / "nix-cache-info").write_bytes(write_cache_info(CacheInfo(DEFAULT_STORE_DIR, True, 40)))
    tree, digest = with_offsets(tree), hashlib.sha256()
    with (
        open(cache / "nar" / "1.nar.zst", "wb") as file,
        zstandard.ZstdCompressor(level=1).stream_writer(file) as encoder,
    ):
        for piece in nar_of(tree, lambda _: content):
            digest.update(piece)
            encoder.write(piece)
    path = StorePath("1" * 32, name)
    info = UnverifiedPathInfo(path, "nar/1.nar.zst", "zstd", Hash("sha256", digest.digest()), nar_size(tree))
    info = replace(info, signatures=(key.sign(fingerprint(info)),))
    (cache / f"{path.hash_part}.ls").write_bytes(write_listing(tree))
    (cache / f"{path.hash_part}.narinfo").write_bytes(write_narinfo(info))
    return path.absolute()


@pytest.mark.slow
def test_the_end_of_a_file_beyond_four_gibibytes_is_read(
    as_root: Caller, nginx: Serve, tmp_path: Path
) -> None:
    if shutil.disk_usage(as_root.home).free < 10 << 30:
        pytest.skip("needs 10 GB of disk")
    key, content = SecretKey.generate("huge-1"), [*[bytes(1 << 20)] * 4200, b"the end of it all"]
    size = sum(map(len, content))
    tree = Directory(((b"file", RegularFile(size, executable=False, offset=0)),))
    path = put_path(tmp_path / "cache", "huge", tree, content, key)
    as_root.use(nginx(tmp_path / "cache").url, key=str(key.public_key()))
    with as_root.environment_probe() as probe:
        assert probe.ask("look", path=f"{path}/file")["size"] == size > 1 << 32
        answer = probe.ask("read", path=f"{path}/file", offset=size - 100, within=120)
        assert (answer["size"], answer["last"][-17:]) == (100, "the end of it all")
    assert wait_until_free(as_root.cache, 120)  # the daemon syncs it first
    shutil.rmtree(as_root.cache)


def test_a_hundred_thousand_names_are_listed(caller: Caller, nginx: Serve, tmp_path: Path) -> None:
    key, names = SecretKey.generate("wide-1"), [b"%06d-name" % number for number in range(100_000)]
    tree = Directory(tuple((name, RegularFile(0, executable=False, offset=0)) for name in names))
    path = put_path(tmp_path / "cache", "wide", tree, [], key)
    server = nginx(tmp_path / "cache")
    caller.use(server.url, key=str(key.public_key()))
    script = f"ls {path}; find {path} -type f -empty -links 1 | wc -l"
    *listed, counted = caller.veneer("run", "--", "sh", "-c", script).stdout.encode().splitlines()
    assert listed == names
    assert int(counted) == len(names)
    assert nar_requests(server.requests()) == []
