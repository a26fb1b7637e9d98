"""The seek table of the zstd seekable format: where each frame of a file begins, compressed and not.

Source: ``contrib/seekable_format/zstd_seekable_compression_format.md`` of zstd, version 0.1.0.

    file   = { zstd frame } skippable frame with the seek table
    table  = u32 0x184D2A5E, u32 bytes that follow, { entry }, footer        all little-endian
    entry  = u32 compressed size, u32 decompressed size [, u32 checksum]     one per frame, in the file's order
    footer = u32 number of frames, u8 descriptor, u32 0x8F92EAB1
    descriptor: bit 7: entries have checksums; bits 6 to 2 must be 0; bits 1 and 0 mean nothing

Decoders of zstd skip the table: to them the file is an ordinary one of several frames. It stands at the file's end, so
a reader asks for the last FOOTER_SIZE bytes, then for ``table_size`` of them.

The checksum is XXH64's low half of the decompressed frame. It is read and not checked: it protects against accidents
only, and ``formats.chunk_map`` has a signed SHA-256. We write none.

Limits, enforced here: MAX_FRAMES frames of MAX_FRAME_SIZE decompressed bytes (both the format's own); the frames and
the table together must be as long as the file is. Whether a frame's bytes are what the table says is seen by its reader.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.model.errors import FormatError, LimitError

SKIPPABLE_MAGIC = 0x184D2A5E
SEEKABLE_MAGIC = 0x8F92EAB1
FOOTER_SIZE = 9
MAX_FRAMES = 0x8000000
MAX_FRAME_SIZE = 0x40000000

_HEADER = struct.Struct("<II")
_FOOTER = struct.Struct("<IBI")
_ENTRY = struct.Struct("<II")
_ENTRY_WITH_CHECKSUM = struct.Struct("<III")
_CHECKSUMS = 0x80
_RESERVED = 0x7C
_MAX_U32 = 0xFFFFFFFF
_WHERE = "zstd seek table"


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a frame lies: bytes of the file, and the bytes of the content that it holds."""

    compressed_offset: int
    compressed_size: int
    offset: int
    size: int


def place(sizes: Sequence[tuple[int, int]]) -> tuple[Frame, ...]:
    """Frames one after the other, from (compressed size, size) of each."""
    frames = []
    compressed_offset = offset = 0
    for compressed_size, size in sizes:
        frames.append(Frame(compressed_offset, compressed_size, offset, size))
        compressed_offset += compressed_size
        offset += size
    return tuple(frames)


def write_seek_table(sizes: Sequence[tuple[int, int]]) -> bytes:
    """The table after frames of these (compressed size, size), without checksums. LimitError."""
    if len(sizes) > MAX_FRAMES:
        raise LimitError(f"{len(sizes)} frames, limit {MAX_FRAMES}", where=_WHERE)
    entries = bytearray()
    for compressed_size, size in sizes:
        if not 0 < compressed_size <= _MAX_U32 or not 0 <= size <= MAX_FRAME_SIZE:
            raise LimitError(f"a frame of {compressed_size} bytes for {size}", where=_WHERE)
        entries += _ENTRY.pack(compressed_size, size)
    footer = _FOOTER.pack(len(sizes), 0, SEEKABLE_MAGIC)
    return _HEADER.pack(SKIPPABLE_MAGIC, len(entries) + FOOTER_SIZE) + bytes(entries) + footer


def table_size(footer: bytes) -> int | None:
    """Size of the whole table, from a file's last FOOTER_SIZE bytes; None when the file has none. FormatError, LimitError."""
    if len(footer) != FOOTER_SIZE:
        return None
    count: int
    count, descriptor, magic = _FOOTER.unpack(footer)
    if magic != SEEKABLE_MAGIC:
        return None
    return _HEADER.size + count * _entry(count, descriptor).size + FOOTER_SIZE


def parse_seek_table(table: bytes, *, file_size: int) -> tuple[Frame, ...]:
    """The frames of a file of ``file_size`` bytes that ends in ``table``, a whole one. FormatError, LimitError."""
    if table_size(table[-FOOTER_SIZE:]) != len(table):
        raise FormatError("not a whole seek table", where=_WHERE)
    magic, length = _HEADER.unpack_from(table)
    if magic != SKIPPABLE_MAGIC or length != len(table) - _HEADER.size:
        raise FormatError("not in a skippable frame of its size", where=_WHERE)
    count, descriptor, _ = _FOOTER.unpack(table[-FOOTER_SIZE:])
    entry = _entry(count, descriptor)
    sizes: list[tuple[int, int]] = []
    for compressed_size, size, *_ in entry.iter_unpack(table[_HEADER.size : -FOOTER_SIZE]):
        if size > MAX_FRAME_SIZE:
            raise LimitError(f"a frame of {size} bytes, limit {MAX_FRAME_SIZE}", where=_WHERE)
        if not compressed_size:
            raise FormatError("a frame without bytes", where=_WHERE)
        sizes.append((compressed_size, size))
    total = sum(compressed_size for compressed_size, _ in sizes) + len(table)
    if total != file_size:
        raise FormatError(
            f"it describes a file of {total} bytes, but this one has {file_size}",
            where=_WHERE,
            hint="the table belongs to another file; this one has to be read from its beginning",
        )
    return place(sizes)


def _entry(count: int, descriptor: int) -> struct.Struct:
    if descriptor & _RESERVED:
        raise FormatError(f"unknown descriptor {descriptor:#04x}", where=_WHERE)
    if count > MAX_FRAMES:
        raise LimitError(f"{count} frames, limit {MAX_FRAMES}", where=_WHERE)
    return _ENTRY_WITH_CHECKSUM if descriptor & _CHECKSUMS else _ENTRY
