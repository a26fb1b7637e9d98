"""Another version of the program takes over what runs, and readers do not notice; one that cannot serve takes over nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.callers import Caller, eventually, read_line
from tests.support.storm import (
    Readable,
    children,
    kill_server,
    make_readable,
    mounted,
    reading_below,
    reading_in_run,
    server_of_mount,
    server_of_run,
)
from tests.support.versions import copied_program, edit, of_program

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.hand_over]

UPGRADES = 4
BREAKAGES = {
    "import": ("mount/server.py", "from __future__ import annotations\n", "from __future__ import annotations\nimport there_is_no_such_module\n"),
    "start": ("mount/server.py", "        self._fd = fuse_fd\n", "        raise RuntimeError('it was broken on purpose')\n"),
    "answers": ("mount/server.py", "        Worker(self._shared).serve(self._fd, self._ended.is_set)\n", "        self._ended.wait()\n"),
    "reads": ("mount/server.py", "        Worker(self._shared).serve(self._fd, self._ended.is_set)\n", "        while os.read(self._fd, 1 << 21):\n            pass\n"),
    "format": ("mount/succession.py", '"session": 1,', '"session": 2,'),
}  # fmt: skip

KEEPER = (
    "environment/keeper.py",
    "    fds = handover.fds\n",
    "    raise RuntimeError('it was broken on purpose')\n",
)

MakeVersion = Callable[..., Path]


@pytest.fixture(scope="module")
def readable(open_directory: Path) -> Readable:
    return make_readable(open_directory / "upgrade-readable", 4)


@pytest.fixture(scope="module")
def make_version(open_directory: Path) -> MakeVersion:
    """A copy of the package that says it is ``version``; with one of BREAKAGES, perhaps."""

    def make(version: str, broken: str = "") -> Path:
        place = open_directory / f"version-{version}"
        if place.exists():
            return place
        package = copied_program(place, version)
        if broken:
            name, old, new = {**BREAKAGES, "keeper": KEEPER}[broken]
            edit(package / name, old, new)
        return place

    return make


def upgrade(caller: Caller, *words: str, status: int = 0) -> dict[str, Any]:
    return caller.document("upgrade", *words, status=status, sources=False)


def keeper_of(run: int) -> int:
    return next(
        pid for pid in children(run) if Path(f"/proc/{pid}/comm").read_text().strip() == "veneer-keeper"
    )


def test_readers_in_an_environment_do_not_notice_upgrades(
    caller: Caller, readable: Readable, make_version: MakeVersion
) -> None:
    caller.use(readable.cache.url, key=readable.cache.key)
    versions = [of_program(caller, make_version(f"1.{n}")) for n in (0, 1)]
    with reading_in_run(versions[0], readable) as reading:
        keeper = keeper_of(reading.process.pid)
        for n in range(1, UPGRADES + 1):
            server = server_of_run(reading.process.pid)
            found = upgrade(versions[n % 2])
            (row,), (daemon,) = found["running"], found["daemons"]
            assert (row["state"], row["before"], row["version"]) == (
                "upgraded",
                f"1.{(n - 1) % 2}",
                f"1.{n % 2}",
            )
            assert (daemon["state"], daemon["version"]) == ("upgraded", f"1.{n % 2}")
            assert row["pid"] == keeper == keeper_of(reading.process.pid)
            assert server_of_run(reading.process.pid) not in (0, server)
            assert str(make_version(f"1.{n % 2}")) in Path(f"/proc/{keeper}/environ").read_text()
            kill_server(lambda: server_of_run(reading.process.pid))  # the new keeper keeps
        said = reading.check()
    assert said.count("another took over") == UPGRADES
    assert list((caller.home / "environments").iterdir()) == []


def test_readers_of_a_mount_do_not_notice_upgrades(
    as_root: Caller, readable: Readable, make_version: MakeVersion
) -> None:
    as_root.use(readable.cache.url, key=readable.cache.key)
    versions = [of_program(as_root, make_version(f"1.{n}")) for n in (0, 1)]
    with mounted(versions[0]) as (mount, target), reading_below(target, as_root, readable) as reading:
        for n in range(1, UPGRADES + 1):
            found = upgrade(versions[n % 2])
            (row,), (daemon,) = found["running"], found["daemons"]
            assert (row["kind"], row["place"], row["pid"]) == ("mount", str(target), mount.pid)
            assert (row["state"], row["version"]) == ("upgraded", f"1.{n % 2}")
            assert (daemon["state"], daemon["version"]) == ("upgraded", f"1.{n % 2}")
            kill_server(lambda: server_of_mount(mount.pid))
        reading.check()


def test_a_named_environment_is_upgraded_by_name_and_ls_says_so(
    caller: Caller, readable: Readable, make_version: MakeVersion
) -> None:
    caller.use(readable.cache.url, key=readable.cache.key)
    old, new = (of_program(caller, make_version(f"1.{n}")) for n in (0, 1))
    for name in ("one", "two"):
        done = old.veneer("up", name)
        assert done.returncode == 0, done.stderr
    try:
        found = upgrade(new, "one")
        assert [(row["name"], row["state"]) for row in found["running"]] == [("one", "upgraded")]
        assert versions_in_ls(new) == {"one": "1.1", "two": "1.0"}
        assert [row["state"] for row in upgrade(new)["running"]] == ["current", "upgraded"]
        done = new.veneer(
            "enter", "one", "--", "cat", f"/nix/store/{next(iter(readable.digests))}", sources=False
        )
        assert done.returncode == 0, done.stderr
        done = new.veneer("upgrade", "three", sources=False)
        assert done.returncode == 2
        assert "three is not up" in done.stderr
    finally:
        for name in ("one", "two"):
            done = new.veneer("down", name, sources=False)
            assert done.returncode == 0, done.stderr


def versions_in_ls(caller: Caller) -> dict[str, str]:
    rows = caller.document("ls", sources=False)["environments"]
    return {row["name"]: row["version"] for row in rows}


@pytest.mark.parametrize("broken", BREAKAGES)
def test_a_version_that_cannot_serve_leaves_the_old_one_running(
    caller: Caller, readable: Readable, make_version: MakeVersion, broken: str
) -> None:
    caller.use(readable.cache.url, key=readable.cache.key)
    old = of_program(caller, make_version("1.0"))
    new = of_program(caller, make_version(f"1.{broken}", broken))
    with reading_in_run(old, readable) as reading:
        keeper = keeper_of(reading.process.pid)
        (row,) = upgrade(new, status=1)["running"]
        assert (row["state"], row["version"]) == ("refused", "1.0")
        said = {
            "import": "there_is_no_such_module",
            "start": "did not answer the kernel",
            "answers": "did not answer the kernel",
            "reads": "did not answer the kernel",
            "format": "the running one has version 1 of the session format, this program 2",
        }
        assert said[broken] in row["why"]
        assert keeper_of(reading.process.pid) == keeper
        eventually(lambda: server_of_run(reading.process.pid))
        assert [row["state"] for row in upgrade(old)["running"]] == ["current"]
        reading.check()


def test_files_replaced_in_place_are_taken_up_when_they_serve(
    caller: Caller, readable: Readable, make_version: MakeVersion
) -> None:
    caller.use(readable.cache.url, key=readable.cache.key)
    place = make_version(f"2.0-{'root' if caller.is_root else 'user'}")
    own = of_program(caller, place)
    server = place / "veneer" / "mount" / "server.py"
    name, (_, good, broken) = place.name.removeprefix("version-"), BREAKAGES["start"]
    old = of_program(caller, make_version("1.0"))
    with reading_in_run(old, readable) as reading:
        assert [row["state"] for row in upgrade(own)["running"]] == ["upgraded"]
        edit(server, good, broken)
        edit(place / "veneer" / "__init__.py", name, "2.1")
        (row,) = upgrade(own, status=1)["running"]
        assert (row["state"], row["version"]) == ("refused", name)
        edit(server, broken, good)
        edit(place / "veneer" / "__init__.py", "2.1", "2.2")
        (row,) = upgrade(own)["running"]
        assert (row["state"], row["before"], row["version"]) == ("upgraded", name, "2.2")
        reading.check()


def test_a_keeper_that_could_not_begin_does_not_take_over(
    caller: Caller, readable: Readable, make_version: MakeVersion
) -> None:
    caller.use(readable.cache.url, key=readable.cache.key)
    old, new = (
        of_program(caller, make_version(version, broken))
        for version, broken in (("1.0", ""), ("1.keeper", "keeper"))
    )
    with reading_in_run(old, readable) as reading:
        keeper = keeper_of(reading.process.pid)
        (row,) = upgrade(new, status=1)["running"]
        assert "the new keeper cannot start: RuntimeError: it was broken on purpose" in row["why"]
        assert [(row["state"], row["pid"], row["before"]) for row in upgrade(old)["running"]] == [
            ("current", keeper, "1.0")
        ]
        kill_server(lambda: server_of_run(reading.process.pid))
        said = reading.check()
    assert said.count("another took over") == 1


def test_a_daemon_that_somebody_else_looks_after_is_left_to_him(
    as_root: Caller, readable: Readable, make_version: MakeVersion
) -> None:
    as_root.use(readable.cache.url, key=readable.cache.key)
    old = of_program(as_root, make_version("1.0"))
    daemon = old.popen(old.words("daemon"), stdin=subprocess.DEVNULL)
    try:
        assert daemon.stderr is not None
        assert "serving" in read_line(daemon.stderr)
        found = upgrade(of_program(as_root, make_version("1.1")))
        assert [(row["state"], row["version"]) for row in found["daemons"]] == [("left", "1.0")]
        assert daemon.poll() is None
    finally:
        daemon.terminate()
        daemon.communicate(timeout=20)


def test_a_mount_keeps_its_server_when_the_new_one_cannot_serve(
    as_root: Caller, readable: Readable, make_version: MakeVersion
) -> None:
    as_root.use(readable.cache.url, key=readable.cache.key)
    with mounted(of_program(as_root, make_version("1.0"))) as (mount, target):
        for broken in BREAKAGES:
            found = upgrade(of_program(as_root, make_version(f"1.{broken}", broken)), status=1)
            assert [(row["state"], row["version"]) for row in found["running"]] == [("refused", "1.0")]
            assert (target / readable.programs[0]).read_bytes()
            assert mount.poll() is None


def test_a_daemon_that_cannot_start_leaves_the_old_one_running(
    as_root: Caller, readable: Readable, make_version: MakeVersion
) -> None:
    as_root.use(readable.cache.url, key=readable.cache.key)
    place = make_version("1.daemon")
    (place / "veneer" / "daemon" / "run.py").write_text("raise ImportError('no daemon')\n")
    with mounted(of_program(as_root, make_version("1.0"))) as (_, target):
        before = as_root.daemon_pid()
        found = upgrade(of_program(as_root, place), status=1)
        (daemon,) = found["daemons"]
        assert (daemon["state"], daemon["version"]) == ("refused", "1.0")
        assert "no daemon" in daemon["why"]
        assert as_root.daemon_pid() == before
        assert (target / readable.programs[0]).read_bytes()


def test_nothing_runs_and_that_is_said(as_root: Caller) -> None:
    done = as_root.veneer("upgrade", sources=False)
    assert done.returncode == 0, done.stderr
    assert "nothing runs" in done.stderr
    assert upgrade(as_root)["running"] == []
