"""A binary cache of signed store paths with known NARs: what real Nix would write, made in a moment and of any content.

::

    cache = SignedCache(directory, [make_path("victim", size=3_000_001), ...])
    cache.directory, cache.key           # to be served, and to be trusted
    cache.file("victim", "nar")          # "/nar/....nar", as it stands in a request
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import zstandard

from veneer.formats.listing import write_listing
from veneer.formats.nar import nar_of, tree_of_nar
from veneer.formats.narinfo import write_narinfo
from veneer.formats.signature import SecretKey, fingerprint
from veneer.model.hashes import Hash
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath
from veneer.model.tree import Directory, Node, RegularFile, Symlink

_PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "zstd": zstandard.ZstdCompressor(level=1).compress,
    "xz": lambda data: lzma.compress(data, preset=0),
}


@dataclass(frozen=True, slots=True)
class MadePath:
    """A store path: a directory with a program, a file ``data`` and a link."""

    path: StorePath
    nar: bytes
    tree: Node
    data: bytes


def make_path(name: str, size: int = 10_001) -> MadePath:
    """``size``: of ``data``, whose content is no zeros and compresses badly."""
    seed = hashlib.sha256(name.encode()).digest()
    data = hashlib.shake_256(seed).digest(size)
    contents = {9: b"#!/bin/sh", size: data}
    assert size != 9
    tree = Directory(
        (
            (b"a-program", RegularFile(9, executable=True, offset=0)),
            (b"data", RegularFile(size, executable=False, offset=0)),
            (b"link", Symlink(b"data")),
        )
    )
    nar = b"".join(nar_of(tree, lambda file: [contents[file.size]]))
    return MadePath(StorePath(seed.hex()[:32].replace("e", "z"), name), nar, tree_of_nar([nar]), data)


def make_files(name: str, files: Mapping[str, bytes | Symlink]) -> MadePath:
    """``files``: where they stand -> what they are. All are executable."""
    files = dict(sorted(files.items(), key=lambda file: [name.encode() for name in file[0].split("/")]))
    contents: list[bytes] = []

    def directory(prefix: str) -> Directory:
        entries: dict[bytes, Node] = {}
        for path, what in files.items():
            below, _, rest = path.removeprefix(prefix).partition("/")
            if not path.startswith(prefix) or below.encode() in entries:
                continue
            if rest:
                entries[below.encode()] = directory(f"{prefix}{below}/")
            elif isinstance(what, Symlink):
                entries[below.encode()] = what
            else:
                entries[below.encode()] = RegularFile(len(what), executable=True, offset=0)
                contents.append(what)
        return Directory(tuple(entries.items()))

    tree = directory("")
    in_order = iter(contents)
    nar = b"".join(nar_of(tree, lambda _: [next(in_order)]))
    digest = hashlib.sha256(name.encode()).hexdigest()[:32].replace("e", "z")
    return MadePath(StorePath(digest, name), nar, tree_of_nar([nar]), b"".join(contents))


class SignedCache:
    """Files below ``directory``. ``compression``: none, zstd or xz. ``references``: name of a path -> names of paths."""

    def __init__(
        self,
        directory: Path,
        paths: Sequence[MadePath],
        *,
        compression: str = "none",
        sized: bool = True,
        listings: bool = True,
        secret: SecretKey | None = None,
        references: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.directory = directory
        self.secret = secret or SecretKey.generate("made-1")
        self.paths = {made.path.name: made for made in paths}
        self.infos: dict[str, UnverifiedPathInfo] = {}
        (directory / "nar").mkdir(parents=True)
        (directory / "nix-cache-info").write_bytes(b"StoreDir: /nix/store\n")
        for made in paths:
            packed = _PACKERS[compression](made.nar)
            info = UnverifiedPathInfo(
                made.path,
                f"nar/{made.path.hash_part}.nar",
                compression,
                Hash("sha256", hashlib.sha256(made.nar).digest()),
                len(made.nar),
                references=tuple(
                    self.paths[name].path for name in (references or {}).get(made.path.name, ())
                ),
                file_hash=Hash("sha256", hashlib.sha256(packed).digest()) if sized else None,
                file_size=len(packed) if sized else None,
            )
            info = replace(info, signatures=(self.secret.sign(fingerprint(info)),))
            self.infos[made.path.name] = info
            (directory / f"{made.path.hash_part}.narinfo").write_bytes(write_narinfo(info))
            (directory / info.url).write_bytes(packed)
            if listings:
                (directory / f"{made.path.hash_part}.ls").write_bytes(write_listing(made.tree))

    @property
    def key(self) -> str:
        return str(self.secret.public_key())

    @property
    def url(self) -> str:
        return f"file://{self.directory}"

    def file(self, name: str, kind: str) -> str:
        """The path of a request for the narinfo, ls or nar of a store path."""
        info = self.infos[name]
        return f"/{info.url}" if kind == "nar" else f"/{info.store_path.hash_part}.{kind}"

    def nar(self, name: str) -> Path:
        """The compressed file."""
        return self.directory / self.infos[name].url

    def body(self, name: str, kind: str) -> bytes:
        return (self.directory / self.file(name, kind).lstrip("/")).read_bytes()
