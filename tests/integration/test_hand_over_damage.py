"""Hand-over when what servers need is damaged: trees under them, and the files of the program that they are.

A server that touches a mapped page which the file has no more, or which the disk cannot give, is killed (SIGBUS): no Python program
survives that. Its successor must not touch it again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.callers import Caller, Probe
from tests.support.failing_disk import FailingDisk
from tests.support.signed_cache import MadePath, SignedCache
from tests.support.storm import Readable, kill_server, make_readable, mounted, reading_below, server_of_run
from tests.support.versions import copied_program, edit, of_program
from veneer.formats.nar import nar_of, tree_of_nar
from veneer.model.store_path import DEFAULT_STORE_DIR, StorePath
from veneer.model.tree import Directory, RegularFile
from veneer.mount.trees import READ_FIRST

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.hand_over]

STORE = Path(DEFAULT_STORE_DIR)
DIRECTORIES, FILES = 10, 9000
RECORDS = READ_FIRST - (1 << 20)
"""Bytes of its tree that have all that servers look at to list a directory, and not what they give: its last records."""
BREAKAGES = {
    "server": ("mount/server.py", "        self._fd = fuse_fd\n", "        raise RuntimeError\n", "did not answer the kernel"),
    "keeper": ("environment/keeper.py", "    fds = handover.fds\n", "    raise RuntimeError\n", "the new keeper cannot start: RuntimeError"),
}  # fmt: skip
KILLED = "the mount server ended (killed by signal 7); another took over"


@pytest.fixture(scope="module")
def broad() -> MadePath:
    """A store path whose tree is larger than what is read before it is mapped."""
    files = tuple((b"file-%d" % n, RegularFile(0, False, 0)) for n in range(FILES))
    directory = Directory(tuple(sorted(files)))
    tree = Directory(tuple((b"directory-%d" % n, directory) for n in range(DIRECTORIES)))
    nar = b"".join(nar_of(tree, lambda _: []))
    digest = hashlib.sha256(b"broad").hexdigest()[:32].replace("e", "z")
    return MadePath(StorePath(digest, "broad"), nar, tree_of_nar([nar]), b"")


@pytest.fixture(scope="module")
def readable(open_directory: Path) -> Readable:
    return make_readable(open_directory / "undisturbed", 2)


@pytest.fixture(scope="module")
def source(open_directory: Path, readable: Readable, broad: MadePath) -> SignedCache:
    return SignedCache(open_directory / "broad", [broad], secret=readable.cache.secret)


class Broad:
    """The store path ``broad`` below ``store``, asked for through ``probe``."""

    def __init__(self, caller: Caller, probe: Probe, made: MadePath, store: Path = STORE) -> None:
        self._caller = caller
        self._probe = probe
        self._top = f"{store}/{made.path.basename}"

    @property
    def tree(self) -> Path:
        """Its tree index."""
        (path,) = (p for p in self._caller.cache.glob("trees/*/*.tree") if p.stat().st_size > READ_FIRST)
        return path

    def look(self, directory: int, file: int) -> Any:
        """The error, None for none."""
        path = f"{self._top}/directory-{directory}/file-{file}"
        return self._probe.ask("look", path=path).get("error")

    def list(self, directory: int) -> Any:
        """The number of files, or the error."""
        answer = self._probe.ask("list", path=f"{self._top}/directory-{directory}")
        return answer.get("error") or len(answer["names"])


def is_read(probe: Probe, readable: Readable, store: Path = STORE) -> bool:
    """Whether another path is, from the mount server."""
    path, digest = next(iter(readable.digests.items()))
    return bool(probe.ask("read", path=f"{store}/{path}", cold=True)["digest"] == digest)


def dropped_by_a_check(caller: Caller) -> list[tuple[str, str]]:
    """(kind, fault) of what ``veneer cache verify`` drops."""
    line = caller.words("cache", "--json", sources=False)
    line.insert(line.index("cache") + 1, "verify")
    done = subprocess.run(
        line, env=caller.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    return [(f["kind"], f["fault"]) for f in json.loads(done.stdout)["findings"] if f["dropped"]]


@contextlib.contextmanager
def probing(caller: Caller) -> Iterator[Probe]:
    probe = Probe(caller.popen(caller.probe_words()))
    with probe.ended():
        yield probe


@pytest.mark.parametrize("size", [0, 100, 1 << 20], ids=["empty", "header", "middle"])
def test_a_tree_that_is_cut_fails_alone_until_a_check_has_dropped_it(
    as_root: Caller, readable: Readable, source: SignedCache, broad: MadePath, size: int
) -> None:
    as_root.use(readable.cache.url, source.url, key=source.key)
    with (
        mounted(as_root) as (mount, target),
        probing(as_root) as probe,
        reading_below(target, as_root, readable) as reading,
    ):
        path = Broad(as_root, probe, broad, target)
        assert path.look(0, 0) is None
        os.truncate(path.tree, size)
        assert [path.look(n, n) for n in range(1, DIRECTORIES)] == ["EIO"] * (DIRECTORIES - 1)
        assert dropped_by_a_check(as_root) == [("tree", "wrong size")]
        assert [path.look(n, n) for n in range(DIRECTORIES)] == [None] * DIRECTORIES
        reading.check()
        mount.terminate()
        _, said = mount.communicate(timeout=30)
    assert said.count("took over") == said.count(KILLED) == 1


def test_a_tree_that_is_cut_does_no_harm_to_an_environment(
    caller: Caller, readable: Readable, source: SignedCache, broad: MadePath
) -> None:
    caller.use(readable.cache.url, source.url, key=source.key)
    with caller.environment_probe() as probe:
        path = Broad(caller, probe, broad)
        assert path.look(0, 0) is None
        os.truncate(path.tree, 1 << 20)
        assert [path.look(n, n) for n in range(1, DIRECTORIES)] == ["EIO"] * (DIRECTORIES - 1)
        assert is_read(probe, readable)
        assert dropped_by_a_check(caller) == [("tree", "wrong size")]
        assert path.look(1, 1) is None
        assert path.list(1) == FILES
        assert probe.finish() == 0
    assert probe.errors.count("took over") == probe.errors.count(KILLED) == 1
    assert "sections do not fit" in probe.errors


def test_a_directory_that_a_cut_tree_had_is_listed_again_after_the_check(
    as_root: Caller, readable: Readable, source: SignedCache, broad: MadePath
) -> None:
    """The kernel takes listings from the map itself, so that no server dies of them, and none begins anew."""
    as_root.use(readable.cache.url, source.url, key=source.key)
    with mounted(as_root) as (mount, target), probing(as_root) as probe:
        path = Broad(as_root, probe, broad, target)
        assert path.look(9, 0) is None
        os.truncate(path.tree, RECORDS)
        assert path.list(9) == "EIO"
        assert dropped_by_a_check(as_root) == [("tree", "wrong size")]
        assert path.list(9) == FILES
        mount.terminate()
        _, said = mount.communicate(timeout=30)
    assert "took over" not in said


def test_a_page_that_the_disk_has_lost_costs_one_server_and_its_own_path_only(
    as_root: Caller, readable: Readable, source: SignedCache, broad: MadePath
) -> None:
    as_root.use(readable.cache.url, source.url, key=source.key)
    with FailingDisk(as_root.home / "disk", as_root.cache) as disk:
        with as_root.environment_probe() as probe:
            path = Broad(as_root, probe, broad)
            assert path.look(0, 0) is None
        as_root.wait_for_daemons_end()
        forget_pages(path.tree)
        disk.fail("read", str(path.tree.relative_to(as_root.cache)), errno.EIO, start=READ_FIRST)
        with as_root.environment_probe() as probe:
            path = Broad(as_root, probe, broad)
            assert path.look(0, 0) is None
            assert [path.look(9, n) for n in range(3)] == ["EIO"] * 3
            assert is_read(probe, readable)
            assert dropped_by_a_check(as_root) == [("tree", "unreadable")]
            disk.heal()
            assert path.look(9, 0) is None
            assert probe.finish() == 0
        as_root.wait_for_daemons_end()
    assert probe.errors.count("took over") == probe.errors.count(KILLED) == 1
    assert "Input/output error" in probe.errors


def forget_pages(path: Path) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_servers_have_successors_when_the_program_is_gone_from_the_beginning(
    caller: Caller, readable: Readable, open_directory: Path
) -> None:
    with of_copied_program(caller, readable) as (_, package, probe):
        package.rename(package.with_name("removed"))
        for _ in range(2):
            kill_server(lambda: server_of_run(probe.process.pid))
            assert is_read(probe, readable)
        assert probe.finish() == 0
    assert probe.errors.count("another took over") == 2
    assert "touched" in probe.errors  # the waiting process tells its figures


@pytest.mark.parametrize("broken", BREAKAGES)
def test_a_broken_version_that_is_installed_over_the_running_one_is_refused(
    caller: Caller, readable: Readable, broken: str
) -> None:
    """From the beginning, and though there are no files of a program to go back to."""
    with of_copied_program(caller, readable) as (own, package, probe):
        edit(package / "__init__.py", "3.0", "3.1")
        name, old, new, why = BREAKAGES[broken]
        edit(package / name, old, new)
        done = own.veneer("upgrade", "--json", sources=False)
        (row,) = json.loads(done.stdout)["running"]
        assert (row["state"], row["version"]) == ("refused", "3.0")
        assert why in row["why"]
        for _ in range(2):
            kill_server(lambda: server_of_run(probe.process.pid))
            assert is_read(probe, readable)
        assert probe.finish() == 0


@contextlib.contextmanager
def of_copied_program(caller: Caller, readable: Readable) -> Iterator[tuple[Caller, Path, Probe]]:
    """(its caller, its package, an environment in which something was read) of a program of its own, version 3.0.

    Its keepers have no moment of calm in which they could load what they have not loaded yet.
    """
    place = caller.home.with_name(f"{caller.home.name}-program")
    package = copied_program(place, "3.0")
    edit(package / "environment" / "keeper.py", "_LOOK_SECONDS = 1.0\n", "_LOOK_SECONDS = 3600.0\n")
    own = of_program(caller, place)
    own.use(readable.cache.url, key=readable.cache.key)
    with own.environment_probe() as probe:
        assert is_read(probe, readable)
        yield own, package, probe
