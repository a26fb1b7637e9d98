"""What is fuzzed: one target per codec, with seeds, and what must hold for any input.

A target takes bytes and may raise FormatError (with its kinds TruncatedError and LimitError) only. Everything else is a
finding: another exception, a difference between two ways to the same answer, too much time or memory.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import cast

import brotli
import lz4.frame
import zstandard

from tests.fuzz import foreign_formats, fuse_requests, own_formats, reference_nar
from tests.support.mountinfo import write_mountinfo
from tests.support.worker_client import client_hello, encode_request
from veneer.formats import (
    cache_info,
    chunk_map,
    derivation,
    listing,
    mountinfo,
    nar,
    narinfo,
    nix_conf,
    request_wire,
    seekable_zstd,
    signature,
    tree_index,
    worker_wire,
)
from veneer.formats.request_wire import Frame, Kind
from veneer.model.errors import FormatError
from veneer.model.hashes import Hash, nix32_decode
from veneer.model.store_path import StorePath
from veneer.model.tree import Directory, Node, RegularFile, Symlink
from veneer.sources.compression import Readable, open_decoder

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
CORPUS = Path(__file__).resolve().parent / "corpus"
MAX_DECODED = 4 << 20


@dataclass(frozen=True)
class Target:
    """``seeds``: glob patterns in tests/golden, or bytes, all of them accepted. ``max_len``: of an input, bytes."""

    run: Callable[[bytes], object]
    seeds: tuple[str | bytes, ...]
    max_len: int = 4096

    def seed_bytes(self) -> list[bytes]:
        found: list[bytes] = []
        for seed in self.seeds:
            if isinstance(seed, bytes):
                found.append(seed)
            else:
                found += [path.read_bytes() for path in sorted(GOLDEN.glob(seed))]
        return found


def survives(target: Target, data: bytes) -> bool:
    """Whether ``data`` was accepted. Any exception but FormatError goes through: a finding."""
    try:
        target.run(data)
    except FormatError:
        return False
    return True


def corpus_file(name: str) -> Path:
    """Inputs kept from long runs, one per line in hexadecimal."""
    return CORPUS / f"{name}.hex"


def kept(name: str) -> list[bytes]:
    file = corpus_file(name)
    return [bytes.fromhex(line) for line in file.read_text().split()] if file.exists() else []


def run_nar(data: bytes) -> None:
    """Whole, in pieces and by the reference parser: all must agree on acceptance and on the tree."""

    def tree(step: int) -> Node | None:
        try:
            return nar.tree_of_nar(data[at : at + step] for at in range(0, len(data), step))
        except FormatError:
            return None

    whole = tree(len(data) + 1)
    assert whole == tree(11)
    with suppress(reference_nar.TooDeepError):
        try:
            assert reference_nar.parse(data) == whole
        except reference_nar.RefusedError:
            assert whole is None
    if whole is None:
        raise FormatError("refused")
    assert whole == nar.with_offsets(whole)
    assert nar.nar_size(whole) == len(data)
    assert b"".join(nar.nar_of(whole, lambda file: [data[file.offset : file.offset + file.size]])) == data


def run_listing(data: bytes) -> None:
    tree = listing.parse_listing(data, nar_size=None)
    assert listing.parse_listing(listing.write_listing(tree), nar_size=nar.nar_size(tree)) == tree
    indexed(tree)


def run_deep_listing(data: bytes) -> None:
    """The reader for deep listings: what it accepts, the other does, too."""
    try:
        listing._decode_deep(data)
    except ValueError as error:  # msgspec's errors, which parse_listing turns into FormatError
        raise FormatError("refused") from error
    try:
        listing.parse_listing(data, nar_size=None)
    except FormatError as error:
        assert "malformed" not in str(error)
        raise


def run_tree(data: bytes) -> None:
    """``data`` tells a tree; its NAR, its listing and its index tell it back."""
    node = nar.with_offsets(told_tree(data))
    archive = b"".join(nar.nar_of(node, lambda file: [bytes(file.size)]))
    assert nar.tree_of_nar([archive]) == reference_nar.parse(archive) == node
    with suppress(FormatError):  # names and targets that are not UTF-8 have no listing
        assert listing.parse_listing(listing.write_listing(node), nar_size=len(archive)) == node
    indexed(node)


def told_tree(data: bytes) -> Node:
    """A tree of at most 64 directories inside each other, told by bytes: what kind, how many, which name."""
    source = io.BytesIO(data)

    def node(depth: int) -> Node:
        kind, number = (source.read(2) + b"\0\0")[:2]
        match kind % 4:
            case 0 if depth < 64:
                names = sorted({name(number + i) for i in range(number % 8)})
                return Directory(tuple((each, node(depth + 1)) for each in names))
            case 1:
                return Symlink(source.read(1 + number).replace(b"\0", b"/") or b"t")
            case _:
                return RegularFile(number, executable=kind > 127, offset=0)

    def name(number: int) -> bytes:
        text = source.read(1 + number % 8).replace(b"\0", b"x").replace(b"/", b"y")
        return text if text not in (b"", b".", b"..") else b"n"

    return node(0)


def indexed(node: Node) -> None:
    """The tree index of ``node`` gives it back, and finds every entry by its path."""
    made = tree_index.encode_tree(
        node, path_number=7, generation=bytes(16), nar_hash=bytes(32), nar_size=nar.nar_size(node)
    )
    index = tree_index.TreeIndex(bytes(made))
    index.verify()
    assert index.to_node() == node
    for path, entry in islice(index.walk(), 50):
        assert index.find(path) == entry


def run_tree_index(data: bytes) -> None:
    """A damaged index: wrong answers or FormatError. The header's checksum is made right, so that more is reached."""
    buffer = bytearray(data)
    if len(buffer) >= tree_index.HEADER_SIZE:
        at = tree_index.HEADER_SIZE - 4
        struct.pack_into("<I", buffer, at, zlib.crc32(buffer[:at]))
    index = tree_index.TreeIndex(bytes(buffer))
    refused = 0
    questions: list[Callable[[int], object]] = [
        index.entry,
        index.content,
        index.target,
        lambda entry: list(islice(index.children(entry), 100)),
        lambda entry: bytes(index.run(entry, 0, 4096)),
        lambda entry: bytes(index.run(entry, 160, 300)),
        lambda entry: index.lookup(entry, b"bin"),
    ]
    for entry in range(min(index.count + 1, 20)):
        for ask in questions:
            try:
                ask(entry)
            except FormatError:
                refused += 1
    for ask_whole in (index.to_node, lambda: list(islice(index.walk(), 200)), lambda: index.find(b"bin/a")):
        with suppress(FormatError):
            ask_whole()
    index.verify()


