"""The index at the end of an .xz file: where each block begins, compressed and not.

Source: "The .xz File Format", version 1.2.1, sections 2 to 4 and 5.3.1 (LZMA2). Numbers are little-endian.

    file    = stream header, { block }, index, stream footer                  of one stream
    header  = fd 37 7a 58 5a 00, flags, u32 CRC32 of the flags
    flags   = u8 0, u8 kind of check
    block   = block header, LZMA2 data, zeros up to a multiple of 4, check
    index   = u8 0, number of blocks, { record }, zeros up to a multiple of 4, u32 CRC32 of all that
    record  = size of the block without its zeros, size of its content        MIN_BLOCK or more, 0 or more
    number  = 7 bits per byte, lowest first, bit 7: more follow; at most 9 bytes, no needless ones
    footer  = u32 CRC32 of the next 6 bytes, u32 (size of the index / 4) - 1, flags, "YZ"
    LZMA2   = { chunk }, u8 0
    chunk   = u8 1 or 2, u16 size - 1, content
            | u8 0x80 to 0xff, u16, u16 compressed size - 1, [u8 properties: from 0xc0 on], compressed data

A file may have several streams, and zeros after each: the last stream's index knows nothing of the others. Such files are
told (None) and not read in parts. Blocks by themselves are not files; ``around`` gives what makes them one, so that an
ordinary decoder checks all of a block: filters, sizes, padding and check.

Limits, enforced here: MAX_BLOCKS blocks; the blocks and the index together may not be longer than the file. Whether a
block's bytes are what the index says is seen by its reader.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from veneer.model.errors import FormatError, LimitError, TruncatedError

from .seekable_zstd import Frame

FOOTER_SIZE = 12
HEADER_SIZE = 12
MIN_BLOCK = 5
MAX_BLOCKS = 1 << 18
CHECK_SIZES = {0: 0, 1: 4, 4: 8, 10: 32}
"""Kind of check -> bytes: none, CRC32, CRC64, SHA-256. The other kinds are reserved."""

_MAGIC = b"\xfd7zXZ\0"
_FOOTER_MAGIC = b"YZ"
_FOOTER = struct.Struct("<IIBB2s")
_MAX_NUMBER = 9
_LZMA2_END = 0
_LZMA2_PLAIN = (1, 2)
_LZMA2_LZMA = 0x80
_LZMA2_PROPERTIES = 0xC0
_INDEX = "xz index"
_FOOT = "xz stream footer"
_BLOCK = "xz block"


@dataclass(frozen=True, slots=True)
class Footer:
    """``index_size`` in bytes, its padding and CRC included."""

    index_size: int
    check: int


def parse_footer(footer: bytes) -> Footer | None:
    """The footer in a file's last FOOTER_SIZE bytes; None when no stream ends there. FormatError."""
    if len(footer) != FOOTER_SIZE or footer[-2:] != _FOOTER_MAGIC:
        return None
    crc, backward, zero, check, _ = _FOOTER.unpack(footer)
    if zlib.crc32(footer[4:10]) != crc:
        raise FormatError("wrong CRC32", where=_FOOT)
    if zero or check > 15:
        raise FormatError(f"unknown flags {footer[8:10].hex()}", where=_FOOT)
    return Footer((backward + 1) * 4, check)


def parse_index(end: bytes, *, file_size: int) -> tuple[Frame, ...] | None:
    """The blocks of a file of ``file_size`` bytes that ends in ``end``: a whole index and footer.

    None when the file has more than this stream, so that its beginning is not known from here. FormatError, LimitError.
    """
    footer = parse_footer(end[-FOOTER_SIZE:])
    if footer is None or len(end) != footer.index_size + FOOTER_SIZE:
        raise FormatError("not a whole index", where=_INDEX)
    sizes = _records(end[:-FOOTER_SIZE])
    length = HEADER_SIZE + sum(_padded(unpadded) for unpadded, _ in sizes) + len(end)
    if length > file_size:
        raise FormatError(
            f"it describes a file of {length} bytes, but this one has {file_size}",
            where=_INDEX,
            hint="the index belongs to another file; this one has to be read from its beginning",
        )
    if length < file_size:
        return None
    frames = []
    compressed_offset, offset = HEADER_SIZE, 0
    for unpadded, size in sizes:
        frames.append(Frame(compressed_offset, _padded(unpadded), offset, size))
        compressed_offset += _padded(unpadded)
        offset += size
    return tuple(frames)


