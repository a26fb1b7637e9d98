"""Chunk map: the parts of one NAR with a digest of each, signed. Our own format, version 1; ``<hash part>.chunks``.

A NAR's signature covers its whole hash, so nothing of it could be believed before all of it was read. A chunk map lets
a reader check each part by itself.

    file   = { line LF } LF table
    line   = key ": " value                    UTF-8; in this order
    table  = { u32 compressed size, u32 size, 32 bytes SHA-256 of the uncompressed bytes }       little-endian

| key | value |
|---|---|
| Version | 1 |
| StorePath, NarHash, NarSize | as in the narinfo; absolute, ``sha256:`` nix32, bytes |
| URL | the compressed file that compressed offsets are of, as in the narinfo |
| TableHash | SHA-256 of the table, ``sha256:`` nix32 |
| Sig | "key name:base64", any number; Ed25519 keys as those of narinfos, over the fingerprint |

    fingerprint = "veneer-chunks-1;" store path ";" NarHash ";" NarSize ";" TableHash

The fingerprint's first word keeps a signature of a chunk map from being one of a narinfo ("1;...") and the reverse.
Chunks lie one after the other, in the NAR and in the compressed file, each a zstd frame of its own: offsets are sums of
sizes, so that gaps and overlaps cannot be written down. URL is not signed: with a wrong one the digests do not match.

Limits, enforced here: MAX_SIZE; chunks of 1 byte to MAX_CHUNK; their sizes sum up to NarSize; TableHash is the table's.
Whether it is the chunk map of the narinfo at hand (path, NarHash, NarSize, URL) and whether its key is trusted is for
whoever uses it: ``fingerprint`` and ``belongs_to``.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass

from veneer.model.errors import FormatError, LimitError
from veneer.model.hashes import Hash
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import DEFAULT_STORE_DIR, StorePath

from .narinfo import MAX_NAR_SIZE

VERSION = 1
SUFFIX = ".chunks"
NARINFO_KEY = "ChunkMap"
"""In a narinfo: that there is one, and its name. Nix ignores it; it spares everybody the question where there is none."""
MAX_SIZE = 64 << 20
"""1.6 million chunks: a NAR of 400 GiB in the usual sizes."""
MAX_CHUNK = 64 << 20
"""A reader holds a chunk in memory before it may use it."""

_MAX_HEADER = 64 << 10
_MAX_SIGNATURES = 64
_ROW = struct.Struct("<II32s")
_KEYS = ("Version", "StorePath", "NarHash", "NarSize", "URL", "TableHash")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NUMBER = re.compile(r"[1-9][0-9]{0,18}")
_WHERE = "chunk map"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a NAR. Offsets and sizes in bytes; ``digest``: SHA-256 of its uncompressed bytes."""

    compressed_offset: int
    compressed_size: int
    offset: int
    size: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class UnverifiedChunkMap:
    """A chunk map as it was read, or as it is to be written. Its signatures were not checked."""

    store_path: StorePath
    nar_hash: Hash
    nar_size: int
    url: str
    chunks: tuple[Chunk, ...]
    signatures: tuple[str, ...] = ()
    store_dir: str = DEFAULT_STORE_DIR

    def fingerprint(self) -> bytes:
        """The bytes that a signature covers."""
        path = self.store_path.absolute(self.store_dir)
        table = Hash("sha256", hashlib.sha256(write_table(self.chunks)).digest())
        return f"veneer-chunks-{VERSION};{path};{self.nar_hash.nix32};{self.nar_size};{table.nix32}".encode()

    def belongs_to(self, info: UnverifiedPathInfo) -> bool:
        """Whether it is the map of this narinfo's NAR, in the compressed file that the narinfo names."""
        return (
            (self.store_path, self.store_dir, self.url) == (info.store_path, info.store_dir, info.url)
            and (self.nar_hash, self.nar_size) == (info.nar_hash, info.nar_size)
            and info.compression == "zstd"
        )


def is_announced(info: UnverifiedPathInfo) -> bool:
    """Whether the narinfo says that its path has a chunk map."""
    return (NARINFO_KEY, info.store_path.hash_part + SUFFIX) in info.extra


def place_chunks(rows: list[tuple[int, int, bytes]], base: int = 0) -> tuple[Chunk, ...]:
    """Chunks one after the other, from (compressed size, size, digest) of each; the first at ``base`` of the file."""
    chunks = []
    compressed_offset, offset = base, 0
    for compressed_size, size, digest in rows:
        chunks.append(Chunk(compressed_offset, compressed_size, offset, size, digest))
        compressed_offset += compressed_size
        offset += size
    return tuple(chunks)


