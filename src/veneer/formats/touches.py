"""Touches: what a mount server notes while a trace is recorded, before names are known. Our own format, version 1, for one run.

Rows of 16 bytes, little-endian, appended with one write(2) each (O_APPEND) by any number of servers, to one file:

    u64 node id · u32 first page · u32 pages          a READ: PAGE bytes each, perhaps beyond the file's end
    u64 node id of a root · u32 length · u32 0        the path's name, which follows, padded with zeros to 16 bytes

A write is cut off only by a kill, and then between two pages of memory, so that rows never straddle: the rest of a cut-off name is
no row that anybody knows, and is left out.

A row tells a touch for the first time, as far as its server knows; a successor may tell it again. Bounded: nothing is
written beyond MAX_SIZE; who reads it sees by the size that something may be missing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from veneer.formats.tree_index import split_node_id
from veneer.model.errors import FormatError
from veneer.model.store_path import StorePath

PAGE = 4096
MAX_SIZE = 4 << 20
"""262144 rows: 32 GiB of a file that the kernel reads in order."""
_ROW = struct.Struct("<QII")
ROW_SIZE = _ROW.size
_LARGEST = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Touched:
    """A path's name was looked up: ``name``; or bytes of a file were read: ``size`` > 0."""

    number: int
    name: StorePath | None = None
    entry: int = 0
    offset: int = 0
    size: int = 0


def read_row(node: int, offset: int, size: int) -> bytes:
    """A READ, rounded outwards to pages."""
    first = offset // PAGE
    pages = -(-(offset + size) // PAGE) - first
    return _ROW.pack(node, min(first, _LARGEST), min(pages, _LARGEST))


def name_row(root: int, name: bytes) -> bytes:
    """A store path's name, with its node id."""
    return _ROW.pack(root, len(name), 0) + name + bytes(-len(name) % ROW_SIZE)


def parse(data: bytes) -> Iterator[Touched]:
    """All rows in order, without those that make no sense. Does not raise."""
    at = 0
    while at + ROW_SIZE <= len(data):
        node, first, pages = _ROW.unpack_from(data, at)
        at += ROW_SIZE
        number, entry = split_node_id(node)
        if pages:
            yield Touched(number, None, entry, first * PAGE, pages * PAGE)
            continue
        if at + first > len(data):
            continue  # cut off: what is left of the name might be another path's
        try:
            name = StorePath.parse(data[at : at + first].decode("ascii"))
        except (FormatError, UnicodeDecodeError):
            continue
        at += first + -first % ROW_SIZE
        yield Touched(number, name)