def around(block: bytes, size: int) -> tuple[bytes, bytes]:
    """What has to stand before and after ``block`` to make it a whole .xz file with ``size`` bytes of content.

    The kind of check is told from its length. FormatError, TruncatedError for what cannot be a block.
    """
    data_end = _lzma2_end(block, (block[0] + 1) * 4 if block else 0)
    check_size = len(block) - _padded(data_end)
    check = next((kind for kind, length in CHECK_SIZES.items() if length == check_size), None)
    if check is None:
        raise FormatError(f"{check_size} bytes after its data are no check", where=_BLOCK)
    flags = bytes((0, check))
    index = b"\0\1" + _number(data_end + check_size) + _number(size)
    index += bytes(-len(index) % 4)
    index += zlib.crc32(index).to_bytes(4, "little")
    foot = (len(index) // 4 - 1).to_bytes(4, "little") + flags
    return (
        _MAGIC + flags + zlib.crc32(flags).to_bytes(4, "little"),
        index + zlib.crc32(foot).to_bytes(4, "little") + foot + _FOOTER_MAGIC,
    )


def _records(index: bytes) -> list[tuple[int, int]]:
    """(size without padding, size of the content) of each block."""
    if zlib.crc32(index[:-4]) != int.from_bytes(index[-4:], "little"):
        raise FormatError("wrong CRC32", where=_INDEX)
    body = index[:-4]
    if body[:1] != b"\0":
        raise FormatError("no index where the footer says", where=_INDEX)
    count, at = _read_number(body, 1)
    if count > MAX_BLOCKS:
        raise LimitError(f"{count} blocks, limit {MAX_BLOCKS}", where=_INDEX)
    sizes = []
    for _ in range(count):
        unpadded, at = _read_number(body, at)
        size, at = _read_number(body, at)
        if unpadded < MIN_BLOCK:
            raise FormatError(f"a block of {unpadded} bytes", where=_INDEX)
        sizes.append((unpadded, size))
    if len(body) != _padded(at) or any(body[at:]):
        raise FormatError("something follows its records", where=_INDEX)
    return sizes


def _read_number(data: bytes, at: int) -> tuple[int, int]:
    """(number, where it ends)."""
    value = 0
    for place, byte in enumerate(data[at : at + _MAX_NUMBER]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            if not byte and place:
                break
            return value, at + place + 1
    raise FormatError("not a number", where=f"{_INDEX}, byte {at}")


def _number(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _lzma2_end(block: bytes, at: int) -> int:
    """Where the LZMA2 data end that begin at ``at``. Jumps from chunk to chunk, at most 64 KiB each."""
    while at < len(block):
        control = block[at]
        if control == _LZMA2_END:
            return at + 1
        if control in _LZMA2_PLAIN:
            at += 3 + 1 + int.from_bytes(block[at + 1 : at + 3], "big")
        elif control >= _LZMA2_LZMA:
            size = int.from_bytes(block[at + 3 : at + 5], "big") + 1
            at += 5 + (control >= _LZMA2_PROPERTIES) + size
        else:
            raise FormatError(f"not LZMA2 data: {control:#04x}", where=f"{_BLOCK}, byte {at}")
    raise TruncatedError("truncated", where=_BLOCK)


def _padded(size: int) -> int:
    return size + -size % 4
