"""A signed binary cache out of files: the writing side of the formats, as small as the demo needs it.

A store path's content is a nested mapping of names to files and links (``Content``); ``add_path`` turns it into NAR, hash,
listing and signed narinfo and writes these as ``nix copy`` would, narinfo last. Nothing is unpacked or copied on the way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import zstandard

from veneer.formats.cache_info import CacheInfo, write_cache_info
from veneer.formats.listing import write_listing
from veneer.formats.nar import nar_of, nar_size, with_offsets
from veneer.formats.narinfo import write_narinfo
from veneer.formats.signature import SecretKey, fingerprint
from veneer.model.hashes import Hash, nix32_encode
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import DEFAULT_STORE_DIR, StorePath
from veneer.model.tree import Directory, Node, RegularFile, Symlink

COMPRESSION_LEVEL = 1
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class File:
    """A regular file: bytes, or a file of this machine that is read when it is packed."""

    data: bytes | Path
    executable: bool = False

    @property
    def size(self) -> int:
        return len(self.data) if isinstance(self.data, bytes) else self.data.stat().st_size

    def pieces(self) -> Iterator[bytes]:
        if isinstance(self.data, bytes):
            yield self.data
            return
        with open(self.data, "rb") as file:
            while piece := file.read(_PIECE):
                yield piece


@dataclass(frozen=True, slots=True)
class Link:
    target: str


Content = File | Link | Mapping[str, "Content"]


def store_path(name: str, *inputs: str) -> StorePath:
    """A path named by what it is made from, so that its own files may mention it: 20 bytes of a digest, as in Nix."""
    digest = hashlib.sha256("\0".join(("veneer demo", name, *inputs)).encode()).digest()[:20]
    return StorePath(nix32_encode(digest), name)


def tree_of(content: Content) -> tuple[Node, Callable[[RegularFile], Iterable[bytes]]]:
    """(tree with canonical offsets, reader of its files) of ``content``."""
    files: list[File] = []

    def node(item: Content) -> Node:
        if isinstance(item, File):
            files.append(item)
            return RegularFile(item.size, item.executable, 0)
        if isinstance(item, Link):
            return Symlink(item.target.encode())
        return Directory(tuple((name.encode(), node(item[name])) for name in sorted(item, key=str.encode)))

    tree = with_offsets(node(content))
    by_offset = dict(zip((file.offset for file in _files(tree)), files, strict=True))
    return tree, lambda file: by_offset[file.offset].pieces()


def _files(node: Node) -> Iterator[RegularFile]:
    if isinstance(node, RegularFile):
        yield node
    elif isinstance(node, Directory):
        for _, child in node.entries:
            yield from _files(child)


def write_header(cache: Path) -> None:
    """Begin a cache in an empty directory."""
    (cache / "nar").mkdir(parents=True)
    (cache / "nix-cache-info").write_bytes(write_cache_info(CacheInfo(DEFAULT_STORE_DIR, True, 40)))


def add_path(
    cache: Path, path: StorePath, content: Content, references: Iterable[StorePath], key: SecretKey
) -> UnverifiedPathInfo:
    """Add one store path to the cache; its path info. OSError when a file cannot be read or written."""
    tree, read = tree_of(content)
    plain, encoded = hashlib.sha256(), hashlib.sha256()
    compressor = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).compressobj()
    temporary = cache / "nar" / f"{path.hash_part}.part"
    size = 0
    with open(temporary, "wb") as file:

        def put(data: bytes) -> None:
            nonlocal size
            encoded.update(data)
            size += file.write(data)

        for piece in nar_of(tree, read):
            plain.update(piece)
            put(compressor.compress(piece))
        put(compressor.flush())
    file_hash = Hash("sha256", encoded.digest())
    url = f"nar/{nix32_encode(file_hash.digest)}.nar.zst"
    temporary.rename(cache / url)
    unsigned = UnverifiedPathInfo(
        store_path=path,
        url=url,
        compression="zstd",
        nar_hash=Hash("sha256", plain.digest()),
        nar_size=nar_size(tree),
        references=tuple(sorted(references)),
        file_hash=file_hash,
        file_size=size,
    )
    info = _signed(unsigned, key)
    (cache / f"{path.hash_part}.ls").write_bytes(write_listing(tree))
    (cache / f"{path.hash_part}.narinfo").write_bytes(write_narinfo(info))
    return info


def _signed(info: UnverifiedPathInfo, key: SecretKey) -> UnverifiedPathInfo:
    return replace(info, signatures=(key.sign(fingerprint(info)),))
