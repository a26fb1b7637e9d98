"""Target for the mount server's dispatch: a worker with a socket for /dev/fuse, files in memory, and no daemon.

The input is requests one after the other; where their first field is no length that can be, the rest is one request. Must hold: each
request that wants a reply gets one, at once or after it was parked and asked for in vain; replies are whole, no longer than
asked for, and name their request; what is told of failures are our own errors, not the interpreter's.
"""

from __future__ import annotations

import functools
import mmap
import os
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from veneer.formats import fuse_wire as wire
from veneer.formats import nar, touches, tree_index
from veneer.formats.tree_index import node_id
from veneer.model.errors import FormatError, VeneerError
from veneer.model.store_path import StorePath
from veneer.mount.content import Contents, Nar
from veneer.mount.dispatch import Reply, Shared, Worker
from veneer.mount.misses import Misses
from veneer.mount.recording import Recording
from veneer.mount.session import Session
from veneer.mount.stories import Stories
from veneer.mount.tally import Tally
from veneer.mount.trees import Trees

NUMBER, UNREAD = 7, 8
"""Path numbers: one with its NAR, one whose content is not there."""
NAME = b"0" * 32 + b"-tree"
_NAR = Path(__file__).resolve().parent.parent / "golden/outputs.nar"
_SILENT = {row.number for row in wire.OPCODES if not row.answered}
_RESENT = wire.RESENT
_MAX_REQUESTS = 40


class Strict(Stories):
    """Of failures with an intact cache."""

    def tell_error(self, error: BaseException, where: str) -> int:
        assert isinstance(error, VeneerError), f"{type(error).__name__} in {where}: {error}"
        return super().tell_error(error, where)


class Files:
    """What all inputs read: two trees, one NAR, an empty cache directory that is gone already."""

    def __init__(self) -> None:
        data = _NAR.read_bytes()
        tree = nar.tree_of_nar([data])
        self.indexes = {}
        for number in (NUMBER, UNREAD):
            made = tree_index.encode_tree(
                tree, path_number=number, generation=bytes(16), nar_hash=bytes(32), nar_size=len(data)
            )
            mapping = mmap.mmap(-1, len(made))
            mapping[:] = bytes(made)
            self.indexes[number] = tree_index.TreeIndex(mapping)
        fd = os.memfd_create("nar")
        os.write(fd, data)
        self.nar = Nar(fd, whole=True)
        directory = tempfile.mkdtemp()
        self.dirfd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        Path(directory).rmdir()
        self.notes = os.memfd_create("notes", os.MFD_CLOEXEC)


@functools.cache
def files() -> Files:
    return Files()


class Mount:
    """A worker and the kernel's end of its device."""

    def __init__(self, damaged: Sequence[tree_index.TreeIndex] = ()) -> None:
        """``damaged``: in the place of the intact trees."""
        made = files()
        trees, contents, tally = Trees(made.dirfd), Contents(made.dirfd), Tally()
        stories = Stories() if damaged else Strict()
        for number, index in made.indexes.items():
            trees.mapped.put(number, index)
        for index in damaged:
            trees.mapped.put(index.number, index)
        contents.open.put(NUMBER, made.nar)
        trees.numbers.put(NAME, NUMBER)
        trees.absent.put(b"2" * 32 + b"-absent", 100)
        trees.batch = 1
        os.ftruncate(made.notes, 0)
        os.lseek(made.notes, 0, os.SEEK_SET)
        self.misses = Misses(made.dirfd, None, trees, contents, stories, tally)
        recording = Recording(made.notes)
        shared = Shared(made.dirfd, trees, contents, self.misses, stories, tally, recording=recording)
        shared.agreed = _can_be_handed_over
        self.worker = Worker(shared)
        self.tally = tally

    def ask(self, requests: list[bytes]) -> Iterator[bytes]:
        """The replies, of parked requests last."""
        device, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with device, kernel:
            kernel.setblocking(False)
            device.setblocking(False)
            for request in requests:
                kernel.send(request)
                turns = iter((False, True))
                self.worker.serve(device.fileno(), lambda turns=turns: next(turns))  # type: ignore[misc]
                try:
                    yield kernel.recv(1 << 21)
                except BlockingIOError:
                    continue
        for _ in range(
            2 * len(requests) + 2
        ):  # of those that wait for one answer, one gives up after each second one
            for parked in self.misses._take(lambda _: True):
                if (reply := self.worker.handle(parked)) is not None:
                    yield _joined(reply)
        assert self.misses.waiting() == 0


