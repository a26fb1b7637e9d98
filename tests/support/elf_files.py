"""ELF files with a dynamic section and nothing to run: what a program or a library says of itself, in any size."""

from __future__ import annotations

import struct
from collections.abc import Sequence


def make_elf(
    needed: Sequence[bytes] = (),
    *,
    interpreter: bytes = b"",
    runpath: bytes | None = None,
    rpath: bytes | None = None,
    bits: int = 64,
    file_type: int = 3,
    filling: bytes = b"",
) -> bytes:
    """``filling`` stands between the program headers and the rest, as code would."""
    wide = bits == 64
    word, header, segment_size = ("Q", 64, 56) if wide else ("I", 52, 32)
    strings = bytearray(b"\0")

    def put(name: bytes) -> int:
        at = len(strings)
        strings.extend(name + b"\0")
        return at

    tags = [(1, put(name)) for name in needed]
    tags += [(29, put(runpath))] if runpath is not None else []
    tags += [(15, put(rpath))] if rpath is not None else []
    body = header + 3 * segment_size + len(filling)
    names_at = body + len(interpreter) + 1
    tags += [(5, 0x10000 + names_at), (10, len(strings)), (0, 0)]
    dynamic = b"".join(struct.pack(f"<2{word}", *tag) for tag in tags)
    dynamic_at = names_at + len(strings)
    end = dynamic_at + len(dynamic)
    segments = [(1, 0, 0x10000, end), (2, dynamic_at, 0x10000 + dynamic_at, len(dynamic))]
    segments += [(3, body, 0x10000 + body, len(interpreter) + 1)] if interpreter else []
    table = b"".join(
        struct.pack("<IIQQQQQQ", what, 4, at, address, address, size, size, 1)
        if wide
        else struct.pack("<8I", what, at, address, address, size, size, 4, 1)
        for what, at, address, size in segments
    ).ljust(3 * segment_size, b"\0")
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    head = ident + struct.pack(
        f"<HHI3{word}I6H", file_type, 62 if wide else 3, 1, 0, header, 0, 0, header, segment_size, len(segments), 0, 0, 0
    )  # fmt: skip
    return b"".join((head, table, filling, interpreter, b"\0", strings, dynamic)).ljust(header + 64, b"\0")