def write_chunk_map(chunk_map: UnverifiedChunkMap) -> bytes:
    """The file. FormatError, LimitError for what would not be read back as given."""
    table = write_table(chunk_map.chunks)
    values = (
        str(VERSION),
        chunk_map.store_path.absolute(chunk_map.store_dir),
        chunk_map.nar_hash.nix32,
        str(chunk_map.nar_size),
        chunk_map.url,
        Hash("sha256", hashlib.sha256(table).digest()).nix32,
    )
    lines = [*zip(_KEYS, values, strict=True), *(("Sig", text) for text in chunk_map.signatures)]
    data = "".join(f"{key}: {value}\n" for key, value in lines).encode() + b"\n" + table
    if parse_chunk_map(data, store_dir=chunk_map.store_dir) != chunk_map:
        raise FormatError("its chunks do not lie one after the other", where=_WHERE)
    return data


def parse_chunk_map(data: bytes, *, store_dir: str = DEFAULT_STORE_DIR) -> UnverifiedChunkMap:
    """The chunk map in ``data``, of a path in ``store_dir``. FormatError, LimitError."""
    if len(data) > MAX_SIZE:
        raise LimitError(f"{len(data)} bytes, limit {MAX_SIZE}", where=_WHERE)
    end = data.find(b"\n\n", 0, _MAX_HEADER)
    if end < 0:
        raise FormatError("no end of its header", where=_WHERE)
    values, signatures = _header(data[:end])
    table = data[end + 2 :]
    version, path, nar_hash, nar_size, url, table_hash = values
    if version != str(VERSION):
        raise FormatError(f"version {version[:100]!r}, not {VERSION}", where=_WHERE)
    if Hash.parse(table_hash) != Hash("sha256", hashlib.sha256(table).digest()):
        raise FormatError("TableHash is not the hash of its table", where=_WHERE)
    if _NUMBER.fullmatch(nar_size) is None or int(nar_size) > MAX_NAR_SIZE:
        raise FormatError(f"NarSize is not a size: {nar_size[:100]!r}", where=_WHERE)
    hashed = Hash.parse(nar_hash)
    if hashed.algorithm != "sha256":
        raise FormatError(f"NarHash is {hashed.algorithm}, not sha256", where=_WHERE)
    return UnverifiedChunkMap(
        store_path=StorePath.parse_absolute(path, store_dir),
        nar_hash=hashed,
        nar_size=int(nar_size),
        url=url,
        chunks=parse_table(table, int(nar_size)),
        signatures=signatures,
        store_dir=store_dir,
    )


def parse_table(table: bytes, nar_size: int) -> tuple[Chunk, ...]:
    """The chunks of a table. FormatError, LimitError."""
    if len(table) % _ROW.size:
        raise FormatError(f"a table of {len(table)} bytes", where=_WHERE)
    rows: list[tuple[int, int, bytes]] = list(_ROW.iter_unpack(table))
    for compressed_size, size, _ in rows:
        if not compressed_size or not size:
            raise FormatError("an empty chunk", where=_WHERE)
        if size > MAX_CHUNK or compressed_size > 2 * MAX_CHUNK:
            raise LimitError(f"a chunk of {size} bytes, limit {MAX_CHUNK}", where=_WHERE)
    total = sum(size for _, size, _ in rows)
    if total != nar_size:
        raise FormatError(f"chunks of {total} bytes for a NAR of {nar_size}", where=_WHERE)
    return place_chunks(rows)


def write_table(chunks: tuple[Chunk, ...]) -> bytes:
    """The rows of the table, without their offsets. LimitError."""
    try:
        return b"".join(_ROW.pack(c.compressed_size, c.size, c.digest) for c in chunks)
    except struct.error as error:
        raise LimitError("a chunk's size does not fit", where=_WHERE) from error


def _header(data: bytes) -> tuple[list[str], tuple[str, ...]]:
    """(values of _KEYS, signatures)."""
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise FormatError("not UTF-8", where=_WHERE) from error
    if not len(_KEYS) <= len(lines) <= len(_KEYS) + _MAX_SIGNATURES:
        raise FormatError(f"a header of {len(lines)} lines", where=_WHERE)
    values = []
    for number, line in enumerate(lines):
        expected = _KEYS[number] if number < len(_KEYS) else "Sig"
        key, _, value = line.partition(": ")
        if key != expected or not value or _CONTROL.search(value):
            raise FormatError(
                f"not a value of {expected}: {line[:100]!r}", where=f"{_WHERE} line {number + 1}"
            )
        values.append(value)
    return values[: len(_KEYS)], tuple(values[len(_KEYS) :])
