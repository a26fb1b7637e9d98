"""Requests and replies of a worker, with a socket pair for /dev/fuse and no daemon."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.stub_daemon import GENERATION, Spec, StubDaemon, store_name
from veneer.formats import fuse_wire as wire
from veneer.formats.request_wire import Kind
from veneer.formats.tree_index import HEADER_SIZE, NAME_AT, ROW, nar_file, node_id, tree_file
from veneer.mount.server import MountServer
from veneer.mount.session import MAX_PAGES, Session, negotiate
from veneer.mount.trees import Trees

NUMBER = 0x4000_0000
SPEC: Spec = {b"bin": {b"sh": b"#!sh"}, b"link": "bin/sh", b"readme": b"x" * 5000}


class Kernel:
    """The other end of /dev/fuse: datagrams keep requests and replies apart, as the device does."""

    def __init__(self, cache: Path, **options: float) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(10)
        self.socket = ours
        self._theirs = theirs
        self._dirfd = os.open(cache, os.O_RDONLY | os.O_DIRECTORY)
        self.server = MountServer(theirs.fileno(), self._dirfd, None, threads=1, **options)  # type: ignore[arg-type]
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()
        self._unique = 0

    def send(self, opcode: int, node: int, body: bytes = b"", unique: int = 0) -> int:
        self._unique += 2
        unique = unique or self._unique
        self.socket.send(wire.IN_HEADER.pack(40 + len(body), opcode, unique, node, 0, 0, 0, 0, 0) + body)
        return unique

    def receive(self) -> tuple[int, int, bytes]:
        """(unique, errno, body)."""
        data = self.socket.recv(1 << 21)
        length, error, unique = wire.OUT_HEADER.unpack_from(data)
        assert length == len(data)
        return unique, -error, data[16:]

    def ask(self, opcode: int, node: int, body: bytes = b"") -> tuple[int, bytes]:
        """(errno, body)."""
        sent = self.send(opcode, node, body)
        unique, error, answer = self.receive()
        assert unique == sent
        return error, answer

    def close(self) -> None:
        self.socket.close()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._theirs.close()
        os.close(self._dirfd)


@pytest.fixture
def store(tmp_path: Path) -> StubDaemon:
    """Not started: a cache directory with one whole path."""
    store = StubDaemon(tmp_path)
    store.add("hello", SPEC, number=NUMBER, whole=True)
    return store


@pytest.fixture
def kernel(store: StubDaemon) -> Iterator[Kernel]:
    kernel = Kernel(store.cache, miss_seconds=5.0)
    yield kernel
    kernel.close()


def read_in(offset: int, size: int) -> bytes:
    return wire.READ_IN.pack(0, offset, size, 0, 0, 0, 0)


def test_lookup_getattr_and_read_are_answered_from_the_files(kernel: Kernel) -> None:
    error, entry = kernel.ask(wire.LOOKUP, node_id(NUMBER, 0), b"readme\0")
    assert error == 0
    node = wire.ENTRY_OUT.unpack(entry)[0]
    error, attr = kernel.ask(wire.GETATTR, node, wire.GETATTR_IN.pack(0, 0, 0))
    assert error == 0
    assert attr[16:] == entry[40:]
    assert kernel.ask(wire.READ, node, read_in(0, 8192)) == (0, b"x" * 5000)
    assert kernel.ask(wire.READ, node, read_in(4096, 4096)) == (0, b"x" * 904)
    assert kernel.ask(wire.READ, node, read_in(8192, 4096)) == (0, b"")


def test_content_that_is_not_in_memory_is_waited_for(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    _, entry = kernel.ask(wire.LOOKUP, node_id(NUMBER, 0), b"readme\0")
    node = wire.ENTRY_OUT.unpack(entry)[0]
    nothing, part, unsupported = errno.EAGAIN, 0, errno.EOPNOTSUPP
    flags_seen = []

    def at_once(answer: int) -> Callable[[int, list[memoryview], int, int], int]:
        def preadv(fd: int, into: list[memoryview], start: int, flags: int) -> int:
            flags_seen.append(flags)
            if answer and flags:
                raise OSError(answer, os.strerror(answer))
            return os.preadv(fd, [into[0][:1000]] if flags else into, start)

        return preadv

    for answer in (nothing, part, unsupported, nothing):
        monkeypatch.setattr("veneer.mount.dispatch._preadv", at_once(answer))
        assert kernel.ask(wire.READ, node, read_in(0, 8192)) == (0, b"x" * 5000)
        assert kernel.ask(wire.READ, node, read_in(4096, 4096)) == (0, b"x" * 904)
    # A file system that cannot read without waiting is asked once.
    assert [bool(flags) for flags in flags_seen] == [True] * 5 + [False] * 3


def test_read_error_of_the_cache_is_the_readers(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    _, entry = kernel.ask(wire.LOOKUP, node_id(NUMBER, 0), b"readme\0")

    def broken(fd: int, into: list[memoryview], start: int, flags: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("veneer.mount.dispatch._preadv", broken)
    assert kernel.ask(wire.READ, wire.ENTRY_OUT.unpack(entry)[0], read_in(0, 8192)) == (errno.EIO, b"")


def test_absent_name_is_a_negative_entry_with_a_time(kernel: Kernel) -> None:
    error, entry = kernel.ask(wire.LOOKUP, node_id(NUMBER, 0), b"nothing\0")
    assert error == 0
    node, _, valid, *_ = wire.ENTRY_OUT.unpack(entry)
    assert (node, valid > 1 << 30) == (0, True)


def test_a_bare_directory_has_attributes_and_all_else_waits_for_its_tree(
    store: StubDaemon, kernel: Kernel
) -> None:
    number = NUMBER + 1
    name = store.add("bare", SPEC, number=number)
    store.bare.add(name)
    store.start()
    try:
        error, entry = kernel.ask(wire.LOOKUP, 1, name.encode() + b"\0")
        assert (error, wire.ENTRY_OUT.unpack(entry)[0]) == (0, node_id(number, 0))
        getattr_in = wire.GETATTR_IN.pack(0, 0, 0)
        error, attr = kernel.ask(wire.GETATTR, node_id(number, 0), getattr_in)
        assert (error, attr[16:]) == (0, entry[40:])
        assert store.count(Kind.TREE) == 0
        error, below = kernel.ask(wire.GETATTR, node_id(number, 1), getattr_in)
        assert (error, store.count(Kind.TREE)) == (0, 1)
        assert below != attr
        assert kernel.ask(wire.GETATTR, node_id(number, 0), getattr_in) == (0, attr)
    finally:
        store.stop()


def test_what_was_known_of_paths_ends_with_their_cache(tmp_path: Path) -> None:
    dirfd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        trees = Trees(dirfd)
        trees.change_generation(GENERATION)
        trees.numbers.put(b"name", NUMBER)
        trees.directories.put(NUMBER, True)
        assert trees.change_generation(GENERATION) == []
        assert NUMBER in trees.directories
        assert trees.change_generation(GENERATION[::-1]) == [b"name"]
        assert NUMBER not in trees.directories
        trees.directories.put(NUMBER, True)
        trees.forget(NUMBER, b"name")
        assert NUMBER not in trees.directories
    finally:
        os.close(dirfd)


def test_link_gives_its_target(kernel: Kernel) -> None:
    _, entry = kernel.ask(wire.LOOKUP, node_id(NUMBER, 0), b"link\0")
    assert kernel.ask(wire.READLINK, wire.ENTRY_OUT.unpack(entry)[0]) == (0, b"bin/sh")


def test_plain_listing_has_the_names_of_the_full_one(kernel: Kernel) -> None:
    root = node_id(NUMBER, 0)
    for opcode, extra in ((wire.READDIR, 0), (wire.READDIRPLUS, 128)):
        names = []
        cookie = 0
        while True:
            error, body = kernel.ask(opcode, root, read_in(cookie, 4096 if extra else 64))
            assert error == 0
            if not body:
                break
            at = 0
            while at < len(body):
                _, cookie, length, _ = wire.DIRENT.unpack_from(body, at + extra)
                names.append(body[at + extra + 24 : at + extra + 24 + length])
                at += extra + (24 + length + 7 & ~7)
        assert names == [b".", b"..", b"bin", b"link", b"readme"], opcode
    assert NAME_AT == 152


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["OPEN", "OPENDIR", "GETXATTR", "LISTXATTR", "FLUSH", "ACCESS", "LSEEK", "STATX", "POLL", "BMAP"], errno.ENOSYS),
        (["WRITE", "SETATTR", "UNLINK", "MKDIR", "RENAME2", "CREATE", "TMPFILE", "SETXATTR"], errno.EROFS),
        (["IOCTL"], errno.ENOTTY),
        (["RELEASE", "RELEASEDIR", "DESTROY"], 0),
    ],
)  # fmt: skip
def test_what_we_do_not_do_has_the_errno_that_the_kernel_expects(
    kernel: Kernel, names: list[str], code: int
) -> None:
    numbers = {row.name: row.number for row in wire.OPCODES}
    for name in names:
        assert kernel.ask(numbers[name], node_id(NUMBER, 0), bytes(64)) == (code, b""), name


@pytest.mark.parametrize("opcode", [0, 7, 19, 53, 63, 64, 4096, 0xFFFFFFFF])
def test_unknown_opcodes_are_answered(kernel: Kernel, opcode: int) -> None:
    assert kernel.ask(opcode, 1, bytes(100)) == (errno.ENOSYS, b"")


def test_forgets_get_no_reply(kernel: Kernel) -> None:
    kernel.send(wire.FORGET, node_id(NUMBER, 0), wire.FORGET_IN.pack(1))
    kernel.send(wire.BATCH_FORGET, 0, wire.BATCH_FORGET_IN.pack(0, 0))
    assert kernel.ask(wire.STATFS, 1)[0] == 0


@pytest.mark.parametrize("entry", [0, 1, 77, 0xFFFFFF])
@pytest.mark.parametrize("opcode", [wire.READ, wire.READLINK, wire.READDIRPLUS, wire.GETATTR])
def test_impossible_requests_are_answered_and_serving_goes_on(
    kernel: Kernel, opcode: int, entry: int
) -> None:
    error, _ = kernel.ask(opcode, node_id(NUMBER, entry), read_in(0, 4096))
    assert error in (0, errno.EIO)
    error, _ = kernel.ask(wire.READ, 2, read_in(0, 4096))
    assert error == errno.EIO
    assert kernel.ask(wire.STATFS, 1)[0] == 0
    assert kernel.server.report()["failure_count"] >= 1


@pytest.mark.parametrize("length", [40, 43, 79])
@pytest.mark.parametrize("opcode", [wire.READ, wire.READDIR, wire.READDIRPLUS])
def test_a_request_cut_short_is_refused_before_it_waits(kernel: Kernel, opcode: int, length: int) -> None:
    assert kernel.ask(opcode, node_id(99, 0), bytes(length - wire.IN_SIZE)) == (errno.EIO, b"")
    assert kernel.server.report()["waiting"] == 0


def test_numbers_of_a_damaged_tree_leave_nothing_waiting(store: StubDaemon) -> None:
    tree = bytearray((store.cache / tree_file(NUMBER)).read_bytes())
    kind = 1 << 24
    for entry in range(4):
        ROW.pack_into(tree, HEADER_SIZE + ROW.size * entry, 0, kind, (1 << 64) - 1, 1 << 63, 0, 0)
    (store.cache / tree_file(NUMBER)).write_bytes(tree)
    (store.cache / nar_file(NUMBER)).unlink()
    kernel = Kernel(store.cache, miss_seconds=5.0)
    try:
        assert kernel.ask(wire.READ, node_id(NUMBER, 0), read_in(4096, 4096)) == (errno.EIO, b"")
        assert kernel.server.report()["waiting"] == 0
    finally:
        kernel.close()


def test_resent_request_is_answered_under_the_same_unique(kernel: Kernel) -> None:
    sent = kernel.send(wire.STATFS, 1, unique=wire.RESENT | 44)
    assert kernel.receive()[0] == sent


def test_interrupt_ends_a_parked_request_and_no_other(kernel: Kernel) -> None:
    first = kernel.send(wire.LOOKUP, 1, store_name("a").encode() + b"\0")
    second = kernel.send(wire.LOOKUP, 1, store_name("a").encode() + b"\0")
    kernel.send(wire.INTERRUPT, 0, wire.INTERRUPT_IN.pack(first), unique=first | 1)
    assert kernel.receive() == (first, errno.EINTR, b"")
    kernel.send(wire.INTERRUPT, 0, wire.INTERRUPT_IN.pack(second), unique=second | 1)
    assert kernel.receive() == (second, errno.EINTR, b"")
    assert kernel.server.report()["waiting"] == 0


def test_interrupt_that_overtakes_its_request_is_not_lost(kernel: Kernel) -> None:
    kernel.send(wire.INTERRUPT, 0, wire.INTERRUPT_IN.pack(1000), unique=1001)
    kernel.send(wire.LOOKUP, 1, store_name("a").encode() + b"\0", unique=1000)
    assert kernel.receive() == (1000, errno.EINTR, b"")


def test_tree_of_another_cache_is_refused(store: StubDaemon) -> None:
    store.generation = b"made anew, again"
    store.start()
    kernel = Kernel(store.cache)
    try:
        error, _ = kernel.ask(wire.LOOKUP, 1, store_name("new").encode() + b"\0")  # connected after that
        assert error == errno.ENOENT
        assert kernel.ask(wire.GETATTR, node_id(NUMBER, 0), bytes(16))[0] == errno.EIO
        assert store.generation != GENERATION
    finally:
        kernel.close()
        store.stop()


def test_init_is_answered_with_what_both_sides_know() -> None:
    offered = 0xFFFFFFFF
    request = wire.IN_HEADER.pack(104, wire.INIT, 2, 0, 0, 0, 0, 0, 0)
    body = wire.INIT_IN.pack(7, 45, 131072, offered, 0xFFFFFFFF)
    reply, session = negotiate(request + body)
    assert session is not None
    assert session.no_open
    assert session.no_opendir
    assert session.can_resend
    fields = wire.INIT_OUT.unpack(reply)
    assert fields[:2] == (7, 45)
    assert fields[3] | fields[10] << 32 == session.flags
    assert fields[8] == MAX_PAGES
    assert Session.from_json(session.to_json()) == session


def test_short_init_of_an_old_kernel_is_understood() -> None:
    request = wire.IN_HEADER.pack(56, wire.INIT, 2, 0, 0, 0, 0, 0, 0) + struct.pack(
        "<IIII", 7, 31, 131072, 1 << 17
    )
    _, session = negotiate(request)
    assert session is not None
    assert session.no_open
    assert not session.can_resend
