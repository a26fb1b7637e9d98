"""Traces: what a command read is written down, and loaded ahead elsewhere."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.callers import Caller, Probe, eventually, read_line
from tests.support.faulty_http import FaultyServer, Stall, Status
from tests.support.signed_cache import MadePath, SignedCache, make_path
from tests.support.storm import kill_server, server_of_run
from veneer.formats.trace import Trace, decode
from veneer.model.store_path import StorePath

pytestmark = [pytest.mark.root, pytest.mark.fuse]

Serve = Callable[[Path], FaultyServer]
SIZE = 3_000_001
NAMES = ("tool-1.0", "lib-1.0", "other-1.0", "named-1.0", "unused-1.0")


@pytest.fixture
def store(open_directory: Path) -> SignedCache:
    return make_store(open_directory / f"store-{os.urandom(4).hex()}", [make_path(n, SIZE) for n in NAMES])


@pytest.fixture
def server(store: SignedCache, faulty_http: Serve) -> FaultyServer:
    return faulty_http(store.directory)


def make_store(directory: Path, paths: list[MadePath]) -> SignedCache:
    """The first path refers to all others."""
    first, *others = (made.path.name for made in paths)
    cache = SignedCache(directory, paths, compression="zstd", references={first: others})
    directory.chmod(0o755)
    return cache


def top(cache: SignedCache, name: str) -> str:
    return f"/nix/store/{cache.paths[name].path}"


def read_traced(probe: Probe, cache: SignedCache) -> None:
    """The program of tool, 8 KiB of lib's data, all of other's, the name of named."""
    for path, span in (
        ("tool-1.0/a-program", {"size": 9}),
        ("lib-1.0/data", {"offset": 1_048_576, "size": 8192}),
        ("other-1.0/data", {"size": SIZE}),
    ):
        name, _, file = path.partition("/")
        assert probe.ask("read", path=f"{top(cache, name)}/{file}", **span)["size"] == span["size"]
    probe.ask("look", path=top(cache, "named-1.0"))


def record(caller: Caller, cache: SignedCache) -> Path:
    """A trace of ``read_traced``."""
    file = caller.home / "made.trace"
    with caller.environment_probe("--trace", str(file)) as probe:
        read_traced(probe, cache)
        assert probe.finish() == 0, probe.errors
    return file


def recorded(caller: Caller, cache: SignedCache, server: FaultyServer) -> Path:
    """The same, for a caller who uses ``server`` and has nothing in the cache by now."""
    caller.use(server.url, key=cache.key)
    file = record(caller, cache)
    caller.forget()
    server.seen.clear()
    return file


def nars(server: FaultyServer) -> list[str]:
    return [seen.path for seen in server.seen if seen.path.startswith("/nar/")]


def in_order(trace: Trace) -> list[str]:
    return [traced.path.name for traced in trace]


# Recording.


def test_a_trace_has_what_was_read_in_order(caller: Caller, store: SignedCache, server: FaultyServer) -> None:
    caller.use(server.url, key=store.key)
    trace = decode(record(caller, store).read_bytes())
    assert in_order(trace) == ["tool-1.0", "lib-1.0", "other-1.0", "named-1.0"]
    tool, lib, other, named = trace
    assert [(file.name, file.ranges) for file in tool.files] == [(b"a-program", ((0, 9),))]
    (data,) = lib.files
    assert data.size == SIZE
    assert any(start <= 1_048_576 and start + size >= 1_048_576 + 8192 for start, size in data.ranges)
    assert data.bytes < SIZE / 2
    assert [(file.name, file.is_whole) for file in other.files] == [(b"data", True)]
    assert named.files == ()
    assert tool.nar_hash == store.infos["tool-1.0"].nar_hash
    assert [entry.name for entry in caller.home.iterdir() if "made.trace" in entry.name] == ["made.trace"]


def test_reads_from_a_full_cache_are_recorded_as_well(
    as_root: Caller, store: SignedCache, server: FaultyServer
) -> None:
    as_root.use(server.url, key=store.key)
    first = record(as_root, store).read_bytes()
    assert record(as_root, store).read_bytes() == first


def test_show_tells_people_and_programs(as_root: Caller, store: SignedCache, server: FaultyServer) -> None:
    as_root.use(server.url, key=store.key)
    file = record(as_root, store)
    words = [as_root.python, "-m", "veneer.cli.main", "trace", "show", str(file)]
    shown = as_root.popen(words).communicate(timeout=60)[0]
    lines = shown.splitlines()
    assert [line.split()[0].partition("-")[2] for line in lines[1:-1]] == [
        "tool-1.0",
        "lib-1.0",
        "other-1.0",
        "named-1.0",
    ]
    assert lines[-1].startswith("4 store paths, 3 files, ")
    document = json.loads(as_root.popen([*words, "--json"]).communicate(timeout=60)[0])
    assert (document["files"], len(document["paths"])) == (3, 4)
    assert document["bytes"] == sum(path["bytes"] for path in document["paths"])


@pytest.mark.parametrize("script", ["exit 3", "kill -TERM $$"], ids=["fails", "killed"])
def test_the_trace_of_a_command_that_fails_is_written(
    script: str, caller: Caller, store: SignedCache, server: FaultyServer
) -> None:
    caller.use(server.url, key=store.key)
    file = caller.home / "t"
    done = caller.veneer(
        "run", "--trace", file, "--", "sh", "-c", f"cat {top(store, 'lib-1.0')}/a-program; {script}"
    )
    assert done.returncode in (3, -signal.SIGTERM, 128 + signal.SIGTERM)
    assert in_order(decode(file.read_bytes())) == ["lib-1.0"]


def test_the_trace_of_an_interrupted_command_is_written(
    caller: Caller, store: SignedCache, server: FaultyServer
) -> None:
    caller.use(server.url, key=store.key)
    file = caller.home / "t"
    script = f"cat {top(store, 'lib-1.0')}/a-program > /dev/null; echo up; read line"
    with caller.running("run", "--trace", file, "--", "sh", "-c", script) as process:
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    assert in_order(decode(file.read_bytes())) == ["lib-1.0"]


@pytest.mark.hand_over
def test_a_killed_mount_server_loses_nothing_of_a_trace(
    caller: Caller, store: SignedCache, server: FaultyServer
) -> None:
    caller.use(server.url, key=store.key)
    file = caller.home / "t"
    with caller.environment_probe("--trace", str(file)) as probe:
        probe.ask("read", path=top(store, "tool-1.0") + "/a-program")
        kill_server(lambda: server_of_run(probe.process.pid))
        probe.ask("read", path=top(store, "tool-1.0") + "/data", size=4096)
        probe.ask("read", path=top(store, "lib-1.0") + "/a-program")
        assert probe.finish() == 0, probe.errors
    tool, lib = decode(file.read_bytes())
    assert [found.name for found in tool.files] == [b"a-program", b"data"]
    assert [found.name for found in lib.files] == [b"a-program"]


@pytest.mark.hand_over
def test_a_trace_goes_on_when_another_version_takes_over(caller: Caller, store: SignedCache) -> None:
    caller.use(store.url, key=store.key)
    file = caller.home / "t"
    with caller.environment_probe("--trace", str(file)) as probe:
        probe.ask("read", path=top(store, "tool-1.0") + "/a-program")
        server = server_of_run(probe.process.pid)
        done = caller.veneer("upgrade", "--all", sources=False)
        assert done.returncode == 0, done.stderr
        assert server_of_run(probe.process.pid) != server
        probe.ask("read", path=top(store, "lib-1.0") + "/a-program")
        assert probe.finish() == 0, probe.errors
    assert in_order(decode(file.read_bytes())) == ["tool-1.0", "lib-1.0"]


@pytest.mark.parametrize("place", ["nowhere/t", "."])
def test_a_trace_that_cannot_be_written_is_told_before_the_command_runs(
    place: str, as_root: Caller, store: SignedCache
) -> None:
    as_root.use(store.url, key=store.key)
    done = as_root.veneer("run", "--trace", as_root.home / place, "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (125, "")


def test_a_named_environment_is_not_begun_for_a_trace_that_cannot_be_read(
    as_root: Caller, store: SignedCache
) -> None:
    as_root.use(f"file://{store.directory}", key=store.key)
    done = as_root.veneer("run", "--name", "dev", "--prefetch", "no.trace", "--", "true")
    assert (done.returncode, "no.trace" in done.stderr) == (125, True)
    assert as_root.document("ls", sources=False)["environments"] == []


def test_the_owner_of_an_environment_has_the_trace_of_all(as_root: Caller, store: SignedCache) -> None:
    as_root.use(store.url, key=store.key)
    own, others = as_root.home / "own", as_root.home / "others"
    program = top(store, "lib-1.0") + "/a-program"
    with as_root.running(
        "run", "--name", "dev", "--trace", own, "--", "sh", "-c", "echo up; read line"
    ) as process:
        done = as_root.veneer("run", "--name", "dev", "--trace", others, "--", "cat", program)
        assert done.stdout == "#!/bin/sh", done.stderr
        assert "no trace" in done.stderr
        process.communicate("\n", timeout=60)
    assert in_order(decode(own.read_bytes())) == ["lib-1.0"]
    assert not others.exists()
    assert as_root.veneer("down", "dev", sources=False).returncode == 0


def test_an_environment_that_stays_has_its_trace_when_it_ends(caller: Caller, store: SignedCache) -> None:
    caller.use(store.url, key=store.key)
    assert caller.veneer("up", "dev", "--trace", "dev.trace").returncode == 0
    program = top(store, "lib-1.0") + "/a-program"
    assert caller.veneer("enter", "dev", "--", "cat", program, sources=False).stdout == "#!/bin/sh"
    done = caller.veneer("down", "dev", sources=False)
    assert done.returncode == 0, done.stderr
    file = caller.home / "dev.trace"
    eventually(file.exists)
    assert in_order(decode(file.read_bytes())) == ["lib-1.0"]


# Loading ahead.


def test_fetch_loads_what_was_touched_and_no_more(
    caller: Caller, store: SignedCache, server: FaultyServer
) -> None:
    file = recorded(caller, store, server)
    found = caller.document("fetch", "--trace", file)
    assert (found["paths"], found["done"], found["failed"], found["unmatched"]) == (4, 4, 0, 0)
    assert sorted(set(nars(server))) == sorted(
        store.file(n, "nar") for n in ("tool-1.0", "lib-1.0", "other-1.0")
    )
    server.seen.clear()
    with caller.environment_probe() as probe:
        read_traced(probe, store)
        assert probe.finish() == 0, probe.errors
    assert nars(server) == []


def test_prefetch_goes_on_beside_the_command(
    caller: Caller, store: SignedCache, server: FaultyServer
) -> None:
    file, report = recorded(caller, store, server), caller.home / "report"
    with caller.environment_probe("--prefetch", str(file), "--report", str(report)) as probe:
        eventually(lambda: len(set(nars(server))) == 3)  # the command has read nothing
        assert probe.ask("read", path=top(store, "other-1.0") + "/data")["size"] == SIZE
        (told,) = {json.dumps(c["prefetched"]) for c in caller.status()["connections"] if c["prefetched"]}
        assert json.loads(told)["paths"] == 4
        assert probe.finish() == 0, probe.errors
    assert store.file("unused-1.0", "nar") not in nars(server)
    told = json.loads(report.read_text())
    assert told["prefetched"]["paths"] == 4
    assert told["closure"]["paths"] == 1  # of what was read; nobody else's was asked for


def test_a_mount_prefetches_as_well(as_root: Caller, store: SignedCache, server: FaultyServer) -> None:
    file, target = recorded(as_root, store, server), as_root.home / "mnt"
    target.mkdir()
    mount = as_root.popen(as_root.words("mount", "--prefetch", file, target))
    try:
        assert mount.stderr is not None
        assert "mounted on" in read_line(mount.stderr)
        eventually(lambda: len(set(nars(server))) == 3)
    finally:
        mount.terminate()
        mount.communicate(timeout=60)
    assert mount.returncode == 0


@pytest.mark.parametrize("verify", ["strict", "deferred"])
def test_of_a_published_cache_only_the_touched_parts_are_fetched(
    verify: str, as_root: Caller, store: SignedCache, faulty_http: Serve, open_directory: Path
) -> None:
    published = open_directory / f"published-{os.urandom(4).hex()}"
    key_file = as_root.home / "key"
    key_file.write_text(store.secret.text())
    mirror = ["--from", store.url, "--to", str(published), "--key-file", str(key_file)]
    keys = ["--trusted-public-key", store.key]
    done = as_root.veneer("mirror", *mirror, *keys, top(store, "tool-1.0"), sources=False)
    assert done.returncode == 0, done.stderr
    server = faulty_http(published)
    file = recorded(as_root, store, server)
    found = as_root.document("fetch", "--trace", file, "--verify", verify)
    assert (found["done"], found["failed"]) == (4, 0)
    assert found["wire_bytes"] < SIZE * 1.5
    server.fail("/nar/*", Stall())  # what is asked for now does not come
    with as_root.environment_probe("--verify", verify) as probe:
        read_traced(probe, store)
        assert probe.finish() == 0, probe.errors


def test_a_trace_of_one_user_serves_another(
    as_root: Caller, unprivileged: Caller, store: SignedCache, server: FaultyServer
) -> None:
    for caller in (as_root, unprivileged):
        caller.use(server.url, key=store.key)
    copy = unprivileged.home / "copy"
    copy.write_bytes(record(as_root, store).read_bytes())
    copy.chmod(0o644)
    server.seen.clear()
    assert unprivileged.document("fetch", "--trace", copy)["done"] == 4
    assert len(set(nars(server))) == 3


def test_changed_paths_are_found_in_the_closure_of_what_is_run(
    as_root: Caller, store: SignedCache, server: FaultyServer, faulty_http: Serve, open_directory: Path
) -> None:
    file = recorded(as_root, store, server)
    tool = make_path("tool-1.0", 100_000)
    paths = [
        replace(tool, path=StorePath("1" * 32, "tool-1.0")),
        make_path("lib-1.1", SIZE // 2),
        make_path("other-1.0", SIZE),
        make_path("news-1.0", SIZE),
    ]
    new = make_store(open_directory / f"new-{os.urandom(4).hex()}", paths)
    server = faulty_http(new.directory)
    as_root.use(server.url, key=new.key)
    found = as_root.document("fetch", "--trace", file, top(new, "tool-1.0"))
    assert {name: found[name] for name in ("done", "changed", "unmatched", "failed")} == {
        "done": 3, "changed": 2, "unmatched": 1, "failed": 0,
    }  # fmt: skip
    assert sorted(set(nars(server))) == sorted(
        new.file(n, "nar") for n in ("tool-1.0", "lib-1.1", "other-1.0")
    )
    as_root.forget()
    server.seen.clear()
    words = [top(new, "tool-1.0") + "/a-program"]
    done = as_root.veneer("run", "--prefetch", file, "--report", as_root.home / "r", "--", *words)
    assert done.returncode == 0, done.stderr
    assert "prefetched" in json.loads((as_root.home / "r").read_text())


def test_without_a_root_changed_paths_are_left_out(
    as_root: Caller, store: SignedCache, server: FaultyServer, faulty_http: Serve, open_directory: Path
) -> None:
    file = recorded(as_root, store, server)
    new = make_store(
        open_directory / f"new-{os.urandom(4).hex()}", [make_path("tool-2.0"), make_path("lib-1.0")]
    )
    as_root.use(faulty_http(new.directory).url, key=new.key)
    found = as_root.document("fetch", "--trace", file)
    assert (found["done"], found["changed"], found["unmatched"]) == (1, 0, 3)


def test_failures_of_a_prefetch_are_stories_and_not_the_commands(
    as_root: Caller, store: SignedCache, server: FaultyServer
) -> None:
    file = recorded(as_root, store, server)
    server.fail(store.file("lib-1.0", "nar"), Status(404))
    with as_root.environment_probe("--prefetch", str(file)) as probe:
        eventually(lambda: "prefetch" in as_root.stories())
        assert probe.ask("read", path=top(store, "tool-1.0") + "/a-program")["size"] == 9
        assert probe.finish() == 0, probe.errors
    as_root.wait_for_daemons_end()
    assert store.file("lib-1.0", "nar") in str(as_root.document("fetch", "--trace", file, status=5))


def test_a_prefetch_takes_no_more_than_the_cache_holds(
    as_root: Caller, store: SignedCache, server: FaultyServer
) -> None:
    file = recorded(as_root, store, server)
    found = as_root.document("fetch", "--trace", file, "--max-size", str(SIZE + 100_000))
    assert found["skipped"] >= 1
    assert found["done"] + found["skipped"] == 4


@pytest.mark.parametrize(
    "content", [b"no trace", b'{"veneer-trace":2}\n', None], ids=["other", "newer", "none"]
)
def test_what_is_no_trace_is_refused(content: bytes | None, as_root: Caller, store: SignedCache) -> None:
    as_root.use(store.url, key=store.key)
    file = as_root.home / "t"
    if content is not None:
        file.write_bytes(content)
    done = as_root.veneer("run", "--prefetch", file, "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (125, "")
    assert str(file) in done.stderr
    assert as_root.veneer("fetch", "--trace", file).returncode in (1, 2)


def test_fetch_without_paths_or_a_trace_is_wrong_usage(as_root: Caller) -> None:
    assert as_root.veneer("fetch").returncode == 2
    assert as_root.veneer("fetch", "--closure", "--trace", "x").returncode == 2
