"""``veneer doctor`` on machines with one thing wrong: it is found, named and has a fix. Real mounts, sources and Nix."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.callers import Caller
from tests.support.faulty_http import FaultyServer, Stall
from tests.support.nix import RealNix
from tests.support.sample import SampleStore
from veneer.formats.overlay_store import OverlayStore

SECONDS = 90


def doctor(
    caller: Caller, *words: str | Path, inside: tuple[str, ...] = (), more: dict[str, str] | None = None
) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and findings. ``inside``: words before the command; ``more``: environment variables."""
    command = caller.words("doctor", "--json", *words)
    done = subprocess.run(
        [*command[: len(caller.prefix)], *inside, *command[len(caller.prefix) :]],
        env={k: v for k, v in caller.environment.items() if not k.startswith("NIX_")}
        | {"NIX_CONF_DIR": "/nowhere"}
        | (more or {}),
        cwd=caller.home,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.stdout, done.stderr
    document = json.loads(done.stdout)
    assert (document["worst"] == "failed") == (done.returncode == 1)
    return done.returncode, document["findings"]


def bad(found: list[dict[str, Any]], name: str = "") -> list[dict[str, Any]]:
    return [f for f in found if f["state"] in ("failed", "warning") and name in ("", f["name"])]


@pytest.mark.fuse
@pytest.mark.nix
def test_a_healthy_machine_has_no_failure_and_nothing_is_changed(
    caller: Caller, nix_cache: SampleStore
) -> None:
    caller.use(str(nix_cache.cache()), key=nix_cache.public)
    caller.configure()
    before = sorted(caller.home.rglob("*"))
    mounts = Path("/proc/self/mounts").read_text()
    status, found = doctor(caller, nix_cache.paths["greet"])
    assert status == 0, bad(found)
    assert sorted(caller.home.rglob("*")) == before
    assert Path("/proc/self/mounts").read_text() == mounts
    assert {f["state"] for f in found if f["name"] in ("overlay", "fuse device", "sources", "keys")} == {"ok"}
    assert [f["state"] for f in found if f["name"] == "named paths"] == ["ok"]


def test_a_source_that_refuses_is_a_failure_with_its_url(as_root: Caller) -> None:
    as_root.use("http://127.0.0.1:1/cache?trusted=true")
    status, found = doctor(as_root)
    assert status == 1
    assert ["127.0.0.1:1" in f["what"] for f in bad(found, "sources")] == [True]
    assert bad(found, "sources")[0]["fix"]


@pytest.mark.nix
def test_a_source_that_hangs_costs_seconds(
    as_root: Caller, nix_cache: SampleStore, faulty_http: Callable[[Path], FaultyServer]
) -> None:
    server = faulty_http(nix_cache.cache())
    server.fail("/nix-cache-info", Stall())
    begun = time.monotonic()
    status, found = doctor(as_root, "--source", server.url)
    assert time.monotonic() - begun < 20
    assert status == 1
    assert bad(found, "sources")


def test_a_cache_for_another_store_directory_is_a_failure(as_root: Caller, tmp_path: Path) -> None:
    (tmp_path / "nix-cache-info").write_text("StoreDir: /gnu/store\n")
    status, found = doctor(as_root, "--source", str(tmp_path))
    assert status == 1
    assert "/gnu/store" in bad(found, "sources")[0]["what"]


@pytest.fixture
def server_of_2001() -> Iterator[str]:
    """A cache whose clock stands."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "21")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b"StoreDir: /nix/store\n")

        do_HEAD = do_GET  # noqa: N815

        def date_time_string(self, timestamp: float | None = None) -> str:
            return "Tue, 01 May 2001 12:00:00 GMT"

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_clock_that_differs_from_the_sources_is_a_warning(as_root: Caller, server_of_2001: str) -> None:
    _, found = doctor(as_root, "--source", server_of_2001)
    assert "ahead" in bad(found, "clock")[0]["what"]
    assert bad(found, "sources") == []


DEAD_MOUNT = """
import os, sys
from veneer.mount import device
target = sys.argv[1]
fd = device.open_fuse()
device.mount_fuse(fd, target)
os.close(fd)
os.execvp(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.root
@pytest.mark.fuse
def test_a_mount_without_its_server_is_found(as_root: Caller) -> None:
    target = as_root.home / "dead"
    target.mkdir()
    as_root.use(str(as_root.home) + "?trusted=true")
    inside = ("unshare", "-m", as_root.python, "-c", DEAD_MOUNT, str(target))
    status, found = doctor(as_root, inside=inside)
    assert status == 1
    assert f"umount -l {target}" in bad(found, "stale mounts")[0]["fix"]


@pytest.mark.nix
def test_two_contents_of_one_path_are_told(as_root: Caller, nix_cache: SampleStore, tmp_path: Path) -> None:
    other = shutil.copytree(nix_cache.cache(), tmp_path / "other")
    narinfo = other / f"{nix_cache.hash_part('note')}.narinfo"
    lines = narinfo.read_text().splitlines()
    donor = (nix_cache.cache() / f"{nix_cache.hash_part('big')}.narinfo").read_text().splitlines()
    other_hash = next(line for line in donor if line.startswith("NarHash"))
    narinfo.write_text("".join(f"{other_hash if line.startswith('NarHash') else line}\n" for line in lines))
    as_root.use(str(nix_cache.cache()), str(other), key=nix_cache.public)
    _, found = doctor(as_root, nix_cache.paths["note"])
    assert "not the same everywhere" in bad(found, "named paths")[0]["what"]


@pytest.mark.nix
def test_a_path_in_an_upper_layer_that_a_source_has_is_told_from_memory(
    as_root: Caller, nix_cache: SampleStore
) -> None:
    as_root.use(str(nix_cache.cache()), key=nix_cache.public)
    as_root.configure()
    name = nix_cache.basename("note")
    (as_root.home / "environments/mine/upper" / name).mkdir(parents=True)
    daemon = as_root.popen(as_root.words("daemon"))
    with daemon:
        try:
            assert daemon.stderr is not None
            assert "serving" in daemon.stderr.readline()
            assert bad(doctor(as_root)[1], "upper paths below") == []
            assert as_root.veneer("ls", nix_cache.paths["note"]).returncode == 0
            _, found = doctor(as_root)
            assert name in bad(found, "upper paths below")[0]["what"]
        finally:
            daemon.terminate()


@pytest.fixture
def wired(as_root: Caller) -> Callable[[str], dict[str, str]]:
    """Makes the environment of a user whose nix.conf has this store."""

    def configure(
        store: str, features: str = "nix-command local-overlay-store read-only-local-store"
    ) -> dict[str, str]:
        conf = as_root.home / "conf"
        conf.mkdir(exist_ok=True)
        (conf / "nix.conf").write_text(f"experimental-features = {features}\nstore = {store}\n")
        return {"NIX_CONF_DIR": str(conf), "HOME": str(as_root.home)}

    return configure


def test_the_mistakes_of_wiring_it_oneself_are_all_named(
    as_root: Caller, wired: Callable[..., dict[str, str]]
) -> None:
    home = as_root.home
    good = OverlayStore(f"{home}/nix.sock", f"{home}/lower", f"{home}/upper", f"{home}/root").url()
    as_root.use(str(home) + "?trusted=true")
    status, found = doctor(as_root, more=wired(good, features="nix-command"))
    assert status == 1
    assert {f["name"] for f in bad(found) if f["state"] == "failed"} >= {
        "nix.conf",
        "overlay mount",
        "lower store",
    }
    assert any("mount -t overlay overlay" in f["fix"] for f in bad(found, "overlay mount"))
    for url, words in (
        (good.replace("%", "%25"), "encoded twice"),
        (good.replace("%3Froot%3D", "?root="), "not encoded"),
        (good.partition("%3Froot")[0] + "&upper-layer=/u", "no root"),
        ("local-overlay://?lower-store=/lower&upper-layer=/u", "for writing"),
    ):
        what = [f["what"] for f in bad(doctor(as_root, more=wired(url))[1], "store URL")]
        assert any(words in line for line in what), (url, what)


@pytest.mark.nix
def test_a_lower_store_whose_files_are_not_in_its_database_is_found(
    as_root: Caller, real_nix: RealNix, nix_cache: SampleStore, wired: Callable[..., dict[str, str]]
) -> None:
    home = as_root.home
    real_nix.run(
        "nix", "copy", "--no-check-sigs", "--from", f"file://{nix_cache.cache()}", nix_cache.paths["note"]
    )
    real_nix.run("nix-store", "--query", "--hash", nix_cache.paths["note"])
    url = f"local-overlay://?root={home}/root&lower-store={real_nix.store}%3Fread-only%3Dtrue&upper-layer={home}/upper"
    as_root.use(str(home) + "?trusted=true")
    _, found = doctor(as_root, more=wired(url))
    assert [f["state"] for f in found if f["name"] == "lower store"] == ["ok"], bad(found)
    stranger = real_nix.store / "nix/store" / nix_cache.basename("hello")
    stranger.write_text("copied by hand")
    assert stranger.name in bad(doctor(as_root, more=wired(url))[1], "lower store")[0]["what"]
    stranger.unlink()
    (real_nix.store / "nix/store" / nix_cache.basename("note")).unlink()
    (real_nix.store / "nix/store" / nix_cache.basename("hello")).write_text("")
    assert bad(doctor(as_root, more=wired(url))[1], "lower store")


CHANGED_BELOW = """
set -eu
home=$1 late=$2 removed=$3; shift 3
mkdir -p "$home/lower/nix/store" "$home/upper" "$home/work" "$home/root/nix/store"
touch "$home/lower/nix/store/$removed"
options=lowerdir=$home/lower/nix/store,upperdir=$home/upper,workdir=$home/work
mount -t overlay overlay -o "$options" "$home/root/nix/store"
test ! -e "$home/root/nix/store/$late"
touch "$home/lower/nix/store/$late"
rm "$home/root/nix/store/$removed"
exec "$@"
"""


@pytest.mark.root
def test_a_lower_store_changed_underneath_is_seen_in_the_merged_one(
    as_root: Caller, wired: Callable[..., dict[str, str]]
) -> None:
    home, late, removed = as_root.home, f"{'1' * 32}-late", f"{'2' * 32}-removed"
    url = OverlayStore(f"{home}/nix.sock", f"{home}/lower", f"{home}/upper", f"{home}/root").url()
    as_root.use(str(home) + "?trusted=true")
    inside = ("unshare", "-m", "sh", "-c", CHANGED_BELOW, "sh", str(home), late, removed)
    _, found = doctor(as_root, f"/nix/store/{late}", inside=inside, more=wired(url))
    assert f"mount -o remount {home}/root/nix/store" in bad(found, "stale names")[0]["fix"]
    assert removed in bad(found, "hidden paths")[0]["what"]
    assert ["nothing is mounted on" in f["what"] for f in bad(found, "overlay mount")] == [True]


@pytest.mark.fuse
@pytest.mark.nix
def test_inside_an_environment_it_looks_at_that_environments_store(
    caller: Caller, nix_cache: SampleStore
) -> None:
    caller.use(str(nix_cache.cache()), key=nix_cache.public)
    inner = caller.words("doctor", "--json")[len(caller.prefix) :]
    done = caller.veneer("run", "--", *inner)
    found = json.loads(done.stdout)["findings"]
    checked = {
        f["name"]: f["state"] for f in found if f["name"] in ("store URL", "overlay mount", "lower store")
    }
    assert checked == {"store URL": "ok", "overlay mount": "ok", "lower store": "ok"}, bad(found)


def test_without_utf8_or_a_terminal_the_text_is_plain(as_root: Caller) -> None:
    as_root.use(str(as_root.home) + "?trusted=true")
    done = as_root.veneer("doctor")
    assert "\x1b" not in done.stdout
    assert not {"✔", "✘"} & set(done.stdout)
    assert os.linesep.join(["", "machine"]) in done.stdout or done.stdout.startswith("machine")
