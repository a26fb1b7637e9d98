"""Where the chunks of a NAR lie and what they must hash to: which chunk map a view may use for a candidate's file.

In this order: a chunk map that is kept and that the view has reason to believe (it was learnt from a whole verified NAR, or a key of this
view signed it); the published one, if a key of the view signed it; for a view that defers the verification of the source, the
frames that the file tells of, without digests.
"""

from __future__ import annotations

from dataclasses import replace

from veneer.cache.chunk_maps import ChunkMap
from veneer.cache.index import PathRow
from veneer.formats import chunk_map as published
from veneer.formats.chunk_map import Chunk, UnverifiedChunkMap, parse_chunk_map
from veneer.formats.seekable_zstd import Frame
from veneer.model.errors import FormatError, TrustError
from veneer.model.path_info import UnverifiedPathInfo
from veneer.sources.frames import find_frames
from veneer.sources.nar_stream import expected_size

from .account import Account
from .remembered import RememberedSource
from .resolve import Candidate
from .verify import SignatureMemory, check_chunk_map
from .views import View

MAX_CHUNKS = 1 << 16
"""Of a NAR that is fetched in parts: 16 GiB in the usual chunks."""
_UNKNOWN = bytes(32)


class ChunkFinder:
    """Asks nobody about a file whose map is kept."""

    def __init__(self, memory: SignatureMemory) -> None:
        self._memory = memory

    async def find(
        self, view: View, row: PathRow, candidate: Candidate, kept: ChunkMap | None, account: Account
    ) -> tuple[ChunkMap, bool] | None:
        """(chunk map, whether it has digests) of the candidate's file; None when there is none that the view may use.

        ``kept``: what is known of the path's chunks. FormatError, TrustError, SourceError, RangesUnsupportedError.
        """
        info, source = candidate.info.info, candidate.source
        is_of_file = kept is not None and (kept.url, kept.compression) == (info.url, info.compression)
        if kept is not None and is_of_file and (kept.learnt or self._vouched(view, info, kept, source.url)):
            return replace(kept, source=source.url), True
        if published.is_announced(info) and info.compression == "zstd":
            meter = account.meter(row.store_path)
            data = await source.sidecar(row.store_path.hash_part, published.SUFFIX, published.MAX_SIZE, meter)
            if data is not None:
                unverified = parse_chunk_map(data, store_dir=info.store_dir)
                if not unverified.belongs_to(info):
                    raise FormatError(
                        f"the chunk map of {row.store_path} is of another NAR", where=source.url
                    )
                check_chunk_map(
                    view.policy,
                    unverified,
                    self._memory,
                    source_url=source.url,
                    source_trusted=source.url in view.trusted,
                )
                chunk_map = ChunkMap(
                    source.url, info.url, info.compression, unverified.chunks, unverified.signatures
                )
                return (chunk_map, True) if len(chunk_map.chunks) <= MAX_CHUNKS else None
        if source.url not in view.deferred:
            return None
        frames = await self._frames(candidate, account)
        if frames is None or len(frames) > MAX_CHUNKS:
            return None
        chunks = tuple(
            Chunk(f.compressed_offset, f.compressed_size, f.offset, f.size, _UNKNOWN) for f in frames
        )
        return ChunkMap(source.url, info.url, info.compression, chunks), False

    def expect(self, candidate: Candidate, account: Account) -> None:
        """Ask for the file's chunk map now: ``find`` will want it."""
        info, source = candidate.info.info, candidate.source
        if (
            published.is_announced(info)
            and info.compression == "zstd"
            and isinstance(source, RememberedSource)
        ):
            source.expect_sidecar(
                info.store_path.hash_part, published.SUFFIX, published.MAX_SIZE, account.book_metadata
            )

    def _vouched(self, view: View, info: UnverifiedPathInfo, kept: ChunkMap, source_url: str) -> bool:
        """Whether the view believes a chunk map that another one may have brought.

        What is believed of a source without a signature is not believed of one that the view may not even know.
        """
        is_own = kept.source == source_url
        policy = view.policy if is_own else replace(view.policy, require_signatures=True)
        unverified = UnverifiedChunkMap(
            store_path=info.store_path,
            nar_hash=info.nar_hash,
            nar_size=info.nar_size,
            url=kept.url,
            chunks=kept.chunks,
            signatures=kept.signatures,
            store_dir=info.store_dir,
        )
        try:
            check_chunk_map(
                policy,
                unverified,
                self._memory,
                source_url=kept.source,
                source_trusted=is_own and source_url in view.trusted,
            )
        except TrustError:
            return False
        return True

    async def _frames(self, candidate: Candidate, account: Account) -> tuple[Frame, ...] | None:
        """What the file tells of itself. FormatError, SourceError, RangesUnsupportedError."""
        info = candidate.info.info
        size = expected_size(info)
        assert size is not None
        search = find_frames(info.compression, size, info.nar_size)
        try:
            wanted = next(search)
            while True:
                meter = account.meter(info.store_path)
                wanted = search.send(await candidate.source.part(info, *wanted, meter))
        except StopIteration as found:
            frames: tuple[Frame, ...] | None = found.value
            return frames