def run_narinfo(data: bytes) -> None:
    info = narinfo.parse_narinfo(data)
    signature.fingerprint(info)
    assert narinfo.parse_narinfo(narinfo.write_narinfo(info)) == info
    for text in (info.url, info.compression, info.deriver, info.ca, *info.signatures):
        assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text)


def run_cache_info(data: bytes) -> None:
    info = cache_info.parse_cache_info(data)
    assert cache_info.parse_cache_info(cache_info.write_cache_info(info)) == info


def run_texts(data: bytes) -> None:
    """What is parsed from short texts; refusals of one must not hide the others."""
    text = data.decode("utf-8", "surrogateescape")
    parsers: list[Callable[[str], object]] = [
        StorePath.parse,
        StorePath.parse_absolute,
        Hash.parse,
        nix32_decode,
        signature.PublicKey.parse,
        signature.SecretKey.parse,
    ]
    refused = 0
    for parse in parsers:
        try:
            parse(text)
        except FormatError:
            refused += 1
    if refused == len(parsers):
        raise FormatError("refused by all")


def run_signature(data: bytes) -> None:
    """A key's name, a line, a signature: never counts but for the key, the text and the bytes it was made with."""
    text = data.decode("utf-8", "surrogateescape")
    secret = signature.SecretKey.parse((GOLDEN / "key.secret").read_text())
    public = secret.public_key()
    good = secret.sign(data)
    assert public.verify(data, good)
    if text not in (good, good.rstrip("=")):
        assert not public.verify(data, text)
    assert not signature.PublicKey("other-1", public.raw).verify(data, good)
    assert not public.verify(data + b"x", good)
    signature.PublicKey.parse(text)


