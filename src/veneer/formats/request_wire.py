"""The request protocol between a client (mount server, command line) and the store daemon.

Our own format, version 1, over a unix stream socket (``daemon.sock`` in the cache directory). All integers are
little-endian. A frame is a header of 16 bytes and a body:

    u32 body length (at most MAX_BODY) · u8 kind · 3 zero bytes · u64 id · body

The client chooses ids (never 0, unique among its open requests); a reply carries its request's id. Notices from the
daemon carry id 0. The first frame is HELLO, and nothing else is read before it was answered.

| kind | body | replies |
|---|---|---|
| HELLO | JSON: {"version": 1, "view": view, {"session": name} for the daemon's own, or null} | WELCOME or FAILED |
| | and "directories": true from who takes DIRECTORY | |
| LOOKUP | store path base name | FOUND, DIRECTORY, ABSENT or FAILED |
| TREE | u64 path number | READY (offsets 0, whole) or FAILED |
| CONTENT | u64 path number, u64 offset, u64 size: bytes of the NAR | READY or FAILED |
| | LOOKUP, TREE and CONTENT may have any number of PROGRESS before their reply: content is arriving | |
| CANCEL | u64 id of a request no longer wanted | none; the request may still be answered |
| TOUCHED | n x (u64 path number, u64 bytes read since the last report, u8 its root directory was listed), n at most TOUCHED_ROWS | none |
| CONTROL | JSON: {"do": verb, ...} | any number of PROGRESS, then RESULT or FAILED |

| reply or notice | body |
|---|---|
| WELCOME | JSON: {"version": 1, "generation": 32 hex digits} |
| FOUND | u64 path number, u64 NAR size: its tree index is published |
| DIRECTORY | u64 path number, u64 NAR size: it is a directory, and no more is known; TREE gets its tree index published |
| ABSENT | u32 milliseconds for which no source has to be asked again |
| FAILED | u16 errno, u16 exit code, UTF-8 story (what, where, and perhaps a line "hint: …"); with id 0: the connection ends, for this reason |
| READY | u64 path number, u64 start, u64 end, u8 whole, u64 inode: bytes [start, end) of the NAR may be read: |
| | from the final file (whole), or from the growing or sparse one that has this inode |
| PROGRESS, RESULT | JSON |
| PRESENT (notice) | base name that was answered ABSENT and is there now |
| DROPPED (notice) | u64 path number: its NAR file was unlinked; close it and ask again |
| QUARANTINED (notice) | u64 path number, base name: forget both and invalidate them in the kernel |

Who enforces what: this module refuses unknown kinds, wrong sizes, bodies over MAX_BODY and more than TOUCHED_ROWS before
they are asked for;
``daemon.requests`` enforces who may send CONTROL and bring a view, and how many requests may be open.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from veneer.model.errors import FormatError, LimitError

VERSION = 1
MAX_BODY = 16 << 20
TOUCHED_ROWS = 4096
"""Of one frame: the daemon goes through them between two other requests."""
HEADER = struct.Struct("<IB3xQ")
SOCKET_NAME = "daemon.sock"

_U64 = struct.Struct("<Q")
_READY = struct.Struct("<QQQBQ")
_CONTENT = struct.Struct("<QQQ")
_FOUND = struct.Struct("<QQ")
_TOUCHED = struct.Struct("<QQB")
_U32 = struct.Struct("<I")
_FAILED = struct.Struct("<HH")


class Kind(enum.IntEnum):
    HELLO = 1
    LOOKUP = 2
    TREE = 3
    CONTENT = 4
    CANCEL = 5
    TOUCHED = 6
    CONTROL = 7
    WELCOME = 128
    FOUND = 129
    ABSENT = 130
    FAILED = 131
    READY = 132
    PROGRESS = 133
    RESULT = 134
    DIRECTORY = 135
    PRESENT = 140
    DROPPED = 141
    QUARANTINED = 142


_KINDS = {int(k): k for k in Kind}
_FIXED = {
    Kind.TREE: _U64.size,
    Kind.CONTENT: _CONTENT.size,
    Kind.CANCEL: _U64.size,
    Kind.FOUND: _FOUND.size,
    Kind.DIRECTORY: _FOUND.size,
    Kind.ABSENT: _U32.size,
    Kind.READY: _READY.size,
    Kind.DROPPED: _U64.size,
}


@dataclass(frozen=True, slots=True)
class Frame:
    """One message. The body's meaning follows from the kind; the functions below take it apart."""

    kind: Kind
    id: int
    body: bytes = b""

    def encode(self) -> bytes:
        if len(self.body) > MAX_BODY:
            raise LimitError(f"message of {len(self.body)} bytes", where="request protocol")
        return HEADER.pack(len(self.body), self.kind, self.id) + self.body


