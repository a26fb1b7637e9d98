"""A cache as ``veneer publish`` writes it, of paths with known content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.signed_cache import MadePath
from veneer.formats.chunk_map import SUFFIX
from veneer.formats.narinfo import parse_narinfo
from veneer.formats.signature import SecretKey
from veneer.model.hashes import Hash
from veneer.model.path_info import UnverifiedPathInfo
from veneer.publish.contents import Content, in_pieces
from veneer.publish.encode import LARGEST, Encoder
from veneer.publish.plan import make_plan
from veneer.publish.target import open_target
from veneer.publish.upload import Publisher, begin_cache
from veneer.sources.options import parse_source_url

FRAME = 64 << 10


class PublishedCache:
    """Files below ``directory``; large ones have frames of FRAME bytes. ``references``: name of a path -> names of paths.
    ``roots``: those that have a closure bundle."""

    def __init__(
        self,
        directory: Path,
        paths: Sequence[MadePath],
        *,
        secret: SecretKey | None = None,
        frame_size: int = FRAME,
        references: Mapping[str, Sequence[str]] | None = None,
        roots: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        self.secret = secret or SecretKey.generate("made-1")
        self.paths = {made.path.name: made for made in paths}
        by_path = {made.path: made for made in paths}

        @contextmanager
        def contents(info: UnverifiedPathInfo) -> Iterator[Content]:
            made = by_path[info.store_path]
            yield made.tree, in_pieces([made.nar])

        infos = [
            UnverifiedPathInfo(
                made.path,
                "",
                "",
                Hash("sha256", hashlib.sha256(made.nar).digest()),
                len(made.nar),
                tuple(self.paths[name].path for name in (references or {}).get(made.path.name, ())),
            )
            for made in paths
        ]
        with (
            open_target(parse_source_url(str(directory))) as target,
            Encoder(frame_size=frame_size // LARGEST, jobs=2) as encoder,
        ):
            begin_cache(target, "/nix/store")
            publisher = Publisher(target, encoder, contents, key=self.secret, jobs=2)
            publisher.run(make_plan(infos, {}, [self.paths[name].path for name in roots]), lambda _: None)

    @property
    def key(self) -> str:
        return str(self.secret.public_key())

    @property
    def url(self) -> str:
        return f"file://{self.directory}"

    def narinfo(self, name: str) -> Path:
        return self.directory / f"{self.paths[name].path.hash_part}.narinfo"

    def chunk_map(self, name: str) -> Path:
        return self.directory / f"{self.paths[name].path.hash_part}{SUFFIX}"

    def nar(self, name: str) -> Path:
        """The compressed file."""
        return self.directory / parse_narinfo(self.narinfo(name).read_bytes()).url
