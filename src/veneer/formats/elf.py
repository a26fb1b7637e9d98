"""What an ELF file says it is started with: its loader, the libraries that it needs, where these are looked for.

Source: System V ABI, "Object files" and "Dynamic linking" (gABI 4.1); ``elf.h`` of glibc. Little-endian, 64 and 32 bits.

    header   ident (16 bytes: 7f "ELF", class 1 | 2, data 1, ...), u16 type, u16 machine, u32 version, entry, phoff, shoff, u32 flags,
             u16 ehsize, u16 phentsize, u16 phnum, ...                          an address or offset has the class's width
    phoff    phnum program headers: type, offset, address, sizes in the file and in memory, flags, alignment
             PT_LOAD: what lies where; PT_INTERP: the loader's path; PT_DYNAMIC: { tag, value } up to DT_NULL
    names    offsets in the string table, whose address DT_STRTAB tells

Only executables (ET_EXEC) and shared objects (ET_DYN) are looked at: None for everything else, statically linked or not.
Section headers are not used: the loader does not need them either, and ``strip`` may remove them.

Limits, enforced here: MAX_SEGMENTS, MAX_TAGS, MAX_NEEDED, MAX_NAME, MAX_SEARCH. Whatever the bytes: FormatError (LimitError), and no more
than MAX_QUESTIONS, of MAX_SEARCH bytes at most.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from dataclasses import dataclass

from veneer.model.errors import FormatError, LimitError, TruncatedError

MAGIC = b"\x7fELF"
MAX_SEGMENTS = 256
MAX_TAGS = 2048
MAX_NEEDED = 256
MAX_NAME = 4096
"""Bytes of a library's name or the loader's path: PATH_MAX."""
MAX_SEARCH = 64 << 10
"""Bytes of a search path."""
MAX_QUESTIONS = 2 * MAX_NEEDED + 6
"""Header, segments, loader, dynamic section; two for each name and for the search path."""

_ELF = "ELF"
_EXEC, _DYN = 2, 3
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_STRSZ, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 10, 15, 29


@dataclass(frozen=True, slots=True)
class Linked:
    """``interpreter``: the loader's path, b"" for none. ``search``: directories in order, of RUNPATH or else of RPATH, as they
    stand ("$ORIGIN" and all).
    """

    interpreter: bytes
    needed: tuple[bytes, ...]
    search: tuple[bytes, ...]


Questions = Generator[tuple[int, int], bytes, Linked | None]
"""Yields (offset, size) inside the file and is sent the bytes there."""


@dataclass(frozen=True, slots=True)
class _Class:
    """``header``: type, machine, version, entry, phoff, shoff, flags, ehsize, phentsize, phnum, after the ident. ``fields``: places of
    (type, offset, address, size in the file) in ``segment``.
    """

    header: struct.Struct
    segment: struct.Struct
    fields: tuple[int, int, int, int]
    tag: struct.Struct


_CLASSES = {
    1: _Class(struct.Struct("<HHIIIIIHHH"), struct.Struct("<8I"), (0, 1, 2, 4), struct.Struct("<II")),
    2: _Class(struct.Struct("<HHIQQQIHHH"), struct.Struct("<IIQQQQQQ"), (0, 2, 3, 5), struct.Struct("<QQ")),
}
_IDENT = 16
_HEAD = 64


def questions(size: int) -> Questions:
    """Find what a file of ``size`` bytes is linked with. None: it is no ELF file that is started or linked. FormatError."""
    head = yield 0, min(size, _HEAD)
    if head[:4] != MAGIC or len(head) < _HEAD:
        return None
    kind = _CLASSES.get(head[4])
    if kind is None or head[5] != 1:
        return None
    file_type, _, _, _, offset, _, _, _, length, count = kind.header.unpack_from(head, _IDENT)
    if file_type not in (_EXEC, _DYN):
        return None
    segments = yield from _segments(kind, offset, length, count, size)
    interpreter = b""
    for what, start, _, in_file in segments:
        if what == _PT_INTERP:
            _limit(in_file, MAX_NAME, "bytes of a loader's path")
            interpreter = (yield from _part(start, in_file, size)).partition(b"\0")[0]
            break  # as the kernel does
    for what, start, _, in_file in segments:
        if what == _PT_DYNAMIC:
            return (yield from _dynamic(kind, interpreter, segments, start, in_file, size))
    return Linked(interpreter, (), ())


# --- details ------------------------------------------------------------------------------------------------------

_Segment = tuple[int, int, int, int]
"""(type, offset in the file, address, size in the file)."""
_Part = Generator[tuple[int, int], bytes, bytes]


def _part(offset: int, length: int, size: int) -> _Part:
    if offset + length > size:
        raise TruncatedError(f"{length} bytes at {offset} of {size}", where=_ELF)
    data = yield offset, length
    if len(data) != length:
        raise TruncatedError(f"{len(data)} bytes instead of {length} at {offset}", where=_ELF)
    return data


def _segments(
    kind: _Class, offset: int, length: int, count: int, size: int
) -> Generator[tuple[int, int], bytes, list[_Segment]]:
    if not count:
        return []
    if length != kind.segment.size:
        raise FormatError(f"program headers of {length} bytes", where=_ELF)
    _limit(count, MAX_SEGMENTS, "program headers")
    data = yield from _part(offset, count * length, size)
    rows = kind.segment.iter_unpack(data)
    what, start, address, in_file = kind.fields
    return [(row[what], row[start], row[address], row[in_file]) for row in rows]


def _dynamic(
    kind: _Class, interpreter: bytes, segments: list[_Segment], start: int, length: int, size: int
) -> Questions:
    length -= length % kind.tag.size
    _limit(length // kind.tag.size, MAX_TAGS, "dynamic tags")
    data = yield from _part(start, length, size)
    needed: list[int] = []
    single: dict[int, int] = {}
    for tag, value in kind.tag.iter_unpack(data):
        if tag == _DT_NULL:
            break
        if tag == _DT_NEEDED:
            needed.append(value)
        elif tag in (_DT_STRTAB, _DT_STRSZ, _DT_RPATH, _DT_RUNPATH):
            single[tag] = value
    _limit(len(needed), MAX_NEEDED, "needed libraries")
    search = single.get(_DT_RUNPATH, single.get(_DT_RPATH))
    if not needed and search is None:
        return Linked(interpreter, (), ())
    table = _in_file(segments, single.get(_DT_STRTAB, 0))
    end = min(size, table + single.get(_DT_STRSZ, 0))
    names = []
    for at in needed:
        names.append((yield from _string(table + at, end, MAX_NAME)))  # noqa: PERF401 - no "yield" inside of one
    directories = b"" if search is None else (yield from _string(table + search, end, MAX_SEARCH))
    return Linked(interpreter, tuple(names), tuple(filter(None, directories.split(b":"))))


def _in_file(segments: list[_Segment], address: int) -> int:
    """Where in the file the byte lies that is loaded at ``address``."""
    for what, start, first, in_file in segments:
        if what == _PT_LOAD and first <= address < first + in_file:
            return start + address - first
    raise FormatError(f"no segment has the string table at {address:#x}", where=_ELF)


def _string(start: int, end: int, limit: int) -> _Part:
    """Up to the next NUL."""
    found = b""
    step = 256
    while len(found) < limit:
        at = start + len(found)
        length = min(step, end - at, limit - len(found))
        if length <= 0:
            raise TruncatedError("a name lies outside of the string table", where=_ELF)
        data = yield from _part(at, length, end)
        name, nul, _ = data.partition(b"\0")
        found += name
        if nul:
            return found
        step = limit
    raise LimitError(f"a name of more than {limit} bytes", where=_ELF)


def _limit(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise LimitError(f"{count} {what}", where=_ELF)
