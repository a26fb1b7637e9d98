"""The mount server under a real kernel, over a stub of the store daemon."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.callers import eventually
from tests.support.stub_daemon import Mounted, Spec, mounted, store_name
from veneer.formats import request_wire
from veneer.formats.request_wire import Kind
from veneer.formats.tree_index import nar_file, tree_file
from veneer.model.tree import Directory, RegularFile
from veneer.mount.misses import BLOCK

pytestmark = [pytest.mark.root, pytest.mark.fuse]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mounted]:
    with mounted(tmp_path) as mount:
        mount.daemon.start()
        yield mount


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(128) as pool:
        yield pool


def read(path: Path | bytes) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def assert_same(root: bytes, spec: Spec) -> None:
    """The tree below ``root`` is ``spec``, byte for byte."""
    if isinstance(spec, bytes):
        assert read(root) == spec
        assert bool(os.lstat(root).st_mode & 0o111) == spec.startswith(b"#!")
    elif isinstance(spec, str):
        assert os.readlink(root) == os.fsencode(spec)  # noqa: PTH115 (bytes)
        assert os.lstat(root).st_size == len(spec)
    else:
        assert sorted(os.listdir(root)) == sorted(spec)  # noqa: PTH208 (bytes)
        for name, child in spec.items():
            assert_same(root + b"/" + name, child)


def content(name: str, size: int) -> bytes:
    return hashlib.shake_128(name.encode()).digest(size)


def expect(code: int, path: Path) -> OSError:
    with pytest.raises(OSError) as caught:
        read(path)
    assert caught.value.errno == code
    return caught.value


def test_tree_is_served_byte_for_byte(mount: Mounted) -> None:
    spec: Spec = {
        b"bin": {b"sh": b"#!" + content("sh", 5_000_000), b"link": "sh", b"up": "../share/\udcff"},
        b"share": {b"\xff": b"not UTF-8", b"new\nline": b"", b"empty": {}, b"long" * 63: b"x" * 4096},
        b"deep": {b"a": {b"b": {b"c": {b"d": content("d", 4097)}}}},
    }
    name = mount.daemon.add("tree", spec)
    assert_same(os.fsencode(mount.path(name)), spec)
    assert_same(os.fsencode(mount.path(name)), spec)


@pytest.mark.parametrize("spec", [b"#! a file", "/nix/store/elsewhere"])
def test_store_path_may_be_a_file_or_a_link(mount: Mounted, spec: Spec) -> None:
    assert_same(os.fsencode(mount.path(mount.daemon.add("leaf", spec))), spec)


def test_hundred_thousand_names_are_listed_and_found(mount: Mounted) -> None:
    count = 100_000
    name = mount.daemon.add(
        "many", Directory(tuple((b"%06d" % i, RegularFile(i, False, 0)) for i in range(count)))
    )
    root = mount.path(name)
    with os.scandir(root) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries}
    assert sizes == {f"{i:06d}": i for i in range(count)}
    assert (root / "099999").stat().st_size == 99_999
    with pytest.raises(FileNotFoundError):
        (root / "100000").stat()


def test_content_beyond_four_gibibytes_is_read_from_its_place(mount: Mounted) -> None:
    offset, size = (5 << 30) + 123, (3 << 30) + 7
    name = mount.daemon.add("big", Directory(((b"data", RegularFile(size, False, offset)),)))
    number = mount.daemon.numbers[name]
    nar = mount.cache / nar_file(number)
    nar.parent.mkdir(parents=True)
    with open(nar, "wb") as out:
        out.truncate(offset + size)
        os.pwrite(out.fileno(), b"begin", offset)
        os.pwrite(out.fileno(), b"end", offset + size - 3)
    with open(mount.path(name) / "data", "rb") as file:
        assert file.read(6) == b"begin\0"
        file.seek(size - 4)
        assert file.read() == b"\0end"


def test_seeking_to_a_place_between_names_gives_an_error_and_no_garbage(mount: Mounted) -> None:
    name = mount.daemon.add("seek", {b"%d" % i: b"" for i in range(50)})
    script = (
        "import ctypes, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)\n"
        "os.lseek(fd, 37, os.SEEK_SET)\n"
        "buffer = ctypes.create_string_buffer(4096)\n"
        "got = ctypes.CDLL(None, use_errno=True).syscall(217, fd, buffer, 4096)\n"
        "print(got, ctypes.get_errno())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, mount.path(name)], capture_output=True, check=True, timeout=20
    )
    assert run.stdout.split() in ([b"-1", b"%d" % errno.EIO], [b"0", b"0"])


def test_slow_path_delays_no_other(mount: Mounted, pool: ThreadPoolExecutor) -> None:
    slow = mount.daemon.add("slow", {b"f": content("slow", 300_000)})
    fast = mount.daemon.add("fast", {b"f%d" % i: content(f"{i}", 50_000) for i in range(100)})
    (mount.path(slow) / "f").stat()
    mount.daemon.hold(mount.daemon.numbers[slow], store_name("unknown"))
    reads = [pool.submit(read, mount.path(slow) / "f") for _ in range(20)]
    lookup = pool.submit(os.path.exists, mount.path(store_name("unknown")))
    mount.daemon.wait_for(Kind.CONTENT)
    for i in range(100):
        assert read(mount.path(fast) / f"f{i}") == content(f"{i}", 50_000)
    assert not lookup.done()
    assert not any(r.done() for r in reads)
    mount.daemon.release()
    assert {r.result(20) for r in reads} == {content("slow", 300_000)}
    assert lookup.result(20) is False


def test_what_is_missing_is_asked_for_once_per_block(mount: Mounted, pool: ThreadPoolExecutor) -> None:
    name = mount.daemon.add("many", {b"%d" % i: content(f"{i}", 9000) for i in range(100)})
    number = mount.daemon.numbers[name]
    mount.path(name).stat()
    mount.daemon.hold(number)
    reads = [pool.submit(read, mount.path(name) / str(i)) for i in range(100)]
    mount.daemon.wait_for(Kind.CONTENT)
    while _waiting_readers(reads) < 100:
        pass
    mount.daemon.release()
    assert [r.result(20) for r in reads] == [content(f"{i}", 9000) for i in range(100)]
    assert 1 < mount.daemon.count(Kind.CONTENT) <= mount.daemon.sizes[number] // BLOCK + 1
    assert mount.daemon.count(Kind.LOOKUP) == 1


def _waiting_readers(reads: list[Future[bytes]]) -> int:
    return sum(r.running() for r in reads)


@pytest.mark.parametrize("what", ["lookup", "read"])
def test_interrupted_reader_returns_at_once(mount: Mounted, what: str) -> None:
    name = mount.daemon.add("held", {b"f": b"x"})
    if what == "read":
        (mount.path(name) / "f").stat()
    mount.daemon.hold(name, mount.daemon.numbers[name])
    reader = subprocess.Popen(["cat", mount.path(name) / "f"], stderr=subprocess.PIPE)
    mount.daemon.wait_for(Kind.LOOKUP if what == "lookup" else Kind.CONTENT)
    started = time.monotonic()
    reader.send_signal(signal.SIGINT)
    reader.communicate(timeout=10)
    assert reader.returncode == -signal.SIGINT
    assert time.monotonic() - started < 2
    mount.daemon.release()
    assert read(mount.path(name) / "f") == b"x"


def test_waiting_reads_continue_with_the_next_daemon(mount: Mounted, pool: ThreadPoolExecutor) -> None:
    name = mount.daemon.add("p", {b"f": content("p", 70_000)})
    other = mount.daemon.add("q", {b"f": b"q"})
    cached = mount.daemon.add("c", {b"f": b"c"}, whole=True)
    (mount.path(name) / "f").stat()
    (mount.path(cached) / "f").stat()
    mount.daemon.hold(mount.daemon.numbers[name], other)
    reads = [pool.submit(read, mount.path(n) / "f") for n in (name, other)]
    mount.daemon.wait_for(Kind.CONTENT)
    mount.daemon.wait_for(Kind.LOOKUP, 3)
    mount.daemon.stop()
    assert read(mount.path(cached) / "f") == b"c"
    mount.daemon.held.clear()
    mount.daemon.start()
    assert [r.result(20) for r in reads] == [content("p", 70_000), b"q"]


def test_daemon_may_come_later_than_the_first_reader(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    with mounted(tmp_path) as mount:
        name = mount.daemon.add("late", {b"f": b"late"})
        reading = pool.submit(read, mount.path(name) / "f")
        mount.daemon.start()
        assert reading.result(20) == b"late"


def test_wait_for_the_daemon_ends_with_an_error_and_a_story(tmp_path: Path) -> None:
    with mounted(tmp_path, miss_seconds=0.5) as mount:
        name = mount.daemon.add("never", {b"f": b""})
        started = time.monotonic()
        expect(errno.EIO, mount.path(name))
        assert 0.4 < time.monotonic() - started < 5
        mount.daemon.hold(name)
        mount.daemon.start()
        expect(errno.EIO, mount.path(name))
        mount.umount()
        assert mount.process.wait(10) == 0
        failures = mount.report()["failures"]
        assert isinstance(failures, list)
        assert name in failures[0]["where"]
        assert "no store daemon within 0.5 s" in failures[0]["why"]
        assert "did not get on with it for 0.5 s" in failures[1]["why"]


def test_signs_of_progress_keep_a_reader_waiting_beyond_the_limit(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    with mounted(tmp_path, miss_seconds=1.0) as mount:
        name = mount.daemon.add("slow", {b"f": b"slow"})
        mount.daemon.hold(name)
        mount.daemon.start()
        reading = pool.submit(read, mount.path(name) / "f")
        mount.daemon.wait_for(Kind.LOOKUP)
        for _ in range(12):
            with pytest.raises(TimeoutError):
                reading.result(0.25)
            mount.daemon.sign()
        mount.daemon.release()
        assert reading.result(20) == b"slow"


def test_daemons_refusal_reaches_the_reader_with_its_errno(mount: Mounted) -> None:
    name = mount.daemon.add("refused", {b"f": b"x"})
    mount.daemon.refuse[store_name("down")] = (errno.EIO, "all sources failed")
    expect(errno.EIO, mount.path(store_name("down")))
    mount.path(name).stat()
    mount.daemon.refuse[mount.daemon.numbers[name]] = (errno.ENOENT, "NAR is gone")
    expect(errno.EIO, mount.path(name) / "f")
    mount.daemon.refuse.clear()
    assert read(mount.path(name) / "f") == b"x"


def test_absent_path_is_asked_for_once_and_appears_when_announced(mount: Mounted) -> None:
    name = store_name("later")
    for _ in range(5):
        expect(errno.ENOENT, mount.path(name))
    assert mount.daemon.count(Kind.LOOKUP) == 1
    mount.daemon.add(name, {b"f": b"now"})
    expect(errno.ENOENT, mount.path(name))
    mount.daemon.notify(Kind.PRESENT, name.encode())
    _eventually(lambda: (mount.path(name) / "f").exists())
    assert read(mount.path(name) / "f") == b"now"


def test_absence_ends_with_its_time(mount: Mounted) -> None:
    mount.daemon.absent_ms = 50
    name = store_name("soon")
    expect(errno.ENOENT, mount.path(name))
    mount.daemon.add(name, b"now")
    _eventually(mount.path(name).exists)


def test_names_that_are_no_store_paths_never_reach_the_daemon(mount: Mounted) -> None:
    for name in (".git", "x", "0" * 32 + "-", "e" * 32 + "-name", ".links", "a" * 255):
        expect(errno.ENOENT, mount.path(name))
    assert mount.daemon.count(Kind.LOOKUP) == 0


def test_root_lists_as_empty(mount: Mounted) -> None:
    name = mount.daemon.add("there", b"x")
    assert read(mount.path(name)) == b"x"
    assert list(mount.root.iterdir()) == []
    assert mount.root.stat().st_mode & 0o7777 == 0o555


def test_quarantined_path_gives_errors_even_for_what_was_read_before(mount: Mounted) -> None:
    name = mount.daemon.add("bad", {b"f": b"tampered", b"g": b"tampered too"})
    number = mount.daemon.numbers[name]
    assert read(mount.path(name) / "f") == b"tampered"
    mount.daemon.refuse[name] = (errno.EIO, "quarantined")
    with open(mount.path(name) / "f", "rb") as still_open:
        (mount.cache / tree_file(number)).unlink()  # as the daemon does before the notice arrives
        mount.daemon.notify(Kind.QUARANTINED, request_wire.quarantined_body(number, name))
        _eventually(lambda: _errno_of(mount.path(name) / "f") == errno.EIO)
        with pytest.raises(OSError) as caught:
            os.pread(still_open.fileno(), 100, 0)
        assert caught.value.errno == errno.EIO
    assert _errno_of(mount.path(name) / "g") == errno.EIO


def test_quarantine_does_not_wait_behind_a_parked_lookup(mount: Mounted, pool: ThreadPoolExecutor) -> None:
    name = mount.daemon.add("bad", {b"f": b"tampered"})
    good = mount.daemon.add("good", b"good")
    assert read(mount.path(name) / "f") == b"tampered"
    mount.daemon.hold(store_name("held"))
    held = pool.submit(os.path.exists, mount.path(store_name("held")))
    mount.daemon.wait_for(Kind.LOOKUP, 2)
    mount.daemon.notify(Kind.QUARANTINED, request_wire.quarantined_body(mount.daemon.numbers[name], name))
    _eventually(lambda: _errno_of(mount.path(name) / "f") == errno.EIO)
    assert read(mount.path(good)) == b"good"
    assert not held.done()
    mount.daemon.release()
    assert held.result(20) is False


def test_a_path_that_is_known_as_a_directory_is_asked_for_more_once_somebody_looks_into_it(
    mount: Mounted,
) -> None:
    spec: Spec = {b"bin": {b"sh": b"#!sh"}, b"readme": b"x"}
    names = [mount.daemon.add(name, spec) for name in ("listed", "entered", "opened", "known")]
    mount.daemon.bare.update(names[:-1])
    listed, entered, opened, known = (mount.root / name for name in names)
    for path in (listed, entered, opened, known):
        assert stat.S_ISDIR(path.stat().st_mode)
        assert stat.S_ISDIR(path.stat().st_mode)
    bare, full = os.lstat(listed), os.lstat(known)
    same = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_mtime_ns", "st_blocks", "st_blksize")
    assert [getattr(bare, name) for name in same] == [getattr(full, name) for name in same]
    assert mount.daemon.count(Kind.TREE) == 0
    assert mount.daemon.count(Kind.LOOKUP) == 4
    assert sorted(child.name for child in listed.iterdir()) == ["bin", "readme"]
    assert not (entered / "not-there").exists()
    assert read(opened / "readme") == b"x"
    assert mount.daemon.count(Kind.TREE) == 3
    for path in (listed, entered, opened):
        assert_same(os.fsencode(path), spec)
    assert mount.daemon.count(Kind.TREE) == 3


def test_a_bare_directory_that_is_condemned_is_asked_for_anew(mount: Mounted) -> None:
    name = mount.daemon.add("liar", {b"x": b"y"})
    mount.daemon.bare.add(name)
    assert (mount.root / name).is_dir()
    old = mount.daemon.numbers[name]
    mount.daemon.bare.clear()
    mount.daemon.add("liar", b"a file after all", number=old + 100)
    mount.daemon.notify(Kind.QUARANTINED, request_wire.quarantined_body(old, name))
    eventually(lambda: (mount.root / name).is_file())
    assert read(mount.root / name) == b"a file after all"


def test_dropped_nar_is_asked_for_again(mount: Mounted) -> None:
    name = mount.daemon.add("p", {b"f": b"one", b"g": b"two"})
    number = mount.daemon.numbers[name]
    assert read(mount.path(name) / "f") == b"one"
    (mount.cache / nar_file(number)).unlink()
    mount.daemon.notify(Kind.DROPPED, request_wire.path_number_body(number))
    mount.daemon.notify(Kind.PRESENT, b"barrier")
    _eventually(lambda: mount.daemon.count(Kind.CONTENT) == 1)
    assert read(mount.path(name) / "g") == b"two"


def test_short_nar_file_gives_no_short_or_zero_read(mount: Mounted) -> None:
    name = mount.daemon.add("cut", {b"f": content("cut", 20_000)}, whole=True)
    number = mount.daemon.numbers[name]
    os.truncate(mount.cache / nar_file(number), 5000)
    assert read(mount.path(name) / "f") == content("cut", 20_000)
    assert mount.daemon.count(Kind.CONTENT) == 1


def test_damaged_tree_index_is_an_error(mount: Mounted) -> None:
    name = mount.daemon.add("damaged", {b"f": b"x"})
    number = mount.daemon.numbers[name]
    mount.daemon.trees[number] = mount.daemon.trees[number][:300]
    assert _errno_of(mount.path(name)) == errno.EIO
    assert (mount.cache / tree_file(number)).exists()


def test_growing_nar_is_read_as_far_as_it_is_ready(mount: Mounted, pool: ThreadPoolExecutor) -> None:
    a, b = content("a", 40_000), content("b", 40_000)
    name = mount.daemon.add("growing", {b"a": a, b"b": b})
    number = mount.daemon.numbers[name]
    middle = sorted(mount.daemon.contents[number])[1]
    state = {"end": middle}

    def ready(number: int, offset: int, size: int) -> tuple[Kind, bytes] | None:
        if offset + size > state["end"]:
            return None
        part = mount.cache / f"{nar_file(number)}.part"
        if not part.exists():
            mount.daemon.publish_nar(number, part=mount.daemon.sizes[number])
        inode = part.stat().st_ino
        return Kind.READY, request_wire.ready_body(number, 0, state["end"], whole=False, inode=inode)

    mount.daemon.ready = ready  # type: ignore[method-assign, assignment]
    mount.path(name).stat()
    assert read(mount.path(name) / "a") == a
    late = pool.submit(read, mount.path(name) / "b")
    mount.daemon.wait_for(Kind.CONTENT, 2)
    assert read(mount.path(name) / "a") == a
    mount.daemon.stop()
    state["end"] = mount.daemon.sizes[number]
    mount.daemon.start()
    assert late.result(20) == b


def test_programs_run_from_the_mount(mount: Mounted) -> None:
    name = mount.daemon.add("prog", {b"bin": {b"true": b"#!/bin/sh\nexit 7\n"}})
    # Not directly: subprocess may hold the interpreter lock until exec succeeded, and the stub daemon is a thread here.
    command = ["/bin/sh", "-c", f"exec {mount.path(name)}/bin/true"]
    assert subprocess.run(command, timeout=20, check=False).returncode == 7


def test_nothing_can_be_written(mount: Mounted) -> None:
    name = mount.daemon.add("ro", {b"f": b"x"})
    for action in (
        (mount.path(name) / "f").unlink,
        (mount.root / "new").mkdir,
        lambda: (mount.path(name) / "f").chmod(0o777),
        lambda: os.open(mount.path(name) / "f", os.O_WRONLY),
    ):
        with pytest.raises(OSError) as caught:
            action()
        assert caught.value.errno == errno.EROFS


def test_umount_ends_the_server_cleanly_and_the_report_tells_what_was_read(mount: Mounted) -> None:
    name = mount.daemon.add("read", {b"f": content("f", 100_000)})
    assert len(read(mount.path(name) / "f")) == 100_000
    mount.umount()
    assert mount.process.wait(10) == 0
    paths = mount.report()["paths"]
    assert isinstance(paths, dict)
    (row,) = paths.values()
    assert row["name"] == name
    assert row["bytes_read"] == 100_000
    assert row["reads"] >= 1
    assert row["waits"] == 2
    assert row["first_touch"] > 0


def test_killed_server_leaves_no_reader_hanging(mount: Mounted, pool: ThreadPoolExecutor) -> None:
    name = mount.daemon.add("held", {b"f": b"x"})
    mount.daemon.hold(name)
    reading = pool.submit(_errno_of, mount.path(name) / "f")
    mount.daemon.wait_for(Kind.LOOKUP)
    mount.process.kill()
    assert reading.result(10) in (errno.ENOTCONN, errno.ECONNABORTED)


def test_terminated_server_ends_with_success(mount: Mounted) -> None:
    mount.daemon.wait_for(Kind.HELLO)
    mount.process.terminate()
    assert mount.process.wait(10) == 0
    assert mount.report()["waiting"] == 0


def test_memory_stays_small_over_a_large_tree(tmp_path: Path) -> None:
    files = tuple((b"%04dx" % i + b"y" * 200, RegularFile(i, False, 0)) for i in range(1000))
    with mounted(tmp_path, limit=100) as mount:
        name = mount.daemon.add(
            "million", Directory(tuple((b"%04d" % i, Directory(files)) for i in range(300)))
        )
        mount.daemon.start()
        assert _walk(mount.path(name)) > 0
        for i in random.Random(1).sample(range(300_000), 20_000):
            os.lstat(mount.path(name) / f"{i // 1000:04d}" / (f"{i % 1000:04d}x" + "y" * 200))
        assert _peak_memory(mount) < 150 << 20


def _walk(root: Path) -> int:
    run = subprocess.run(["find", root, "-size", "+1"], stdout=subprocess.PIPE, check=True, timeout=90)
    return run.stdout.count(b"\n")


def _peak_memory(mount: Mounted) -> int:
    status = Path(f"/proc/{mount.process.pid}/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _errno_of(path: Path) -> int:
    try:
        read(path)
    except OSError as error:
        return error.errno or 0
    return 0


def _eventually(holds: object, seconds: float = 10) -> None:
    assert callable(holds)
    until = time.monotonic() + seconds
    pause = threading.Event()
    while not holds():
        assert time.monotonic() < until, "did not come true"
        pause.wait(0.01)
