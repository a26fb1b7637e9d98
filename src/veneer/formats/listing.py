"""Listing (``.ls``): the tree of a NAR without its content, as JSON.

Source: ``nix copy --to '…?write-nar-listing=true'`` of Nix 2.26 and 2.34 (tests/golden).

    {"version": 1, "root": node}
    node = {"type": "directory", "entries": {name: node, ...}}
         | {"type": "regular", "size": bytes, "executable": bool = false, "narOffset": offset or absent}
         | {"type": "symlink", "target": text}

The root may be of any type. A listing is not signed: it is checked against the signed NarSize here, and against the NAR
itself by whoever reads that. Since a NAR is canonical, every offset follows from the rest (``nar.Layout``); offsets that
are given must be the canonical ones.

Encodings: plain, or compressed by a server that lost its Content-Encoding header: told apart by the first bytes
(zstd, xz, gzip, bzip2, plain JSON's ``{``); anything else is taken for brotli, which has no mark of its own.

Limits, enforced here: MAX_SIZE bytes after decompression, whatever the compressed size; names, targets, depth, entries
and sizes as in ``formats.nar``.

In the wild: narOffset missing (the largest public cache, since 2026) or null; entries in any order; unknown keys
(ignored). Paths with names that are not UTF-8 have no listing: Nix cannot write it, and neither can we. Of two
entries with the same name the last counts; such a listing then fails against NarSize or the NAR.

Memory and time: a listing of 1,000,000 files (70 MB of JSON) takes about 5 s and 300 MB besides the JSON, most of which
is the resulting tree; the daemon leaves big ones to a child. Depth: the JSON decoder recurses and refuses about 480 directories inside each other; deeper
listings go through a reader of our own, which is slow (5 us per token) and does not recurse.
"""

from __future__ import annotations

import bz2
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from typing import Annotated, Protocol

import brotli
import msgspec
import zstandard

from veneer.model.errors import FormatError, LimitError
from veneer.model.tree import MAX_DEPTH, MAX_ENTRIES, Directory, Node, RegularFile, Symlink

from .nar import MAX_NAR_SIZE, DirectoryEnd, DirectoryStart, File, Layout, events_of, name_fault, target_fault

MAX_SIZE = 256 << 20
VERSION = 1
_WHERE = "listing"
_MAX_WINDOW = 128 << 20

_Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_NAR_SIZE)]


class _Regular(msgspec.Struct, tag="regular", tag_field="type", gc=False):
    size: _Size
    executable: bool = False
    narOffset: int | None = None  # noqa: N815 - the format's own name


class _Symlink(msgspec.Struct, tag="symlink", tag_field="type", gc=False):
    target: str


class _Directory(msgspec.Struct, tag="directory", tag_field="type"):
    entries: dict[str, _Regular | _Symlink | _Directory]


_Json = _Regular | _Symlink | _Directory


class _Listing(msgspec.Struct):
    version: int
    root: _Json


def parse_listing(data: bytes, *, nar_size: int | None) -> Node:
    """The tree that the plain JSON ``data`` describes, with offsets.

    ``nar_size``: the signed NarSize that the tree's NAR must have; None when it is not known. FormatError, LimitError.
    """
    if len(data) > MAX_SIZE:
        raise LimitError(f"{len(data)} bytes, limit {MAX_SIZE}", where=_WHERE)
    try:
        try:
            listing = msgspec.json.decode(data, type=_Listing)
        except RecursionError:
            listing = _decode_deep(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"not a listing: {error}", where=_WHERE) from error
    if listing.version != VERSION:
        raise FormatError(f"version {listing.version}, not {VERSION}", where=_WHERE)
    layout = Layout()
    tree = _tree(listing, layout)
    if nar_size is not None and layout.position != nar_size:
        raise FormatError(
            f"its NAR would have {layout.position} bytes, but NarSize is {nar_size}",
            where=_WHERE,
            hint="the listing does not belong to this NAR; the tree has to be read from the NAR itself",
        )
    return tree


