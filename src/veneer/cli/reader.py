"""Reading files of store paths from the cache without a mount: trees and NARs that the daemon has published.

Paths are lists of names below the store directory; links are followed as the kernel would, as long as they stay in the store.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from veneer.cli.client import Client
from veneer.cli.output import number
from veneer.formats.tree_index import Entry, Kind, TreeIndex, nar_file, tree_file
from veneer.model.errors import CacheError, NotFoundError, UsageError, VeneerError
from veneer.model.store_path import DEFAULT_STORE_DIR, StorePath

MAX_LINKS = 40
"""Links followed on the way to one file, as in Linux."""
_PIECE = 1 << 20
_ATTEMPTS = 3


class StoreReader:
    """Trees and contents through one client. Trees are kept open until the reader is forgotten."""

    def __init__(self, client: Client, cache_dir: Path) -> None:
        self._client = client
        self._cache_dir = cache_dir
        self._trees: dict[str, TreeIndex] = {}

    def tree(self, basename: str) -> TreeIndex:
        """The tree of a store path. NotFoundError when no source has it."""
        tree = self._trees.get(basename)
        if tree is None:
            descriptor, _ = self._open("tree", basename)
            with open(descriptor, "rb") as file:
                tree = TreeIndex(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self._trees[basename] = tree
        return tree

    def resolve(self, path: list[bytes], *, follow: bool) -> tuple[str, Entry]:
        """(store path, entry) at ``path``; ``follow``: also when the last name is a link. VeneerError when there is none."""
        left = deque(path)
        done: list[bytes] = []
        links = 0
        while left:
            name = left.popleft()
            if name in (b"", b"."):
                continue
            if name == b"..":
                if done:
                    done.pop()
                continue
            done.append(name)
            entry = self._entry(done)
            if entry.kind is Kind.LINK and (left or follow):
                links += 1
                if links > MAX_LINKS:
                    raise VeneerError("too many links", where=_text(path))
                target = self._trees[_basename(done)].target(entry.number)
                done.pop()
                if target.startswith(b"/"):
                    done, target = [], _below_store(target, path)
                left.extendleft(reversed(target.split(b"/")))
        if not done:
            raise UsageError("the path leads to the store directory itself", where=_text(path))
        return _basename(done), self._entry(done)

    def content(self, basename: str, entry: Entry) -> Iterator[bytes]:
        """A regular file's content in pieces, after its whole NAR was verified."""
        for _ in range(_ATTEMPTS):
            descriptor, path_number = self._open("content", basename)
            with open(descriptor, "rb", buffering=0) as file:
                tree = self.tree(basename)
                if tree.number != path_number:
                    # The tree came from a listing that was not that of this NAR: look again.
                    del self._trees[basename]
                    found = self.tree(basename).find(tree.path(entry.number))
                    if found is None or found.kind not in (Kind.FILE, Kind.EXECUTABLE):
                        raise VeneerError("the file is not in the verified content", where=basename)
                    entry = found
                    continue
                yield from _pieces(file.fileno(), entry.offset, entry.size, basename)
                return
        raise CacheError("the cache changes under us", where=basename, hint="try again")

    def nar(self, basename: str) -> int:
        """Descriptor of the whole, verified NAR of a store path; the caller closes it."""
        return self._open("content", basename)[0]

    def _open(self, verb: str, basename: str) -> tuple[int, int]:
        """(descriptor, path number) of a published file; asked again when it was evicted before it could be opened."""
        name = nar_file if verb == "content" else tree_file
        for _ in range(_ATTEMPTS):
            try:
                path_number = number(self._client.control(verb, {"path": basename}), "number")
            except NotFoundError as error:
                where = error.where or f"{DEFAULT_STORE_DIR}/{basename}"
                raise NotFoundError(error.what, where=where, hint=error.hint) from error
            try:
                return os.open(self._cache_dir / name(path_number), os.O_RDONLY | os.O_CLOEXEC), path_number
            except FileNotFoundError:
                continue
            except OSError as error:
                raise CacheError(
                    f"cannot read the cache: {error.strerror}", where=str(self._cache_dir)
                ) from error
        raise CacheError(
            "the cache drops content faster than it can be read", where=basename, hint="raise --max-size"
        )

    def _entry(self, path: list[bytes]) -> Entry:
        entry = self.tree(_basename(path)).find(b"/".join(path[1:]))
        if entry is None:
            raise NotFoundError("no such file in the store path", where=_text(path))
        return entry


def _basename(path: list[bytes]) -> str:
    return StorePath.parse(path[0].decode("ascii", "replace")).basename


def _below_store(target: bytes, path: list[bytes]) -> bytes:
    prefix = DEFAULT_STORE_DIR.encode() + b"/"
    if not target.startswith(prefix):
        raise VeneerError(f"a link leads out of the store, to {os.fsdecode(target)}", where=_text(path))
    return target[len(prefix) :]


def _text(path: list[bytes]) -> str:
    return os.fsdecode(b"/".join([DEFAULT_STORE_DIR.encode(), *path]))


def _pieces(descriptor: int, offset: int, size: int, basename: str) -> Iterator[bytes]:
    while size:
        piece = os.pread(descriptor, min(size, _PIECE), offset)
        if not piece:
            raise CacheError("a NAR in the cache is shorter than its tree says", where=basename)
        yield piece
        offset += len(piece)
        size -= len(piece)
