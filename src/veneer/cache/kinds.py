"""The kinds of files in the cache: what each is called, which rows promise one, and whether its content is right.

Used by the start after a crash (``recovery``) and by the check of everything (``checking``): both believe the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from veneer.formats.tree_index import TreeIndex, nar_file, sparse_file, tree_file
from veneer.model.errors import FormatError

from .chunk_maps import ChunkMap, ChunkMaps
from .index import FileRow, Index, NarState, PathRow

_PIECE = 1 << 20

Read = Callable[[int], None]
"""Told each number of bytes that was read, from the thread that reads; may raise to end the check."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A file that a row may promise.

    ``file``: its name below the cache directory, from the path's number. ``size``: its bytes, None for not known.
    ``examine(file, row, known, read)``: what is wrong with the open file's content, "" if nothing is; in any thread.
    ``known``: what it needs of the index, from ``look_up``, which runs on the index's thread.
    """

    file: Callable[[int], str]
    promised: Callable[[PathRow | FileRow], bool]
    size: Callable[[PathRow | FileRow], int | None]
    look_up: Callable[[Index, PathRow], Any]
    examine: Callable[[IO[bytes], PathRow, Any, Read], str]


def _wrong_nar(file: IO[bytes], row: PathRow, known: None, read: Read) -> str:
    hasher = row.nar_hash.hasher()
    while piece := file.read(_PIECE):
        hasher.update(piece)
        read(len(piece))
    return "" if hasher.digest() == row.nar_hash.digest else "its hash is not the signed one"


def _wrong_tree(file: IO[bytes], row: PathRow, generation: bytes, read: Read) -> str:
    data = file.read()
    read(len(data))
    try:
        tree = TreeIndex(data)
        tree.verify()
    except FormatError as error:
        return error.what
    if tree.generation != generation:
        return "it belongs to another index"
    if (tree.number, tree.nar_hash, tree.nar_size) != (row.number, row.nar_hash.digest, row.nar_size):
        return "it belongs to another path"
    return ""


def _wrong_chunk(file: IO[bytes], row: PathRow, known: ChunkMap | None, read: Read) -> str:
    if known is None or known.present is None:
        return "nothing says which of its chunks are there"
    for chunk, here in zip(known.chunks, known.present, strict=True):
        if here:
            data = os.pread(file.fileno(), chunk.size, chunk.offset)
            read(len(data))
            if hashlib.sha256(data).digest() != chunk.digest:
                return f"the chunk at {chunk.offset} is not the signed one"
    return ""


KINDS = {
    "tree": Kind(
        tree_file,
        lambda row: row.tree != 0,
        lambda row: row.tree_size or None,
        lambda index, row: index.generation,
        _wrong_tree,
    ),
    "nar": Kind(
        nar_file,
        lambda row: row.nar == NarState.WHOLE,
        lambda row: row.nar_size,
        lambda index, row: None,
        _wrong_nar,
    ),
    "sparse": Kind(
        sparse_file,
        lambda row: row.nar == NarState.SPARSE,
        lambda row: row.nar_size,
        lambda index, row: ChunkMaps(index).get(row.number),
        _wrong_chunk,
    ),
}
"""By name; in the order in which a row's files are looked at."""
