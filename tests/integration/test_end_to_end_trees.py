"""What programs see equals what real Nix unpacks, and costs what it should: real Nix's caches, nginx, the real kernel."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.callers import Caller
from tests.support.nginx import Nginx, Request, nar_requests
from tests.support.probe import Row
from tests.support.sample import SampleStore
from veneer.store.heads import ENCODED

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.nix, pytest.mark.nginx]

Census = dict[str, dict[str, Row]]
Serve = Callable[..., Nginx]


def paths_asked(requests: list[Request], suffix: str) -> Counter[str]:
    return Counter(request.path for request in requests if request.path.endswith(suffix))


def differing(expected: dict[str, Row], found: dict[str, Row]) -> list[str]:
    names = sorted(expected.keys() | found.keys())
    return [f"{n}: {expected.get(n)} {found.get(n)}" for n in names if expected.get(n) != found.get(n)]


@pytest.mark.parametrize("listings", [True, False], ids=["ls", "bare"])
@pytest.mark.parametrize("compression", ["none", "xz", "zstd"])
def test_run_sees_the_trees_that_nix_copy_unpacks(
    compression: str, listings: bool, caller: Caller, nix_cache: SampleStore, unpacked: Census, nginx: Serve
) -> None:
    server = nginx(nix_cache.cache(compression, listings=listings))
    caller.use(server.url, key=nix_cache.public)
    with caller.environment_probe() as probe:
        found = probe.ask("census", tops=list(unpacked))["trees"]
        assert probe.finish() == 0, probe.errors
    for path, expected in unpacked.items():
        assert differing(expected, found[path]) == [], path
    heads = [request for request in server.requests() if (request.status, request.bytes) == (206, ENCODED)]
    assert not (heads and listings)
    others = [request for request in server.requests() if request not in heads]
    assert [path for path, count in paths_asked(others, "").items() if count > 1] == []


@pytest.mark.parametrize(("compression", "listings"), [("zstd", True), ("none", False)], ids=["zstd", "none"])
def test_mount_shows_the_trees_that_nix_copy_unpacks(
    compression: str, listings: bool, caller: Caller, nix_cache: SampleStore, unpacked: Census, nginx: Serve
) -> None:
    server = nginx(nix_cache.cache(compression, listings=listings))
    caller.use(server.url, key=nix_cache.public)
    target = caller.home / "mnt"
    with caller.mount_probe(target) as probe:
        tops = {path: str(target / Path(path).name) for path in unpacked}
        found = probe.ask("census", tops=list(tops.values()))["trees"]
        assert probe.ask("look", path=tops[nix_cache.paths["note"]])["uid"] == 0
        assert probe.finish() == 0, probe.errors
    for path, expected in unpacked.items():
        assert differing(expected, found[tops[path]]) == [], path


def test_programs_of_the_store_run(caller: Caller, nix_cache: SampleStore, nginx: Serve) -> None:
    caller.use(nginx(nix_cache.cache()).url, key=nix_cache.public)
    done = caller.veneer("run", "--quiet", "--", nix_cache.paths["greet"] + "/bin/greet")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("greets\na note\n")


# Trust.


@pytest.mark.parametrize("signed", ["nobody", "stranger"])
def test_what_no_trusted_key_signed_is_refused(
    signed: str, caller: Caller, nix_cache: SampleStore, nginx: Serve
) -> None:
    server = nginx(nix_cache.cache("none", signed=signed))
    caller.use(server.url, key=nix_cache.public)
    note = nix_cache.paths["note"]
    done = caller.veneer("run", "--", "cat", note)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Input/output error" in done.stderr
    assert "no valid signature of a trusted key" in done.stderr
    assert ("stranger-1" if signed == "stranger" else "signed by: nobody") in done.stderr
    refused = caller.veneer("fetch", note)
    assert refused.returncode == 4
    assert "trusted=true" in refused.stderr
    assert nar_requests(server.requests()) == []


def test_a_trusted_source_needs_no_signature(caller: Caller, nix_cache: SampleStore, nginx: Serve) -> None:
    caller.use(nginx(nix_cache.cache("none", signed="nobody")).url + "?trusted=true", key=nix_cache.public)
    assert caller.veneer("run", "--", "cat", nix_cache.paths["note"]).stdout == "a note\n"


def test_trust_of_one_run_is_not_that_of_the_next(
    as_root: Caller, nix_cache: SampleStore, nginx: Serve
) -> None:
    url = nginx(nix_cache.cache("none", signed="nobody")).url
    as_root.use(url + "?trusted=true", key=nix_cache.public)
    assert as_root.veneer("run", "--", "cat", nix_cache.paths["note"]).returncode == 0
    as_root.use(url, key=nix_cache.public)
    done = as_root.veneer("run", "--", "cat", nix_cache.paths["note"])
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize("field", ["NarHash", "NarSize", "References"])
def test_signature_of_other_facts_is_refused(
    field: str, as_root: Caller, nix_cache: SampleStore, nginx: Serve, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(nix_cache.cache("none"), cache)
    narinfo = cache / f"{nix_cache.hash_part('shapes')}.narinfo"
    other = dict(line.split(": ", 1) for line in (cache / f"{nix_cache.hash_part('note')}.narinfo").read_text().splitlines())  # fmt: skip
    lines = narinfo.read_text().splitlines()
    narinfo.write_text("".join(f"{field}: {other[field]}\n" if line.startswith(field) else f"{line}\n" for line in lines))  # fmt: skip
    as_root.use(nginx(cache).url, key=nix_cache.public)
    done = as_root.veneer("run", "--", "cat", nix_cache.paths["shapes"] + "/a-b")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no valid signature" in done.stderr


# What it costs.


@pytest.mark.parametrize("listings", [True, False], ids=["ls", "bare"])
def test_fifty_parallel_readers_cost_one_download(
    listings: bool, caller: Caller, nix_cache: SampleStore, unpacked: Census, nginx: Serve
) -> None:
    server = nginx(nix_cache.cache("zstd", listings=listings), bytes_per_second=8 << 20)
    caller.use(server.url, key=nix_cache.public)
    big = nix_cache.paths["big"]
    with caller.environment_probe() as probe:
        answer = probe.ask("crowd", path=f"{big}/data", count=50)
    assert answer["readers"] == 50
    assert answer["digests"] == [unpacked[big]["/data"][2]]
    requests = server.requests()
    assert [request.status for request in nar_requests(requests)] == [200]
    assert paths_asked(requests, ".narinfo") == {f"/{nix_cache.hash_part('big')}.narinfo": 1}
    assert max(paths_asked(requests, ".ls").values()) == 1


def test_metadata_of_a_whole_closure_costs_no_content(
    caller: Caller, nix_cache: SampleStore, nginx: Serve
) -> None:
    server = nginx(nix_cache.cache("xz"))
    caller.use(server.url, key=nix_cache.public)
    closure = nix_cache.closure("everything")
    report = caller.home / "report.json"
    done = caller.veneer("run", "--report", report, "--", "find", *closure, "-ls")
    assert done.returncode == 0, done.stderr
    expected = sum(1 + sum(1 for _ in nix_cache.nix.unpacked(path).rglob("*")) for path in closure)
    assert len(done.stdout.splitlines()) == expected
    requests = server.requests()
    assert nar_requests(requests) == []
    assert paths_asked(requests, ".narinfo") == {f"/{Path(p).name[:32]}.narinfo": 1 for p in closure}
    assert paths_asked(requests, ".ls") == {f"/{Path(p).name[:32]}.ls": 1 for p in closure}
    document = json.loads(report.read_text())
    assert document["closure"]["paths"] == len(closure)
    assert document["fetched"] == sum(request.bytes for request in requests if ".narinfo" in request.path or ".ls" in request.path)  # fmt: skip


def test_only_what_is_touched_is_fetched(caller: Caller, nix_cache: SampleStore, nginx: Serve) -> None:
    server = nginx(nix_cache.cache("zstd"))
    caller.use(server.url, key=nix_cache.public)
    everything = nix_cache.paths["everything"]
    done = caller.veneer("run", "--", "cat", f"{everything}/{nix_cache.basename('note')}")
    assert done.stdout == "a note\n"
    assert len(nar_requests(server.requests())) == 1
    server.stop()
    again = caller.veneer("run", "--", "cat", f"{everything}/{nix_cache.basename('note')}")
    assert again.stdout == "a note\n"


def test_what_a_large_path_is_costs_the_head_of_its_nar_where_there_is_no_listing(
    caller: Caller, nix_cache: SampleStore, nginx: Serve
) -> None:
    server = nginx(nix_cache.cache("none", listings=False))
    caller.use(server.url, key=nix_cache.public)
    big = nix_cache.paths["big"]
    for way in ("--trace", "--prefetch"):  # and so it is when a trace of it is repeated
        done = caller.veneer("run", way, caller.home / "trace", "--", "stat", "--format=%F %a", big)
        assert done.stdout == "directory 555\n", done.stderr
        asked = [(request.status, request.bytes) for request in nar_requests(server.requests())]
        assert asked == [(206, ENCODED)]
        if way == "--trace":
            _, path = map(json.loads, (caller.home / "trace").read_text().splitlines())
            assert (path["path"], path["files"]) == (Path(big).name, [])
            caller.forget()
            server.forget()
    server.stop()
    again = caller.veneer("run", "--", "sh", "-c", f"cd {big} && pwd")
    assert again.stdout == f"{big}\n", again.stderr


# Two at a time.


def test_runs_that_share_a_cache_share_its_downloads(
    caller: Caller, nix_cache: SampleStore, unpacked: Census, nginx: Serve
) -> None:
    server = nginx(nix_cache.cache("none"), bytes_per_second=4 << 20)
    caller.use(server.url, key=nix_cache.public)
    big = nix_cache.paths["big"]
    with caller.environment_probe() as one, caller.environment_probe() as other:
        for probe in (one, other):
            probe.tell("read", path=f"{big}/again")
        answers: list[dict[str, Any]] = [probe.answer() for probe in (one, other)]
        assert [answer["digest"] for answer in answers] == [unpacked[big]["/again"][2]] * 2
        daemon = caller.daemon_pid()
        assert one.finish() == 0, one.errors
        # The first daemon belongs to whoever came first, and outlives it.
        assert other.ask("read", path=nix_cache.paths["note"])["size"] == 7
        assert caller.status()["pid"] == daemon
        assert other.finish() == 0, other.errors
    assert len(nar_requests(server.requests())) == 2