def write_listing(node: Node) -> bytes:
    """The listing of ``node`` as Nix writes it, offsets included. FormatError for names that are not UTF-8."""
    parts: list[str] = ['{"root":']
    comma = False
    try:
        for event in events_of(node):
            if isinstance(event, DirectoryEnd):
                parts.append('},"type":"directory"}')
                comma = True
                continue
            if event.name:
                parts.append(f"{',' if comma else ''}{_quoted(event.name)}:")
            comma = True
            if isinstance(event, DirectoryStart):
                parts.append('{"entries":{')
                comma = False
            elif isinstance(event, File):
                executable = '"executable":true,' if event.executable else ""
                parts.append(
                    f'{{{executable}"narOffset":{event.offset},"size":{event.size},"type":"regular"}}'
                )
            else:
                parts.append(f'{{"target":{_quoted(event.target)},"type":"symlink"}}')
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{error.object!r} is not UTF-8: this path can have no listing", where=_WHERE
        ) from error
    parts.append(f',"version":{VERSION}}}')
    return "".join(parts).encode("utf-8")


def decode_listing_bytes(data: bytes, limit: int = MAX_SIZE) -> bytes:
    """Plain JSON bytes from ``data`` as served. Never makes more than ``limit`` bytes. FormatError, LimitError.

    A zstd stream that was cut gives the JSON up to there, which ``parse_listing`` then refuses.
    """
    if data[:64].lstrip(b" \t\r\n").startswith(b"{"):
        plain = data
    else:
        try:
            plain = _decompress(data, limit)
        except (zstandard.ZstdError, lzma.LZMAError, zlib.error, OSError, EOFError, brotli.error) as error:
            raise FormatError(f"neither JSON nor a known compression: {error}", where=_WHERE) from error
    if len(plain) > limit:
        raise LimitError(f"more than {limit} bytes", where=_WHERE)
    return plain


class _Decompressor(Protocol):
    """What lzma and bz2 have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


def _decompress(data: bytes, limit: int) -> bytes:
    """At most ``limit`` + 1 bytes of the one stream in ``data``. The library's errors, FormatError."""
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        decoder = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        parts = bytearray()
        with decoder.stream_reader(io.BytesIO(data), read_across_frames=True) as reader:
            while len(parts) <= limit and (part := reader.read(1 << 20)):  # reserves what it is asked for
                parts += part
        return bytes(parts)
    if data.startswith(b"\xfd7zXZ\0"):
        return _all_of(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2 * _MAX_WINDOW), data, limit)
    if data.startswith(b"BZh"):
        return _all_of(bz2.BZ2Decompressor(), data, limit)
    if data.startswith(b"\x1f\x8b"):
        inflate = zlib.decompressobj(wbits=31)
        plain = inflate.decompress(data, limit + 1)
        if len(plain) <= limit and (not inflate.eof or inflate.unused_data):
            raise FormatError("cut short, or more than one stream", where=_WHERE)
        return plain
    unbrotli = brotli.Decompressor()
    plain = unbrotli.process(data, output_buffer_limit=limit + 1)
    while len(plain) <= limit and not unbrotli.is_finished():
        more = unbrotli.process(b"", output_buffer_limit=limit + 1 - len(plain))
        if not more:
            raise FormatError("neither JSON nor a known compression, or cut short", where=_WHERE)
        plain += more
    return bytes(plain)


def _all_of(decoder: _Decompressor, data: bytes, limit: int) -> bytes:
    plain = decoder.decompress(data, limit + 1)
    if len(plain) <= limit and (not decoder.eof or decoder.unused_data):
        raise FormatError("cut short, or more than one stream", where=_WHERE)
    return plain


def _tree(listing: _Listing, layout: Layout) -> Node:
    """The tree, walked in the NAR's order. Takes ``listing`` apart on the way, so that not both are in memory."""
    root: list[tuple[bytes, Node]] = []
    stack = [(b"", iter([("", listing.root)]), root)]
    listing.root = _Symlink("")
    count = 0
    while True:
        own_name, children, entries = stack[-1]
        for text, child in children:
            count += 1
            if count > MAX_ENTRIES:
                raise LimitError(f"more than {MAX_ENTRIES} entries", where=_WHERE)
            name = text.encode("utf-8")
            if len(stack) > 1 and (fault := name_fault(name, b"")) is not None:
                raise FormatError(fault, where=_WHERE)
            if isinstance(child, _Directory):
                if len(stack) > MAX_DEPTH:
                    raise LimitError(f"more than {MAX_DEPTH} directories inside each other", where=_WHERE)
                layout.directory_start(name)
                stack.append((name, _consume(child.entries), []))
                break
            entries.append((name, _leaf(name, child, layout)))
        else:
            stack.pop()
            if not stack:
                return root[0][1]
            layout.directory_end()
            stack[-1][2].append((own_name, Directory(tuple(entries))))