def parse_header(header: bytes) -> tuple[int, Kind, int]:
    """(body length, kind, id) of a 16-byte header; refuses before any body is read."""
    length, number, request = HEADER.unpack(header)
    kind = _KINDS.get(number)
    if kind is None:
        raise FormatError(f"unknown message kind {number}", where="request protocol")
    if length > MAX_BODY:
        raise LimitError(f"message of {length} bytes announced", where="request protocol")
    size = _FIXED.get(kind)
    if size is not None and length != size:
        raise FormatError(f"{kind.name} of {length} bytes, not {size}", where="request protocol")
    if kind is Kind.TOUCHED and length > TOUCHED_ROWS * _TOUCHED.size:
        raise LimitError(f"TOUCHED of {length} bytes announced", where="request protocol")
    return length, kind, request


class Splitter:
    """Frames out of a byte stream cut anywhere. Holds at most one frame's bytes plus the last chunk."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """The frames completed by ``data``. FormatError: the stream cannot be continued."""
        buffer = self._buffer
        buffer += data
        frames = []
        start = 0
        while len(buffer) - start >= HEADER.size:
            length, kind, request = parse_header(bytes(buffer[start : start + HEADER.size]))
            end = start + HEADER.size + length
            if len(buffer) < end:
                break
            frames.append(Frame(kind, request, bytes(buffer[start + HEADER.size : end])))
            start = end
        del buffer[:start]
        return frames


def path_number(body: bytes) -> int:
    """Of TREE and DROPPED; of CANCEL, the id."""
    return int(_U64.unpack(body)[0])


def path_number_body(number: int) -> bytes:
    return _U64.pack(number)


def content_body(number: int, offset: int, size: int) -> bytes:
    return _CONTENT.pack(number, offset, size)


def content(body: bytes) -> tuple[int, int, int]:
    """(path number, offset, size) of CONTENT."""
    return _CONTENT.unpack(body)


def found_body(number: int, nar_size: int) -> bytes:
    return _FOUND.pack(number, nar_size)


def found(body: bytes) -> tuple[int, int]:
    """(path number, NAR size) of FOUND and DIRECTORY."""
    return _FOUND.unpack(body)


def absent_body(milliseconds: int) -> bytes:
    return _U32.pack(milliseconds)


def absent(body: bytes) -> int:
    return int(_U32.unpack(body)[0])


def failed_body(errno: int, story: str, exit_code: int = 1) -> bytes:
    return _FAILED.pack(errno, exit_code) + story.encode("utf-8", "replace")[: MAX_BODY - _FAILED.size]


def failed(body: bytes) -> tuple[int, str]:
    """(errno, story) of FAILED."""
    if len(body) < _FAILED.size:
        raise FormatError("FAILED without an errno", where="request protocol")
    return int(_FAILED.unpack_from(body)[0]), body[_FAILED.size :].decode("utf-8", "replace")


def failed_exit_code(body: bytes) -> int:
    """The exit status that the failure asks of a command; ``body`` was accepted by ``failed``."""
    return int(_FAILED.unpack_from(body)[1])


def ready_body(number: int, start: int, end: int, *, whole: bool, inode: int = 0) -> bytes:
    return _READY.pack(number, start, end, whole, inode)


def ready(body: bytes) -> tuple[int, int, int, bool, int]:
    """(path number, start, end, whole, inode) of READY."""
    number, start, end, whole, inode = _READY.unpack(body)
    return number, start, end, bool(whole), inode


def touched_bodies(rows: list[tuple[int, int, bool]]) -> list[bytes]:
    """Bodies of as many TOUCHED as the rows need."""
    return [
        b"".join(_TOUCHED.pack(*row) for row in rows[at : at + TOUCHED_ROWS])
        for at in range(0, len(rows), TOUCHED_ROWS)
    ]


def touched(body: bytes) -> list[tuple[int, int, bool]]:
    """[(path number, bytes, listed)] of TOUCHED."""
    if len(body) % _TOUCHED.size:
        raise FormatError("TOUCHED with a cut row", where="request protocol")
    return [(int(a), int(b), bool(c)) for a, b, c in _TOUCHED.iter_unpack(body)]


def quarantined_body(number: int, basename: str) -> bytes:
    return _U64.pack(number) + basename.encode("ascii", "replace")


def quarantined(body: bytes) -> tuple[int, str]:
    """(path number, base name) of QUARANTINED."""
    if len(body) < _U64.size:
        raise FormatError("QUARANTINED without a path number", where="request protocol")
    return int(_U64.unpack_from(body)[0]), body[8:].decode("ascii", "replace")