def run_nix_conf(data: bytes) -> None:
    """With a file that includes itself wherever it includes any."""
    text = data.decode("utf-8", "surrogateescape")
    nix_conf.settings(nix_conf.parse_nix_conf(text, include=lambda name: text if "y" in name else "x = 1"))


def run_request_wire(data: bytes) -> None:
    """Frames whole and in pieces, and every body that has a meaning."""

    def frames(step: int) -> list[Frame] | None:
        splitter = request_wire.Splitter()
        try:
            return [f for at in range(0, len(data), step) for f in splitter.feed(data[at : at + step])]
        except FormatError:
            return None

    whole = frames(len(data) + 1)
    assert whole == frames(5)
    if whole is None:
        raise FormatError("refused")
    assert request_wire.Splitter().feed(b"".join(frame.encode() for frame in whole)) == whole
    meanings: dict[Kind, Callable[[bytes], object]] = {
        Kind.TREE: request_wire.path_number,
        Kind.CANCEL: request_wire.path_number,
        Kind.DROPPED: request_wire.path_number,
        Kind.CONTENT: request_wire.content,
        Kind.FOUND: request_wire.found,
        Kind.ABSENT: request_wire.absent,
        Kind.FAILED: lambda body: (request_wire.failed(body), request_wire.failed_exit_code(body)),
        Kind.READY: request_wire.ready,
        Kind.TOUCHED: request_wire.touched,
        Kind.QUARANTINED: request_wire.quarantined,
    }
    for frame in whole:
        if frame.kind in meanings:
            meanings[frame.kind](frame.body)


def run_worker_wire(data: bytes) -> None:
    """What a Nix client may say, whole and in pieces; requests are written again as they were read."""

    def events(step: int) -> list[str]:
        decoder = worker_wire.RequestDecoder()
        found = [e for at in range(0, len(data), step) for e in decoder.feed(data[at : at + step])]
        assert decoder.held <= len(data) + worker_wire.MAX_REQUEST
        for event in found:
            if isinstance(event, worker_wire.Request):
                again = worker_wire.RequestDecoder()
                again.feed(client_hello(decoder.version))
                written = encode_request(event.operation, event.values, decoder.version)
                assert again.feed(written) == [event]
        return [f"Malformed {e.error}" if isinstance(e, worker_wire.Malformed) else repr(e) for e in found]

    whole = events(len(data) + 1)
    assert whole == events(3)
    if whole and whole[-1].startswith("Malformed"):
        raise FormatError("refused")


def run_mountinfo(data: bytes) -> None:
    mounts = mountinfo.parse_mountinfo(data)
    assert mountinfo.parse_mountinfo(write_mountinfo(mounts)) == mounts


def run_seek_table(data: bytes) -> None:
    """For a file of the size that the table tells, so that everything else is looked at."""
    width = 12 if len(data) >= 9 and data[-5] & 0x80 else 8
    told = sum(int.from_bytes(data[at : at + 4], "little") for at in range(8, len(data) - 9, width))
    frames = seekable_zstd.parse_seek_table(data, file_size=told + len(data))
    sizes = [(frame.compressed_size, frame.size) for frame in frames]
    written = seekable_zstd.write_seek_table(sizes)
    assert seekable_zstd.parse_seek_table(written, file_size=told + len(written)) == frames


def run_chunk_map(data: bytes) -> None:
    """With TableHash made right, so that the table itself is looked at."""
    head, end, table = data.partition(b"\n\n")
    before, key, after = head.partition(b"TableHash: ")
    if end and key:
        found = Hash("sha256", hashlib.sha256(table).digest()).nix32.encode()
        data = before + key + found + after[len(found) :] + end + table
    parsed = chunk_map.parse_chunk_map(data)
    assert chunk_map.parse_chunk_map(chunk_map.write_chunk_map(parsed)) == parsed
    parsed.fingerprint()


