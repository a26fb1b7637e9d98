"""The command line as a user meets it: whole processes, a real binary cache, a real mount."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.users import OtherUser
from veneer.cache.directory import wait_until_free
from veneer.cli.demo import _server
from veneer.cli.demo_cache import Content, File, Link, add_path, write_header
from veneer.cli.demo_closure import Closure, find_program, plan_of
from veneer.formats.signature import SecretKey
from veneer.model.store_path import StorePath

SECONDS = 60
NOWHERE = "/nix/store/00000000000000000000000000000000-nowhere"


@dataclass(frozen=True)
class Served:
    """A binary cache with one program, and how to call veneer with it."""

    url: str
    key: str
    directory: Path
    closure: Closure
    work: Path

    @property
    def program(self) -> str:
        return self.closure.command[0]

    @property
    def path(self) -> str:
        return self.program.rpartition("/bin/")[0]

    @property
    def sources(self) -> list[str]:
        return ["--cache", self.url, "--trusted-public-key", self.key]

    def own(self) -> list[str]:
        return ["--cache-dir", str(self.work / "cache"), "--config", str(self.work / "config.toml")]

    def veneer(self, command: str, *words: str, sources: bool = True) -> subprocess.CompletedProcess[str]:
        given = self.sources if sources else []
        return run_veneer(command, *given, *self.own(), *words)


def run_veneer(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "veneer.cli.main", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=env,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Closure]:
    """A small signed binary cache: a shell with its libraries, and data that it does not touch."""
    program = find_program("bash") or find_program("sh")
    assert program is not None
    directory = tmp_path_factory.mktemp("binary-cache") / "cache"
    closure = plan_of(program, ("-c", "echo hello"), [], [("untouched-1", 4, 1 << 20)])
    key = SecretKey.generate("test-1")
    write_header(directory)
    for planned in closure.paths:
        add_path(directory, planned.path, planned.content, planned.references, key)
    return directory, str(key.public_key()), closure


@pytest.fixture
def served(made: tuple[Path, str, Closure], tmp_path: Path) -> Iterator[Served]:
    directory, key, closure = made
    (tmp_path / "config.toml").write_text(
        f"environments-dir = {json.dumps(str(tmp_path / 'environments'))}\n"
    )
    with _server(directory) as url:
        yield Served(url, key, directory, closure, tmp_path)
    wait_until_free(tmp_path / "cache", 10)


@pytest.mark.fuse
def test_a_program_runs_out_of_the_cache_and_the_line_tells_what_it_cost(served: Served) -> None:
    report_file = served.work / "report.json"
    done = served.veneer("run", "--report", str(report_file), "--", *served.closure.command)
    assert (done.returncode, done.stdout) == (0, "hello\n")
    assert done.stderr.startswith("veneer: closure ")
    assert "touched" in done.stderr
    report = json.loads(report_file.read_bytes())
    untouched = next(p.path.basename for p in served.closure.paths if p.path.name == "untouched-1")
    own = report["paths"][Path(served.path).name]
    assert own["touched"]
    assert own["fetched"] > 0
    assert own["fetched_nar"] > own["bytes"] > 0
    assert not report["paths"].get(untouched, {}).get("touched", False)
    assert report["closure"]["paths"] == len(served.closure.paths)
    assert 0 < report["fetched"] < report["closure"]["bytes"]


@pytest.mark.fuse
def test_a_second_run_fetches_nothing(served: Served) -> None:
    assert served.veneer("run", "--", *served.closure.command).returncode == 0
    done = served.veneer("run", "--json", "--", *served.closure.command)
    document = json.loads(done.stderr)
    assert (document["fetched"], document["status"]) == (0, 0)
    assert document["touched"] > 0


@pytest.mark.fuse
@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["sh", "-c", "exit 7"], 7),
        (["no-such-command"], 127),
        (["/etc/passwd"], 126),
        ([NOWHERE + "/bin/x"], 127),
    ],
)
def test_the_status_of_the_command_is_passed_on(served: Served, words: list[str], status: int) -> None:
    assert served.veneer("run", "--quiet", "--", *words).returncode == status


@pytest.mark.fuse
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGPIPE])
def test_a_death_by_signal_is_died_again(served: Served, number: int) -> None:
    done = served.veneer("run", "--", "sh", "-c", f"kill -{number} $$")
    assert done.returncode == -number
    assert "no store path was touched" in done.stderr


@pytest.mark.fuse
def test_options_after_the_command_are_the_commands_own(served: Served) -> None:
    done = served.veneer("run", "echo", "--quiet", "--json")
    assert done.stdout == "--quiet --json\n"
    assert "no store path was touched" in done.stderr


@pytest.mark.fuse
def test_quiet_says_nothing(served: Served) -> None:
    done = served.veneer("run", "--quiet", "--", *served.closure.command)
    assert (done.stdout, done.stderr) == ("hello\n", "")


@pytest.mark.fuse
def test_a_source_that_is_gone_is_an_error_with_its_story_and_never_a_hang(served: Served) -> None:
    gone = ["--cache", "http://127.0.0.1:1", "--trusted-public-key", served.key]
    done = run_veneer("run", *gone, *served.own(), "--", "cat", served.program)
    assert done.returncode == 1
    assert "Input/output error" in done.stderr
    assert "veneer: warning: EIO" in done.stderr
    assert "127.0.0.1:1" in done.stderr


@pytest.mark.fuse
def test_a_daemon_that_cannot_start_says_why(served: Served) -> None:
    (served.work / "cache").mkdir()
    (served.work / "cache" / "index.sqlite").mkdir()
    done = served.veneer(
        "run", "--patience", "1", "--", "sh", "-c", f"cat {served.program} 2>/dev/null; exit 0"
    )
    assert "the store daemon ended" in done.stderr
    failed = served.veneer("status")
    assert failed.returncode == 8
    assert "the store daemon ended" in failed.stderr


def test_unreadable_settings_stop_a_run_before_it_starts(served: Served) -> None:
    (served.work / "config.toml").write_text("max-sise = 1")
    done = served.veneer("run", "true")
    assert done.returncode == 125
    assert "did you mean max-size?" in done.stderr


def test_files_are_listed_and_printed_without_a_mount(served: Served) -> None:
    listed = json.loads(served.veneer("ls", "-R", "--json", served.path).stdout)
    names = {row["name"]: row for row in listed["entries"]}
    program = next(name for name in names if name.startswith("libexec/"))
    assert names[program]["executable"]
    text = served.veneer("ls", "-l", served.path + "/bin").stdout
    assert text.startswith("-r-xr-xr-x")
    binary = subprocess.run(
        [
            sys.executable,
            "-m",
            "veneer.cli.main",
            "cat",
            *served.sources,
            *served.own(),
            f"{served.path}/{program}",
        ],
        capture_output=True,
        timeout=SECONDS,
    )
    assert len(binary.stdout) == names[program]["size"]
    assert binary.stdout.startswith(b"\x7fELF")


def test_listing_moves_no_contents(served: Served) -> None:
    served.veneer("ls", "-R", served.path)
    status = json.loads(served.veneer("status", "--json").stdout)
    assert status["totals"]["nars"] == 0
    assert status["totals"]["trees"] > 0
    assert status["sources"] == [{"url": served.url, "verify": "strict", "unknown_options": []}]


def test_what_no_source_has_is_three_and_what_nobody_signed_is_four(served: Served) -> None:
    assert served.veneer("ls", NOWHERE).returncode == 3
    other = str(SecretKey.generate("other-1").public_key())
    done = run_veneer(
        "ls", "--json", "--cache", served.url, "--trusted-public-key", other, *served.own(), served.path
    )
    assert done.returncode == 4
    error = json.loads(done.stderr)["error"]
    assert error["exit_code"] == 4
    assert "test-1" in error["what"]
    assert done.stdout == ""


def test_what_was_fetched_is_there_without_the_source(served: Served) -> None:
    fetched = json.loads(served.veneer("fetch", "--closure", "--json", served.path).stdout)
    assert fetched["paths"] == len(served.closure.paths)
    assert fetched["wire_bytes"] > 4 << 20
    again = json.loads(served.veneer("fetch", "--closure", "--json", served.path).stdout)
    assert again["wire_bytes"] == 0


def test_pinned_paths_survive_a_collection(served: Served) -> None:
    served.veneer("fetch", "--closure", served.path)
    libc = next(p.path for p in served.closure.paths if p.path.name == "libc")
    assert "pinned 1 store path as base" in served.veneer("pin", "base", libc.absolute()).stdout
    planned = json.loads(served.veneer("gc", "--dry-run", "--json", sources=False).stdout)
    assert planned["evicted"] == len(served.closure.paths) - 1
    done = served.veneer("gc", sources=False)
    assert done.stdout.startswith(f"dropped the content of {planned['evicted']} store paths")
    assert json.loads(served.veneer("status", "--json").stdout)["totals"]["nars"] == 1
    assert libc.basename in served.veneer("pin", "--list").stdout
    assert served.veneer("unpin", "base", sources=False).returncode == 0
    assert served.veneer("pin", "--list").stdout == "nothing is pinned\n"
    assert served.veneer("gc", sources=False).stdout.startswith("dropped the content of 1 store path,")


def test_sources_come_from_nix_conf(served: Served) -> None:
    conf = served.work / "etc" / "nix.conf"
    conf.parent.mkdir()
    conf.write_text(f"substituters = {served.url}\ntrusted-public-keys = {served.key}\n")
    env = {**os.environ, "NIX_CONF_DIR": str(conf.parent), "NIX_USER_CONF_FILES": "/nonexistent"}
    done = run_veneer("ls", *served.own(), served.path, env=env)
    assert done.stdout.split() == ["bin", "libexec"]


@pytest.mark.fuse
def test_a_daemon_in_the_foreground_serves_others_and_ends_on_sigterm(served: Served) -> None:
    daemon = subprocess.Popen(
        [sys.executable, "-m", "veneer.cli.main", "daemon", *served.sources, *served.own()],
        stderr=subprocess.PIPE,
        text=True,
    )
    with daemon:
        try:
            assert daemon.stderr is not None
            assert "serving" in read_line(daemon)
            status = json.loads(served.veneer("status", "--json").stdout)
            assert status["pid"] == daemon.pid
            done = served.veneer("run", "--", *served.closure.command)
            assert done.stdout == "hello\n"
            assert "closure" in done.stderr
        finally:
            daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(20) == 0
    assert not (served.work / "cache" / "daemon.sock").exists()


def read_line(process: subprocess.Popen[str]) -> str:
    """The next line of its standard error."""
    assert process.stderr is not None
    readable, _, _ = select.select([process.stderr], [], [], SECONDS)
    assert readable
    return process.stderr.readline()


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.parametrize("end", ["interrupt", "umount"])
def test_a_mount_is_there_until_it_is_ended(served: Served, end: str) -> None:
    target = served.work / "mnt"
    target.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "veneer.cli.main", "mount", *served.sources, *served.own(), str(target)],
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert "mounted on" in read_line(process)
            name = Path(served.path).name
            shown = subprocess.run(
                ["sh", "-c", f"ls {target}; cat {target}/{name}/bin/*"],
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
            assert shown.stdout.startswith("#!/bin/sh\n")
        finally:
            if end == "interrupt":
                process.send_signal(signal.SIGINT)
            else:
                subprocess.run(["umount", str(target)], check=True, timeout=SECONDS)
        assert process.wait(20) == 0
    assert str(target) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.fuse
def test_the_demo_shows_a_small_share_and_leaves_nothing(tmp_path: Path) -> None:
    began = time.monotonic()
    done = run_veneer("demo", "--json", env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    check_demo(document)
    assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - began < 30  # ten seconds on a machine that does nothing else


def check_demo(document: dict[str, Any]) -> None:
    first, again = document["runs"]
    assert first["stdout"]
    assert first["stdout"] == again["stdout"]
    assert 0 < first["fetched"] < 0.2 * document["download_bytes"]
    assert again["fetched"] == 0
    assert sum(1 for row in document["paths"] if not row["touched"]) >= 3
    assert all(row["fetched"] for row in document["paths"] if row["touched"])


@pytest.mark.fuse
def test_a_kept_demo_can_be_tried_by_hand(tmp_path: Path) -> None:
    done = run_veneer("demo", "--keep", str(tmp_path / "kept"))
    assert "again, from the cache: 0 B fetched" in done.stdout
    hint = next(line for line in done.stderr.splitlines() if "kept in" in line)
    words = hint.partition("veneer run ")[2].split()
    own = [
        "--cache-dir",
        str(tmp_path / "kept" / "cache"),
        "--config",
        str(tmp_path / "kept" / "config.toml"),
    ]
    assert run_veneer("run", *words[:4], *own, "true").returncode == 0
    assert run_veneer("demo", "--keep", str(tmp_path / "kept")).returncode == 2
    wait_until_free(tmp_path / "kept" / "cache", 10)


@pytest.mark.fuse
def test_the_demo_needs_no_root(as_user: OtherUser) -> None:
    done = as_user.veneer("demo", "--json")
    assert done.returncode == 0, done.stderr
    check_demo(json.loads(done.stdout))


def test_links_into_other_store_paths_are_followed(served: Served, tmp_path: Path) -> None:
    key = SecretKey.generate("links-1")
    a, b = StorePath("0" * 31 + "a", "a"), StorePath("0" * 31 + "b", "b")
    cache = tmp_path / "links"
    write_header(cache)
    contents: list[tuple[StorePath, Content]] = [
        (a, {"far": Link(f"{b.absolute()}/text")}),
        (b, {"text": File(b"far away")}),
    ]
    for path, content in contents:
        add_path(cache, path, content, [], key)
    given = ["--cache", str(cache), "--trusted-public-key", str(key.public_key()), *served.own()]
    assert run_veneer("cat", *given, f"{a.absolute()}/far").stdout == "far away"
    shutil.rmtree(cache)


def test_an_option_of_a_cache_that_nobody_knows_is_named(
    made: tuple[Path, str, Closure], tmp_path: Path
) -> None:
    url = f"file://{made[0]}"
    query = "?compression=xz&nobody-knows=1"
    words = ["status", "--cache", url + query, "--trusted-public-key", made[1]]
    words += ["--cache-dir", str(tmp_path / "cache")]
    for json_flag in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "veneer.cli.main", *words, *json_flag],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert "nobody-knows" in done.stdout
        assert "compression" not in done.stdout + done.stderr
        warning = f"veneer: warning: unknown option 'nobody-knows' of {url} is ignored\n"
        assert done.stderr == ("" if json_flag else warning)
    wait_until_free(tmp_path / "cache", 10)
