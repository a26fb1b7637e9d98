"""Closure bundle: the small objects of a root's whole closure in one. Our own format, version 1; ``<hash part>.bundle``.

A cold start of a closure of 300 paths asks for 300 narinfos, and for listings and chunk maps of those that are used. A
bundle has all of them, so that it needs one request.

    file  = one zstd frame of plain, that says how long plain is
    plain = "veneer-bundle-1" LF { entry }
    entry = name " " size LF body              size: of the body, in bytes, decimal
    name  = hash part ( ".narinfo" | ".ls" | ".chunks" )

Bodies are the cache's own objects of these names, byte for byte. The first one is the root's narinfo; names differ.
A bundle need not have everything: what is missing is asked for by itself. It is not signed, and nothing in it is believed
more than if it had been asked for by itself: narinfos and chunk maps carry their signatures, listings are
confirmed by NARs.

Limits, enforced here: MAX_SIZE, MAX_PLAIN, MAX_ENTRIES, MAX_NARINFO and MAX_OTHER for one body, a window of WINDOW for
the decoder. One body at a time is in memory. A file that is not exactly one whole frame is refused.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import zstandard

from veneer.model.errors import FormatError, LimitError, TruncatedError
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import HASH_PART_LENGTH

from . import narinfo

SUFFIX = ".bundle"
NARINFO_KEY = "Bundle"
"""In a narinfo: that there is one, and its name. Nix ignores it; it spares everybody the question where there is none."""
NARINFO, LISTING, CHUNKS = ".narinfo", ".ls", ".chunks"
MAX_SIZE = 64 << 20
MAX_PLAIN = 128 << 20
MAX_ENTRIES = 100_000
MAX_NARINFO = narinfo.MAX_SIZE
MAX_OTHER = 8 << 20
"""Listings and chunk maps beyond it are asked for by themselves: who does not need them should not have to wait."""
WINDOW = 8 << 20

_MAGIC = b"veneer-bundle-1\n"
_HEADER = re.compile(rb"([0-9abcdfghijklmnpqrsvwxyz]{32})(\.narinfo|\.ls|\.chunks) (0|[1-9][0-9]{0,9})\n")
_MAX_HEADER = HASH_PART_LENGTH + len(NARINFO) + 12
_LEVEL = 9
_FRAME = b"\x28\xb5\x2f\xfd"
_MAX_BLOCKS = 1 << 20
"""Of a frame. Writers make them of 128 KiB."""
_PIECE = 64 << 10
_WHERE = "bundle"


@dataclass(frozen=True, slots=True)
class Entry:
    """One object. ``suffix``: NARINFO, LISTING or CHUNKS."""

    hash_part: str
    suffix: str
    body: bytes

    @property
    def header(self) -> bytes:
        return f"{self.hash_part}{self.suffix} {len(self.body)}\n".encode()


def is_announced(info: UnverifiedPathInfo) -> bool:
    """Whether the narinfo says that its path has a bundle."""
    return (NARINFO_KEY, info.store_path.hash_part + SUFFIX) in info.extra


def announced(data: bytes, hash_part: str) -> bytes:
    """A narinfo of ``hash_part``, byte for byte, that also says that there is a bundle."""
    return data + f"{NARINFO_KEY}: {hash_part}{SUFFIX}\n".encode()


def write_bundle(root: str, entries: Iterable[Entry]) -> bytes:
    """The file of the path with hash part ``root``. FormatError, LimitError for what would not be read back as given."""
    parts = [_MAGIC]
    order = _Order(root)
    for entry in entries:
        if _HEADER.fullmatch(entry.header) is None:
            raise FormatError(f"not an entry: {entry.header[:100]!r}", where=_WHERE)
        order.take(entry.hash_part, entry.suffix, len(entry.header), len(entry.body))
        parts += [entry.header, entry.body]
    order.end()
    data = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(b"".join(parts))
    if len(data) > MAX_SIZE:
        raise LimitError(f"{len(data)} bytes, limit {MAX_SIZE}", where=_WHERE)
    return data


def parse_bundle(data: bytes, root: str) -> Iterator[Entry]:
    """The entries of the bundle of hash part ``root``, one after the other. FormatError, LimitError: believe none of them.

    So do not act on any before the last one has come.
    """
    if len(data) > MAX_SIZE:
        raise LimitError(f"{len(data)} bytes, limit {MAX_SIZE}", where=_WHERE)
    try:
        yield from _entries(data, _Order(root))
    except zstandard.ZstdError as error:
        raise FormatError(f"not a zstd frame: {error}", where=_WHERE) from error


def _entries(data: bytes, order: _Order) -> Iterator[Entry]:
    frame_header = zstandard.get_frame_parameters(data)
    size = frame_header.content_size
    if size > MAX_PLAIN:  # unknown is the greatest of all
        raise LimitError(f"{size} bytes uncompressed, limit {MAX_PLAIN}", where=_WHERE)
    end = _frame_end(data) + 4 * frame_header.has_checksum
    if end > len(data):
        raise TruncatedError("ends in its frame", where=_WHERE)
    if end < len(data):
        raise FormatError("something follows its frame", where=_WHERE)
    decoder = zstandard.ZstdDecompressor(max_window_size=WINDOW)
    with decoder.stream_reader(data) as frame:
        plain = io.BufferedReader(frame, _PIECE)
        if plain.read(len(_MAGIC)) != _MAGIC:
            raise FormatError("not a bundle of version 1", where=_WHERE)
        while header := plain.readline(_MAX_HEADER):
            match = _HEADER.fullmatch(header)
            if match is None:
                raise FormatError(f"not an entry: {header!r}", where=_WHERE)
            hash_part, suffix, length = match[1].decode(), match[2].decode(), int(match[3])
            order.take(hash_part, suffix, len(header), length)
            body = plain.read(length)
            if len(body) < length:
                raise TruncatedError("ends in an entry", where=_WHERE)
            yield Entry(hash_part, suffix, body)
    if order.end() != size:
        raise TruncatedError(f"{order.end()} bytes uncompressed instead of {size}", where=_WHERE)


def _frame_end(data: bytes) -> int:
    """Where the blocks of a zstd frame end (RFC 8878, 3.1.1), or some place behind ``data``. A decoder does not tell what follows."""
    if not data.startswith(_FRAME):
        raise FormatError("begins with no zstd frame", where=_WHERE)
    at = zstandard.frame_header_size(data)
    for _ in range(_MAX_BLOCKS):
        block = int.from_bytes(data[at : at + 3], "little")
        at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)  # one byte, to be repeated
        if block & 1 or at > len(data):
            return at
    raise LimitError(f"more than {_MAX_BLOCKS} blocks", where=_WHERE)


class _Order:
    """What is the same for writer and reader: limits, the root first, no name twice."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._names: set[tuple[str, str]] = set()
        self._size = len(_MAGIC)

    def take(self, hash_part: str, suffix: str, header: int, body: int) -> None:
        """Sizes in bytes. FormatError, LimitError."""
        if not self._names and (hash_part, suffix) != (self._root, NARINFO):
            raise FormatError(
                f"begins with {hash_part}{suffix}, not with {self._root}{NARINFO}", where=_WHERE
            )
        if (hash_part, suffix) in self._names:
            raise FormatError(f"second {hash_part}{suffix}", where=_WHERE)
        if len(self._names) == MAX_ENTRIES:
            raise LimitError(f"more than {MAX_ENTRIES} entries", where=_WHERE)
        limit = MAX_NARINFO if suffix == NARINFO else MAX_OTHER
        if body > limit:
            raise LimitError(f"{hash_part}{suffix} has {body} bytes, limit {limit}", where=_WHERE)
        self._size += header + body
        if self._size > MAX_PLAIN:
            raise LimitError(f"more than {MAX_PLAIN} bytes uncompressed", where=_WHERE)
        self._names.add((hash_part, suffix))

    def end(self) -> int:
        """Bytes of it all. FormatError when there was not even the root."""
        if not self._names:
            raise FormatError("empty", where=_WHERE)
        return self._size
