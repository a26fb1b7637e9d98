"""A NAR as independent zstd frames with a seek table at the end: an ordinary ``.nar.zst`` that can be read in parts.

A file that is at least ``frame_size`` bytes long begins a frame of its own and is cut into frames of half of it: in whole frame
sizes, from one to LARGEST of them. Smaller files share a frame of at most ``frame_size`` with their neighbours and are never
cut. A NAR that is no longer than the longest frame is one (``cut``). So reading a small file out of many costs one small frame,
and frames are long enough to compress well where all is read anyway.

Equal trees, options and zstd give equal bytes. Frames are compressed by a pool of threads that all NARs under way
share; each NAR has at most ``window`` frames in memory.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import zstandard

from veneer.formats.chunk_map import MAX_CHUNK, Chunk, place_chunks
from veneer.formats.nar import nar_size
from veneer.formats.seekable_zstd import write_seek_table
from veneer.model.errors import UsageError
from veneer.model.hashes import Hash
from veneer.model.tree import Node

from .contents import Nar, files_of

DEFAULT_FRAME_SIZE = 256 << 10
LARGEST = 4
"""Frame sizes that the frames of the largest files are long."""
DEFAULT_LEVEL = 3
"""Nix's own."""
MIN_FRAME_SIZE = 4 << 10
LEVELS = range(1, 23)
_WINDOW_PER_JOB = 2


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of a NAR. Hashes and sizes of the NAR itself, and of the file that was written."""

    nar_hash: Hash
    nar_size: int
    file_hash: Hash
    file_size: int
    chunks: tuple[Chunk, ...]


class Encoder:
    """Options and threads of encoding. ``encode`` may be called from several threads. Close it."""

    def __init__(
        self, *, level: int = DEFAULT_LEVEL, frame_size: int = DEFAULT_FRAME_SIZE, jobs: int = 1
    ) -> None:
        """``frame_size`` in bytes, of a small frame; ``jobs``: frames compressed at once. UsageError."""
        if level not in LEVELS:
            raise UsageError(f"not a zstd level: {level}", hint=f"{LEVELS[0]} to {LEVELS[-1]}")
        if not MIN_FRAME_SIZE <= frame_size <= MAX_CHUNK // LARGEST:
            raise UsageError(
                f"frames of {frame_size} bytes cannot be written",
                hint=f"{MIN_FRAME_SIZE} to {MAX_CHUNK // LARGEST} bytes",
            )
        self._parameters = _parameters(level, LARGEST * frame_size)
        self._frame_size = frame_size
        self._window = _WINDOW_PER_JOB * jobs
        self._pool = ThreadPoolExecutor(jobs, "encode")
        self._own = threading.local()

    def encode(self, tree: Node, nar: Nar, out: BinaryIO) -> Encoded:
        """Write ``nar``, which is that of ``tree``, into ``out``.

        Whether it is the NAR that was meant is for the caller to see, by its hash and size.
        """
        plain, encoded = hashlib.sha256(), hashlib.sha256()
        size = file_size = 0
        rows: list[tuple[int, int, bytes]] = []
        pending: deque[Future[tuple[bytes, int, bytes]]] = deque()

        def write(data: bytes) -> None:
            nonlocal file_size
            encoded.update(data)
            out.write(data)
            file_size += len(data)

        def finish_one() -> None:
            frame, length, digest = pending.popleft().result()
            write(frame)
            rows.append((len(frame), length, digest))

        try:
            for part in nar(cut(tree, self._frame_size)):
                plain.update(part)
                size += len(part)
                pending.append(self._pool.submit(self._compress, part))
                if len(pending) >= self._window:
                    finish_one()
            while pending:
                finish_one()
        finally:
            for future in pending:
                future.cancel()
        write(write_seek_table([row[:2] for row in rows]))
        return Encoded(
            Hash("sha256", plain.digest()),
            size,
            Hash("sha256", encoded.digest()),
            file_size,
            place_chunks(rows),
        )

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _compress(self, part: bytes) -> tuple[bytes, int, bytes]:
        """(frame, uncompressed size, digest of the uncompressed bytes)."""
        compressor: zstandard.ZstdCompressor | None = getattr(self._own, "compressor", None)
        if compressor is None:  # one serves one thread
            compressor = self._own.compressor = zstandard.ZstdCompressor(compression_params=self._parameters)
        return compressor.compress(part), len(part), hashlib.sha256(part).digest()


def cut(tree: Node, frame_size: int) -> Iterator[int]:
    """Where each frame of the NAR of a tree with canonical offsets ends, ascending; the last is the NAR's size."""
    size = nar_size(tree)
    if size <= LARGEST * frame_size:
        yield size
        return
    start = 0
    for file in files_of(tree):
        offset, end = file.offset, file.offset + file.size
        while start + frame_size < offset:
            start += frame_size
            yield start
        if start < offset and (file.size >= frame_size or end > start + frame_size):
            start = offset
            yield start
        step = frame_size * min(LARGEST, max(1, file.size // 2 // frame_size))
        while start + step < end:
            start += step
            yield start
        if start + frame_size < end:
            start = end
            yield start
    while start + frame_size < size:
        start += frame_size
        yield start
    yield size


def _parameters(level: int, longest: int) -> zstandard.ZstdCompressionParameters:
    """Zstd's own for the level, fitted to frames that have nothing before them to refer to.

    Where it looks for matches of 5 bytes in two hash tables (levels 3 and 4), matches of 4 and larger tables give frames that are
    1 to 2 % smaller in the same time.
    """
    given = zstandard.ZstdCompressionParameters.from_level(level, source_size=longest)
    if given.strategy != zstandard.STRATEGY_DFAST:
        return given
    return zstandard.ZstdCompressionParameters.from_level(
        level,
        source_size=longest,
        min_match=4,
        hash_log=max(18, given.hash_log),
        chain_log=max(17, given.chain_log),
    )
