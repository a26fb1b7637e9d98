"""One request in, one reply out. The path that every page of every file takes: mind each microsecond.

A ``Worker`` belongs to one thread: it has its own buffers and tallies, and shares everything else. Handlers are called
with (unique, node, request buffer, request length) and return a reply's bytes, or None: no reply wanted, or the request
was parked and will come back through ``handle`` once the daemon has answered.

I3: ``handle`` returns a reply for every request that wants one, or has parked it, whatever handlers raise.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable

from veneer.formats import fuse_wire as wire
from veneer.formats.request_wire import Kind
from veneer.formats.tree_index import (
    ATTR_AT,
    HEADER_SIZE,
    NAME_AT,
    NAME_LENGTH_AT,
    ROOT_NODE,
    VALID_SECONDS,
    TreeIndex,
    bare_root,
)
from veneer.model.errors import CacheError, FormatError, SourceError
from veneer.model.store_path import StorePath

from .content import Contents
from .misses import Misses, Parked
from .recording import Recording
from .session import Session, negotiate
from .stories import Stories
from .tally import Tally
from .trees import Trees

Reply = bytes | memoryview | tuple[bytes, memoryview] | None
Handler = Callable[[int, int, bytearray, int], Reply]

REQUEST_BUFFER = 1 << 16
READ_BUFFER = 1 << 20
MAX_OPCODE = 63

_out_header = wire.OUT_HEADER.pack
_out_header_into = wire.OUT_HEADER.pack_into
_preadv = os.preadv
# The same structs as in wire and tree_index, for the fields that the hot handlers need: unpacking less is faster.
_opcode_unique_node = struct.Struct("<4xIQQ").unpack_from
_offset_and_size = struct.Struct("<48xQI").unpack_from
"""Of a request with READ_IN."""
_kind_start_size = struct.Struct("<4xIQQ").unpack_from
_record = struct.Struct("<I").unpack_from
"""Of a row."""
_NOT_A_FILE = 3 << 24
_ATTR_VALID = VALID_SECONDS.to_bytes(8, "little") + bytes(8)

_ROOT_ATTR = wire.ATTR.pack(ROOT_NODE, 0, 0, 1, 1, 1, 0, 0, 0, 0o040555, 1, 0, 0, 0, 4096, 0)
_ABSENT_FOR_EVER = wire.ENTRY_OUT.pack(0, 0, VALID_SECONDS, 0, 0, 0, *(0,) * 16)

_READ_ONLY = (4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 47, 51)
"""SETATTR SYMLINK MKNOD MKDIR UNLINK RMDIR RENAME LINK WRITE SETXATTR REMOVEXATTR CREATE FALLOCATE RENAME2
COPY_FILE_RANGE TMPFILE. The mount itself is read only, so they do not come."""
_DONE = (18, 20, 29, 30, 38)
"""RELEASE FSYNC RELEASEDIR FSYNCDIR DESTROY: nothing to do, and that is done."""
_IOCTL = 39
_LENGTHS = {row.number: wire.IN_SIZE + row.request.size for row in wire.OPCODES if row.request is not None}


class Shared:
    """What all workers of one mount use together."""

    def __init__(
        self,
        cache_dirfd: int,
        trees: Trees,
        contents: Contents,
        misses: Misses,
        stories: Stories,
        tally: Tally,
        host_store: int | None = None,
        recording: Recording | None = None,
    ) -> None:
        self.cache_dirfd = cache_dirfd
        self.trees = trees
        self.contents = contents
        self.misses = misses
        self.stories = stories
        self.tally = tally
        self.host_store = host_store
        """The directory of the store that lies beneath ours in an overlay."""
        self.recording = recording
        """For a trace, when somebody wants one."""
        self.session: Session | None = None
        self.agreed: Callable[[Session], None] = _keep_to_oneself


def _keep_to_oneself(session: Session) -> None:
    """For a mount without successors."""


class Worker:
    """Answers requests on one thread."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._trees = shared.trees
        self._mapped = shared.trees.mapped
        self._contents = shared.contents
        self._open_nars = shared.contents.open
        self._buffer = memoryview(bytearray(wire.OUT_SIZE + READ_BUFFER))
        self._reads = shared.tally.of_thread()
        self._listed = shared.tally.listed
        self._again: Parked | None = None
        """The request being handled, when it was parked before."""
        unknown = self._refuse(errno.ENOSYS)
        handlers: list[Handler] = [unknown] * (MAX_OPCODE + 1)
        for number in _READ_ONLY:
            handlers[number] = self._refuse(errno.EROFS)
        for number in _DONE:
            handlers[number] = self._done
        for row in wire.OPCODES:
            if not row.answered:
                handlers[row.number] = self._silent
        handlers[_IOCTL] = self._refuse(errno.ENOTTY)
        handlers[wire.LOOKUP] = self._lookup
        handlers[wire.GETATTR] = self._getattr
        handlers[wire.READLINK] = self._readlink
        handlers[wire.OPEN] = self._open
        handlers[wire.OPENDIR] = self._opendir
        handlers[wire.READ] = self._read
        handlers[wire.READDIRPLUS] = self._readdirplus
        handlers[wire.READDIR] = self._readdir
        handlers[wire.STATFS] = self._statfs
        handlers[wire.INIT] = self._init
        handlers[wire.INTERRUPT] = self._interrupt
        if shared.recording is not None:
            handlers[wire.LOOKUP], handlers[wire.READ] = self._recorders(shared.recording)
        self._handlers = handlers

    # The loop.

    def serve(self, fd: int, stopped: Callable[[], bool]) -> None:
        """Reads and answers requests until unmounted (ENODEV) or told to stop. OSError when the device breaks.

        ``stopped`` is asked now and then; a thread that waits in read(2) answers one more batch before it notices.
        """
        request = bytearray(REQUEST_BUFFER)
        vector = [request]
        handlers = self._handlers
        readv, write, writev = os.readv, os.write, os.writev
        trees = self._trees
        while not stopped():
            for _ in range(trees.batch):
                try:
                    length = readv(fd, vector)
                except OSError as error:
                    if error.errno == errno.ENODEV:
                        return
                    if error.errno in (errno.ENOENT, errno.EAGAIN):  # aborted before we got it
                        continue
                    raise
                if length < 40:
                    return
                opcode, unique, node = _opcode_unique_node(request)
                try:
                    reply = handlers[opcode if opcode < 64 else 0](unique, node, request, length)
                except Exception as error:  # noqa: BLE001  (I3: whatever it was, the reader must not hang)
                    reply = self._failed(unique, opcode, node, error)
                if reply is None:
                    continue
                try:
                    if type(reply) is tuple:
                        writev(fd, reply)
                    else:
                        write(fd, reply)  # type: ignore[arg-type]
                except OSError as error:
                    if error.errno != errno.ENOENT:
                        self._not_taken(opcode, node, error)
            trees.relieve()

    def handle(self, parked: Parked) -> Reply:
        """A parked request again. The reply, or None when it was parked again. Does not raise."""
        self._again = parked
        request = parked.request
        opcode, unique, node = _opcode_unique_node(request)
        try:
            return self._handlers[opcode if opcode < 64 else 0](unique, node, request, len(request))
        except Exception as error:  # noqa: BLE001  (I3)
            return self._failed(unique, opcode, node, error)
        finally:
            self._again = None

    def _failed(self, unique: int, opcode: int, node: int, error: Exception) -> bytes:
        where = f"{_NAMES.get(opcode, opcode)} {self._shared.tally.describe(node)}"
        return wire.error_reply(unique, self._shared.stories.tell_error(error, where))

    def _not_taken(self, opcode: int, node: int, error: OSError) -> None:
        """The kernel refused a reply. On EINVAL and EFAULT it has ended the request with EIO itself."""
        if error.errno in (errno.ENODEV, errno.EPIPE, errno.ECONNRESET):  # unmounted meanwhile
            return
        if error.errno == errno.EFAULT:  # a mapped page is gone: the next request looks at the file anew
            self._mapped.drop(node >> 24)
        self._shared.stories.tell_error(error, f"reply to {_NAMES.get(opcode, opcode)}")

    # Names.

    def _lookup(self, unique: int, node: int, request: bytearray, length: int) -> Reply:
        if node == ROOT_NODE:
            return self._lookup_path(unique, request, length)
        number = node >> 24
        index = self._mapped.young.get(number) or self._trees.get(number)
        if index is None:
            return self._park_tree(unique, number, request, length)
        record = index.lookup(node & 0xFFFFFF, request[40 : length - 1])
        if record:
            return _out_header(144, 0, unique) + index.buffer[record : record + 128]
        return _out_header(144, 0, unique) + _ABSENT_FOR_EVER

    def _lookup_path(self, unique: int, request: bytearray, length: int) -> Reply:
        """A store path's own name."""
        name = bytes(request[wire.IN_SIZE : length - 1])
        trees = self._trees
        number = trees.numbers.get(name)
        if number is not None:
            index = trees.get(number)
            if index is None and number not in trees.directories:
                return self._park_tree(unique, number, request, length)
            self._shared.tally.touched(number, name)
            if index is None:
                return wire.reply(unique, bare_root(number))
            record = index.record(0)
            return wire.reply(unique, bytes(index.buffer[record : record + wire.ENTRY_OUT.size]))
        if not _is_store_path(name):
            return wire.reply(unique, _ABSENT_FOR_EVER)
        if name in trees.absent or self._has_host(name):
            return wire.error_reply(unique, errno.ENOENT)
        return self._park(unique, request, length, Kind.LOOKUP, name, name)

    def _has_host(self, name: bytes) -> bool:
        """Whether the store beneath ours has it, whole: then no source is asked, and none that fails can take it away.

        Asked anew for each LOOKUP, because the host's Nix adds and removes paths. One that is locked may be half there.
        """
        host = self._shared.host_store
        return host is not None and _exists(host, name) and not _exists(host, name + b".lock")

    def _getattr(self, unique: int, node: int, request: bytearray, length: int) -> Reply:
        if node == ROOT_NODE:
            return _out_header(120, 0, unique) + _ATTR_VALID + _ROOT_ATTR
        number = node >> 24
        index = self._mapped.young.get(number) or self._trees.get(number)
        entry = node & 0xFFFFFF
        if index is None:
            if entry == 0 and number in self._trees.directories:
                return _out_header(120, 0, unique) + _ATTR_VALID + bare_root(number)[ATTR_AT:]
            return self._park_tree(unique, number, request, length)
        if entry >= index.count:
            raise FormatError(f"entry {entry} of {index.count}", where="tree index")
        at = (_record(index.buffer, HEADER_SIZE + 32 * entry)[0] << 3) + ATTR_AT
        return _out_header(120, 0, unique) + _ATTR_VALID + index.buffer[at : at + 88]

    def _readlink(self, unique: int, node: int, request: bytearray, length: int) -> Reply:
        number = node >> 24
        index = self._index(number)
        if index is None:
            return self._park_tree(unique, number, request, length)
        return wire.reply(unique, index.target(node & 0xFFFFFF))

    # Directories.

    def _readdirplus(self, unique: int, node: int, request: bytearray, length: int) -> Reply:
        cookie, size = _offset_and_size(request)
        if node == ROOT_NODE:
            return wire.reply(unique, _root_listing(cookie, plus=True))
        number = node >> 24
        index = self._index(number)
        if index is None:
            return self._park_tree(unique, number, request, length)
        entry = node & 0xFFFFFF
        if entry == 0:
            self._listed.add(number)
        run = index.run(entry, cookie, size)
        return _out_header(16 + len(run), 0, unique), run

    def _readdir(self, unique: int, node: int, request: bytearray, length: int) -> Reply:
        """READDIRPLUS without the attributes; the kernel asks when it was told to choose, or has no memory."""
        cookie, size = _offset_and_size(request)
        if node == ROOT_NODE:
            return wire.reply(unique, _root_listing(cookie, plus=False))
        number = node >> 24
        index = self._index(number)
        if index is None:
            return self._park_tree(unique, number, request, length)
        if node & 0xFFFFFF == 0:
            self._listed.add(number)
        # A record without its 128 bytes of attributes is a dirent. Names are short: 4 x size holds more than fits.
        run = index.run(node & 0xFFFFFF, cookie, max(4 * size, 1024))
        out = bytearray()
        at = 0
        while at < len(run):
            end = at + (NAME_AT + run[at + NAME_LENGTH_AT] + 7 & ~7)
            dirent = run[at + 128 : end]
            if len(out) + len(dirent) > size:
                break
            out += dirent
            at = end
        return wire.reply(unique, bytes(out))

    # Content.

    def _read(self, unique: int, node: int, request: bytearray, length: int) -> Reply:
        offset, size = _offset_and_size(request)
        number = node >> 24
        index = self._mapped.young.get(number) or self._trees.get(number)
        if index is None:
            return self._park_tree(unique, number, request, length)
        entry = node & 0xFFFFFF
        if entry >= index.count:
            raise FormatError(f"entry {entry} of {index.count}", where="tree index")
        kind, start, file_size = _kind_start_size(index.buffer, HEADER_SIZE + 32 * entry)
        if kind >= _NOT_A_FILE:
            raise FormatError(f"entry {entry} is not a file", where="tree index")
        if offset >= file_size:
            return wire.reply(unique)
        if offset + size > file_size:
            size = file_size - offset
        if size > READ_BUFFER:
            size = READ_BUFFER
        nar = self._open_nars.young.get(number) or self._contents.get(number)
        start += offset
        if nar is not None and (nar.whole or nar.covers(start, start + size)):
            buffer = self._buffer
            into = buffer[16 : 16 + size]
            try:
                got = _preadv(nar.fd, [into], start, nar.flags)
            except OSError as error:
                got = nar.refused(error)
            if got == size or nar.finish(into, start, got) == size:
                _out_header_into(buffer, 0, 16 + size, 0, unique)
                reads = self._reads.get(number)
                if reads is None:
                    reads = self._reads[number] = [0, 0]
                reads[0] += 1
                reads[1] += size
                return buffer[: 16 + size]
            # Shorter than the tree says: the daemon shall look at it, once.
            self._contents.drop(number)
            self._shared.stories.tell(
                errno.EIO,
                self._shared.tally.describe(node),
                "NAR file ends early; asked the daemon for it again",
            )
        return self._park_content(unique, request, length, number, start, size)

    def _recorders(self, recording: Recording) -> tuple[Handler, Handler]:
        """LOOKUP and READ, noted as well."""
        numbers = self._trees.numbers

        def lookup(unique: int, node: int, request: bytearray, length: int) -> Reply:
            reply = self._lookup(unique, node, request, length)
            if node == ROOT_NODE:
                name = bytes(request[wire.IN_SIZE : length - 1])
                number = numbers.get(name)
                if number is not None:
                    recording.looked_up(number, name)
            return reply

        def read(unique: int, node: int, request: bytearray, length: int) -> Reply:
            recording.read(node, *_offset_and_size(request))
            return self._read(unique, node, request, length)

        return lookup, read

    # The file system as a whole.

    def _init(self, unique: int, node: int, request: bytearray, length: int) -> Reply:
        body, session = negotiate(bytes(request[:length]))
        if session is not None:
            self._shared.session = session
            self._shared.agreed(session)
        return wire.reply(unique, body)

    def _statfs(self, unique: int, node: int, request: bytearray, length: int) -> Reply:
        """The cache's file system, with nothing free: ours is read only."""
        cache = os.fstatvfs(self._shared.cache_dirfd)
        body = wire.STATFS_OUT.pack(
            cache.f_blocks, 0, 0, cache.f_files, 0, cache.f_bsize, 255, cache.f_frsize, 0
        )
        return wire.reply(unique, body)

    def _open(self, unique: int, node: int, request: bytearray, length: int) -> Reply:
        """ENOSYS means: do not ask again, and keep the pages. Kernels that do not offer that get the same by flag."""
        session = self._shared.session
        if session is None or session.no_open:
            return wire.error_reply(unique, errno.ENOSYS)
        return wire.reply(unique, wire.OPEN_OUT.pack(0, wire.FOPEN_KEEP_CACHE, 0))

    def _opendir(self, unique: int, node: int, request: bytearray, length: int) -> Reply:
        session = self._shared.session
        if session is None or session.no_opendir:
            return wire.error_reply(unique, errno.ENOSYS)
        return wire.reply(unique, wire.OPEN_OUT.pack(0, wire.FOPEN_KEEP_CACHE | wire.FOPEN_CACHE_DIR, 0))

    def _interrupt(self, unique: int, node: int, request: bytearray, length: int) -> Reply:
        """The caller of a request got a signal. A parked request ends with EINTR; its download goes on."""
        (target,) = wire.INTERRUPT_IN.unpack_from(request, wire.IN_SIZE)
        target = self._shared.misses.interrupt(target)
        return None if target is None else wire.error_reply(target, errno.EINTR)

    def _done(self, unique: int, node: int, request: bytearray, length: int) -> Reply:
        return wire.reply(unique)

    def _silent(self, unique: int, node: int, request: bytearray, length: int) -> Reply:
        return None

    def _refuse(self, code: int) -> Handler:
        def refuse(unique: int, node: int, request: bytearray, length: int) -> Reply:
            return _out_header(16, -code, unique)

        return refuse

    # What is not there.

    def _index(self, number: int) -> TreeIndex | None:
        return self._mapped.young.get(number) or self._trees.get(number)

    def _park_tree(self, unique: int, number: int, request: bytearray, length: int) -> Reply:
        if number == 0:
            raise FormatError("node of no store path", where="FUSE")
        return self._park(unique, request, length, Kind.TREE, number, number)

    def _park_content(
        self, unique: int, request: bytearray, length: int, number: int, offset: int, size: int
    ) -> Reply:
        if number in self._trees.quarantined:
            raise SourceError("quarantined: its content is not what was signed", where=f"path {number}")
        return self._park(unique, request, length, Kind.CONTENT, number, (number, offset, size))

    def _park(
        self, unique: int, request: bytearray, length: int, kind: Kind, key: int | bytes,
        what: bytes | int | tuple[int, int, int],
    ) -> Reply:  # fmt: skip
        parked = self._again
        if parked is None:
            if length < _LENGTHS.get(_opcode_unique_node(request)[0], 0):
                raise FormatError(f"request of {length} bytes", where="FUSE")
            parked = Parked(unique, request[:length])
        elif parked.asked.get(kind, 0) >= 2:
            raise CacheError("the daemon says that it is there, and it is not", where=f"{kind.name} {key!r}")
        if not self._shared.misses.park(parked, kind, key, what):
            return wire.error_reply(unique, errno.EINTR)
        return None


_NAMES = {row.number: row.name for row in wire.OPCODES}


def _is_store_path(name: bytes) -> bool:
    try:
        StorePath.parse(name.decode("ascii"))
    except (FormatError, UnicodeDecodeError):
        return False
    return True


def _exists(directory: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return True


def _root_listing(cookie: int, *, plus: bool) -> bytes:
    """The mount's root seems empty: a store path is there once its name is asked for."""
    out = b""
    for place, name in enumerate((b".", b".."), start=1):
        if cookie < place:
            out += (
                bytes(128 if plus else 0)
                + wire.DIRENT.pack(ROOT_NODE, place, len(name), 4)
                + name.ljust(8, b"\0")
            )
    return out
