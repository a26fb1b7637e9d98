"""A closure of small store paths, published as ``veneer publish`` does it, in a moment and without Nix."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from veneer.formats.nar import nar_of
from veneer.formats.signature import SecretKey
from veneer.model.hashes import Hash
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath
from veneer.model.tree import RegularFile
from veneer.publish.contents import Content, in_pieces
from veneer.publish.encode import Encoder
from veneer.publish.plan import make_plan
from veneer.publish.target import open_target
from veneer.publish.upload import Done, Publisher, begin_cache, present
from veneer.sources.options import parse_source_url

SECRET = SecretKey.generate("published-1")


def closure_path(number: int) -> StorePath:
    return StorePath(f"{number:032d}", f"path-{number}")


def closure_text(number: int) -> bytes:
    """The content of a path, which is a file."""
    return b"content of %d\n" % number * 50


def make_closure(count: int) -> list[UnverifiedPathInfo]:
    """The last one is the root. It refers to the first half, and they to the others, each one to one more."""
    half = count // 2
    references: dict[int, Sequence[int]] = dict.fromkeys(range(count), ())
    references |= {number: (number, number + half) for number in range(half - 1)}
    references[count - 1] = range(half)
    return [_info(number, references[number]) for number in range(count)]


def publish_closure(
    directory: Path, infos: Sequence[UnverifiedPathInfo], asked: Iterable[StorePath] | None = None
) -> Done:
    """``asked``: the root, unless said otherwise."""
    with open_target(parse_source_url(str(directory))) as target, Encoder() as encoder:
        begin_cache(target, "/nix/store")
        wanted = [infos[-1].store_path] if asked is None else asked
        plan = make_plan(infos, present(target, infos), wanted)
        return Publisher(target, encoder, _contents, key=SECRET, jobs=4).run(plan, lambda _: None)


def _info(number: int, references: Iterable[int]) -> UnverifiedPathInfo:
    nar = b"".join(nar_of(_file(number), lambda _: [closure_text(number)]))
    digest = Hash("sha256", hashlib.sha256(nar).digest())
    names = tuple(map(closure_path, references))
    return UnverifiedPathInfo(closure_path(number), "", "", digest, len(nar), names)


def _file(number: int) -> RegularFile:
    return RegularFile(len(closure_text(number)), executable=False, offset=96)


@contextmanager
def _contents(info: UnverifiedPathInfo) -> Iterator[Content]:
    number = int(info.store_path.hash_part)
    yield _file(number), in_pieces(nar_of(_file(number), lambda _: [closure_text(number)]))