def run_decoder(name: str, plain: Callable[[bytes], bytes] | None, data: bytes) -> None:
    """Input in one piece and in small ones, output too: the same bytes and the same verdict, and ``plain``'s bytes.

    Up to MAX_DECODED bytes; whoever reads knows how many there may be.
    """

    class Cut(io.RawIOBase):
        def __init__(self, step: int) -> None:
            super().__init__()
            self.inner, self.step = io.BytesIO(data), step

        def read(self, size: int = -1, /) -> bytes:
            return self.inner.read(self.step if size < 0 else min(size, self.step))

    def decoded(step: int, size: int) -> tuple[bytes, bool, bool]:
        """(bytes, accepted, whole); the bytes before an error are not compared, they depend on the pieces."""
        found = bytearray()
        try:
            reader = open_decoder(name, cast(Readable, Cut(step)))
            while piece := reader.read(size):
                assert len(piece) <= size
                found += piece
                if len(found) > MAX_DECODED:
                    return b"", True, False
        except FormatError:
            return b"", False, True
        return bytes(found), True, True

    at_once, in_pieces = decoded(1 << 20, 1 << 20), decoded(7, 1000)
    if not (at_once[2] and in_pieces[2]):
        return
    if name == "zstd" and at_once[1] != in_pieces[1]:
        return  # libzstd sees that a frame lies about its size only when it has all of it: the NAR's hash decides
    assert at_once == in_pieces
    if not at_once[1]:
        raise FormatError("refused")
    if plain is not None:
        with suppress(lzma.LZMAError):  # Python's own knows no padding between streams
            assert plain(data) == at_once[0]


_NAR = b"".join(path.read_bytes() for path in sorted(GOLDEN.glob("leaf.nar")))
_ZSTD = zstandard.ZstdCompressor(write_checksum=True)
_ENCODERS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes] | None]] = {
    "xz": (partial(lzma.compress, preset=0), lzma.decompress),
    "bzip2": (bz2.compress, bz2.decompress),
    "gzip": (partial(gzip.compress, mtime=0), None),  # gzip.decompress minds the time stamps' text, we do not
    "zstd": (_ZSTD.compress, None),
    "br": (brotli.compress, brotli.decompress),
    "lz4": (lz4.frame.compress, None),
}
_INFO = "StorePath: /nix/store/" + "0" * 32 + "-name\n"
_TABLE = struct.pack("<II32s", 50, 100, bytes(32)) * 2
_CHUNKS = (
    f"Version: 1\n{_INFO}NarHash: sha256:{'0' * 52}\nNarSize: 200\nURL: nar/x.nar.zst\n"
    f"TableHash: sha256:{'0' * 52}\nSig: k-1:AAAA\n\n"
).encode() + _TABLE
_MOUNTS = (
    rb"36 35 98:0 /mnt1 /mnt\0402 rw,noatime master:1 - ext3 /dev/root rw,upperdir=/a\054b" + b"\n"
    b"37 36 0:5 / / rw - tmpfs  \n"
)
_DERIVATION = (
    b'Derive([("dev","/nix/store/%s-a-dev","",""),("out","","r:sha256","")],[],[],"x","b",[],[])'
    % (b"0" * 32)
)


def _worker_seeds() -> tuple[bytes, ...]:
    path = "/nix/store/" + "0" * 32 + "-name"
    seeds = []
    for version in (worker_wire.OLDEST, 0x11B, worker_wire.VERSION):
        said = client_hello(version)
        for operation in worker_wire.OPERATIONS.values():
            values: list[worker_wire.Value] = []
            for field in operation.request:
                match field.kind:
                    case worker_wire.Kind.U64:
                        values.append(1)
                    case worker_wire.Kind.STRING:
                        values.append(path)
                    case worker_wire.Kind.STRINGS:
                        values.append([path, "x"])
                    case _:
                        values.append([("a", "b")])
            if operation.since <= version:
                said += encode_request(operation, values, version)
        seeds.append(said)
    return tuple(seeds)