def run_damaged_mount(data: bytes) -> None:
    """The input begins with what replaces the rows of the trees, behind its length. Answers may be wrong, and must come."""
    length = 16 * (data[0] if data else 0)
    rows, requests = data[1 : 1 + length], data[1 + length :]
    damaged = []
    for index in files().indexes.values():
        mapping = mmap.mmap(-1, len(index.buffer))
        mapping[:] = index.buffer[:]
        end = min(len(mapping), tree_index.HEADER_SIZE + len(rows))
        mapping[tree_index.HEADER_SIZE : end] = rows[: end - tree_index.HEADER_SIZE]
        damaged.append(tree_index.TreeIndex(mapping))
    run_fuse_requests(requests, damaged)


def run_fuse_requests(data: bytes, damaged: Sequence[tree_index.TreeIndex] = ()) -> None:
    requests = list(split(data))
    if not requests:
        raise FormatError("no request")
    mount = Mount(damaged)
    wanted: Counter[int] = Counter()
    most: dict[int, int] = {}
    for request in requests:
        _, opcode, unique, *_ = wire.IN_HEADER.unpack_from(request)
        if opcode not in _SILENT:
            wanted[unique & ~_RESENT] += 1
            most[unique & ~_RESENT] = max(most.get(unique & ~_RESENT, 0), _most(opcode, request))
    replied: Counter[int] = Counter()
    for reply in mount.ask(requests):
        length, error, unique = wire.OUT_HEADER.unpack_from(reply)
        unique &= ~_RESENT
        assert -4096 < error <= 0
        assert not error or length == wire.OUT_SIZE
        assert damaged or length == len(reply)  # the kernel refuses others, and ends the request itself
        assert damaged or length - wire.OUT_SIZE <= most[unique]
        replied[unique] += 1
    assert replied.keys() == wanted.keys()
    for unique, count in replied.items():  # one that was sent again while it waited is answered once
        assert 1 <= count <= wanted[unique]
    mount.tally.report()
    list(touches.parse(os.pread(files().notes, touches.MAX_SIZE, 0)))


def split(data: bytes) -> Iterator[bytes]:
    for _ in range(_MAX_REQUESTS):
        length = int.from_bytes(data[:4], "little")
        if not wire.IN_SIZE <= length <= len(data):
            length = len(data)
        if length < wire.IN_SIZE:
            return
        yield data[:length]
        data = data[length:]


def _most(opcode: int, request: bytes) -> int:
    """Bytes that a reply may have after its header. The kernel asks for a page of names at least."""
    if (
        opcode not in (wire.READ, wire.READDIR, wire.READDIRPLUS)
        or len(request) < wire.IN_SIZE + wire.READ_IN.size
    ):
        return 4096
    size = int(wire.READ_IN.unpack_from(request, wire.IN_SIZE)[2])
    return size if opcode == wire.READ else max(4096, size)


def _joined(reply: Reply) -> bytes:
    return b"".join(reply) if isinstance(reply, tuple) else bytes(reply or b"")


def _can_be_handed_over(session: Session) -> None:
    assert Session.from_json(session.to_json()) == session


def _requests() -> Iterator[bytes]:
    def request(opcode: int, node: int, body: bytes, unique: int) -> bytes:
        return wire.IN_HEADER.pack(40 + len(body), opcode, unique, node, 0, 0, 0, 0, 0) + body

    root, top, unread = wire.ROOT_NODE, node_id(NUMBER, 0), node_id(UNREAD, 0)
    read = wire.READ_IN.pack(0, 0, 4096, 0, 0, 0, 0)
    asked = [
        (wire.INIT, 0, wire.INIT_IN.pack(7, 45, 1 << 17, 0xFFFFFFFF, 0xFFFFFFFF)),
        (wire.LOOKUP, root, NAME + b"\0"),
        (wire.LOOKUP, root, b"1" * 32 + b"-other\0"),
        (wire.LOOKUP, root, b"2" * 32 + b"-absent\0"),
        (wire.LOOKUP, top, b"bin\0"),
        (wire.GETATTR, root, bytes(16)),
        (wire.GETATTR, top, bytes(16)),
        (wire.STATFS, root, b""),
        (wire.FORGET, top, bytes(8)),
        (wire.INTERRUPT, 0, (6).to_bytes(8, "little")),
        (wire.OPEN, top, bytes(8)),
        (wire.OPENDIR, top, bytes(8)),
        *((opcode, node, read) for opcode in (wire.READDIR, wire.READDIRPLUS) for node in (root, top)),
        *((opcode, node + entry, read)
          for opcode in (wire.READ, wire.READLINK)
          for node in (top, unread, node_id(99, 0)) for entry in range(3)),
        (39, top, bytes(32)),
        (63, top, b""),
    ]  # fmt: skip
    made = [request(*row, 2 * unique) for unique, row in enumerate(asked, start=1)]
    yield from made
    yield b"".join(made[:20])
    yield b"".join(made[12:])


REQUESTS = tuple(_requests())
DAMAGED = tuple(bytes((count,)) + bytes(range(16)) * count + REQUESTS[-1] for count in (1, 4))
assert StorePath.parse(NAME.decode())