def _leaf(name: bytes, child: _Regular | _Symlink, layout: Layout) -> Node:
    if isinstance(child, _Symlink):
        target = child.target.encode("utf-8")
        if (fault := target_fault(target)) is not None:
            raise FormatError(fault, where=_WHERE)
        layout.link(name, target)
        return Symlink(target)
    offset = layout.file(name, child.size, child.executable)
    if layout.position > MAX_NAR_SIZE:
        raise LimitError(f"its NAR would have more than {MAX_NAR_SIZE} bytes", where=_WHERE)
    if child.narOffset is not None and child.narOffset != offset:
        raise FormatError(
            f"narOffset {child.narOffset} of {name!r}, but it must be {offset}",
            where=_WHERE,
            hint="the listing does not belong to this NAR; the tree has to be read from the NAR itself",
        )
    return RegularFile(child.size, child.executable, offset)


def _consume(entries: dict[str, _Json]) -> Iterator[tuple[str, _Json]]:
    """The entries in byte order (which for UTF-8 is the order of code points), leaving ``entries`` empty."""
    for name in sorted(entries):
        yield name, entries.pop(name)


def _quoted(data: bytes) -> str:
    return json.dumps(data.decode("utf-8"), ensure_ascii=False)


_TOKEN = re.compile(
    rb"""[ \t\r\n]*(?:
        (?P<mark>[{}:,]) | (?P<text>"[^"\\]*(?:\\.[^"\\]*)*") | (?P<word>[-+.0-9A-Za-z]+) )""",
    re.DOTALL | re.VERBOSE,
)


def _decode_deep(data: bytes) -> _Listing:
    """The same as msgspec for a listing of any depth, except that unknown keys may hold only plain values.

    Open objects are, from the outside: the listing, its root, the root's entries, an entry, its entries, ...
    """
    objects: list[dict[str, object]] = []
    keys: list[str] = []
    position = 0
    state = "value"  # what comes next; or "first key", "key", "colon", "comma"
    while True:
        match = _TOKEN.match(data, position)
        if match is None:
            raise FormatError("not a listing: malformed JSON", where=f"{_WHERE} byte {position}")
        mark, text, word = match["mark"], match["text"], match["word"]
        value: object
        if state == "value" and mark == b"{":
            _check_place(len(objects), keys)
            objects.append({})
            state = "first key"
        elif state in ("first key", "key") and text is not None:
            keys.append(msgspec.json.decode(text, type=str))
            state = "colon"
        elif state == "colon" and mark == b":":
            state = "value"
        elif state == "comma" and mark == b",":
            state = "key"
        elif (state == "value" and objects and mark is None) or (
            state in ("first key", "comma") and mark == b"}"
        ):
            value = msgspec.json.decode(text or word) if mark is None else _close(objects)
            if not objects:
                if data[match.end() :].strip():
                    raise FormatError(
                        "not a listing: trailing characters", where=f"{_WHERE} byte {match.end()}"
                    )
                return msgspec.convert(value, _Listing)
            key = keys.pop()
            if key in objects[-1]:
                raise FormatError(f"second {key!r}", where=f"{_WHERE} byte {position}")
            objects[-1][key] = value
            state = "comma"
        else:
            raise FormatError("not a listing: malformed JSON", where=f"{_WHERE} byte {position}")
        position = match.end()


def _check_place(level: int, keys: list[str]) -> None:
    """Refuse an object inside ``level`` others where a listing has none."""
    if level > 2 * MAX_DEPTH + 1:
        raise LimitError(f"more than {MAX_DEPTH} directories inside each other", where=_WHERE)
    if (level == 1 and keys[-1] != "root") or (level > 1 and level % 2 == 0 and keys[-1] != "entries"):
        raise FormatError(f"an object as value of {keys[-1]!r}", where=_WHERE)


def _close(objects: list[dict[str, object]]) -> object:
    """The innermost object, made into a node where its level says that it is one."""
    value = objects.pop()
    if len(objects) % 2 == 0:
        return value
    entries = value.pop("entries", None)
    if value.get("type") != "directory":
        return msgspec.convert(value, _Regular | _Symlink)
    if not isinstance(entries, dict):
        raise FormatError("a directory without entries", where=_WHERE)
    if not all(isinstance(child, _Regular | _Symlink | _Directory) for child in entries.values()):
        raise FormatError("an entry that is not a node", where=_WHERE)
    return _Directory(entries)
