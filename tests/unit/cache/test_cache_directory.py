"""Who may use a cache directory, and what its files look like to others."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.caches import Clock, add_nar, add_tree, open_cache
from veneer.cache import directory
from veneer.cache.cache import Cache
from veneer.model.errors import CacheError, CacheFullError


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_new_cache_is_private_and_tagged(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "cache"
    with open_cache(root) as cache:
        path = add_nar(cache, 1)
        assert mode(root) == mode(root / "nars") == mode(cache.nars.path(path.number).parent) == 0o700
        assert (root / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")


def test_shared_cache_lets_others_read_published_files_only(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    before = os.umask(0o077)
    try:
        with Cache.open(root, clock=Clock(), shared=True) as cache:
            nar = cache.nars.path(add_nar(cache, 1).number)
            tree = cache.trees.path(add_tree(cache, 1).number)
            assert mode(root) == mode(nar.parent) == mode(tree.parent) == 0o755
            assert mode(nar) == mode(tree) == 0o444
            assert mode(root / "incoming") == mode(root / "quarantine") == 0o700
            assert mode(root / "index.sqlite") == 0o600
    finally:
        os.umask(before)


def test_too_open_directory_is_closed_on_opening(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    root.mkdir(mode=0o777)
    root.chmod(0o777)
    open_cache(root).close()
    assert mode(root) == 0o700


def test_second_daemon_is_refused_with_the_first_ones_pid(tmp_path: Path) -> None:
    with open_cache(tmp_path):
        with pytest.raises(
            CacheError, match=rf"another daemon \(pid {os.getpid()}\) owns this cache"
        ) as caught:
            open_cache(tmp_path)
        assert str(tmp_path) in str(caught.value)
    open_cache(tmp_path).close()


def test_killed_daemons_lock_is_free(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from veneer.cache.cache import Cache\n"
        "cache = Cache.open(Path(sys.argv[1]), clock=time.time); print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(CacheError, match=rf"pid {other.pid}\b"):
            open_cache(tmp_path)
        other.kill()
        other.wait(10)
        open_cache(tmp_path).close()


def test_another_users_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(CacheError, match=f"belongs to another user \\(uid {owner}") as caught:
        open_cache(tmp_path)
    assert "choose another cache directory" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.EROFS, "read-only"),
        (errno.EACCES, "belong to the daemon's user"),
        (errno.ENOLCK, "NFS"),
        (errno.ENOENT, "restart the daemon"),
    ],
)
def test_failures_of_the_file_system_come_with_a_hint(number: int, hint: str) -> None:
    error = directory.cache_error(OSError(number, "x"), "/cache/file", "write to")
    assert hint in error.hint
    assert error.where == "/cache/file"
    assert error.exit_code == 7


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_and_full_quota_are_the_same_error(number: int) -> None:
    error = directory.cache_error(OSError(number, "x"), "/cache/file", "write to")
    assert isinstance(error, CacheFullError)


def test_file_in_place_of_the_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("x")
    with pytest.raises(CacheError, match="cannot set up the cache"):
        open_cache(tmp_path / "cache")


def test_index_refuses_a_second_thread(tmp_path: Path) -> None:
    caught: list[BaseException] = []
    with open_cache(tmp_path) as cache:

        def read() -> None:
            try:
                cache.index.path(1)
            except CacheError as error:
                caught.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        thread.join(10)
    assert len(caught) == 1


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.close()
    cache.close()