def _request_seeds() -> tuple[bytes, ...]:
    frames = [
        Frame(Kind.HELLO, 1, b'{"version": 1, "view": null}'),
        Frame(Kind.LOOKUP, 7, b"name"),
        Frame(Kind.CONTENT, 8, request_wire.content_body(1, 2, 3)),
        Frame(Kind.READY, 8, request_wire.ready_body(1, 2, 3, whole=True)),
        Frame(Kind.TOUCHED, 9, b"".join(request_wire.touched_bodies([(1, 2, True), (3, 4, False)]))),
        Frame(Kind.FAILED, 10, request_wire.failed_body(5, "why")),
        Frame(Kind.QUARANTINED, 0, request_wire.quarantined_body(5, "why")),
    ]
    return (*(frame.encode() for frame in frames), b"".join(frame.encode() for frame in frames))


def _index_seeds() -> tuple[bytes, ...]:
    seeds = []
    for path in sorted(GOLDEN.glob("*.nar")):
        tree = nar.tree_of_nar([path.read_bytes()])
        size = nar.nar_size(tree)
        seeds.append(
            bytes(
                tree_index.encode_tree(
                    tree, path_number=7, generation=bytes(16), nar_hash=bytes(32), nar_size=size
                )
            )
        )
    return tuple(seed for seed in seeds if len(seed) < 8192)


TARGETS: dict[str, Target] = {
    "nar": Target(run_nar, ("*.nar",), 8192),
    "listing": Target(run_listing, ("zstd/*.ls",)),
    "deep_listing": Target(run_deep_listing, ("zstd/*.ls",)),
    "listing_bytes": Target(
        lambda data: listing.decode_listing_bytes(data, 1 << 20), ("zstd/*.ls", "zstd/nar/*", "xz/nar/*")
    ),
    "tree": Target(run_tree, (bytes(range(0, 256, 3)), b"\0\7abcdefgh" * 20)),
    "tree_index": Target(run_tree_index, _index_seeds(), 8192),
    "narinfo": Target(run_narinfo, ("*/*.narinfo",)),
    "cache_info": Target(
        run_cache_info, ("none/nix-cache-info", b"StoreDir: /x\nWantMassQuery: 1\nPriority: 40\n")
    ),
    "texts": Target(
        run_texts, ("key.public", "key.secret", b"sha256:" + b"0" * 52, b"0" * 32 + b"-name"), 512
    ),
    "signature": Target(run_signature, ("key.public",), 512),
    "nix_conf": Target(
        run_nix_conf, (b"a = b c # d\nextra-substituters = x\n!include z\nrequire-sigs = false\n",), 1024
    ),
    "derivation": Target(derivation.parse_outputs, (_DERIVATION,)),
    "mountinfo": Target(run_mountinfo, (_MOUNTS,)),
    "seek_table": Target(run_seek_table, (seekable_zstd.write_seek_table([(50, 100), (60, 70)]),)),
    "chunk_map": Target(run_chunk_map, (_CHUNKS,)),
    "bundle": Target(own_formats.run_bundle, own_formats.BUNDLES),
    "bundle_frame": Target(own_formats.run_bundle_frame, own_formats.BUNDLE_FRAMES),
    "trace": Target(own_formats.run_trace, own_formats.TRACES),
    "trace_match": Target(own_formats.run_trace_match, own_formats.MATCHES, 1024),
    "touches": Target(own_formats.run_touches, own_formats.TOUCHES, 1024),
    "elf": Target(foreign_formats.run_elf, foreign_formats.ELFS),
    "xz_index": Target(foreign_formats.run_xz_index, foreign_formats.XZ_INDEXES, 512),
    "xz_block": Target(foreign_formats.run_xz_block, foreign_formats.XZ_BLOCKS),
    "overlay_url": Target(foreign_formats.run_overlay_url, foreign_formats.OVERLAY_URLS, 1024),
    "fuse_requests": Target(fuse_requests.run_fuse_requests, fuse_requests.REQUESTS),
    "damaged_mount": Target(fuse_requests.run_damaged_mount, fuse_requests.DAMAGED),
    "request_wire": Target(run_request_wire, _request_seeds()),
    "worker_wire": Target(run_worker_wire, _worker_seeds(), 8192),
    **{
        f"decode_{name}": Target(
            partial(run_decoder, name, plain), (encode(_NAR), encode(b""), encode(b"a" * 9999))
        )
        for name, (encode, plain) in _ENCODERS.items()
    },
}
