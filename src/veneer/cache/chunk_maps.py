"""What is known of the chunks of NARs: where each lies in a source's file, and its digest. Rows of the index.

C3  A chunk map is kept under a path number until that is retired, whatever becomes of the NAR: after eviction it says what can
    be fetched in parts and how to check it. Who may use it follows from ``signatures``, ``source`` and ``learnt`` (``store.parts``).
"""

from __future__ import annotations

from dataclasses import dataclass

from veneer.formats.chunk_map import Chunk, parse_table, place_chunks, write_table
from veneer.model.errors import FormatError

from .index import Index, NarState

HOLDERS = 4
"""Places of one digest that are looked at."""


@dataclass(frozen=True, slots=True)
class ChunkMap:
    """The chunks of one NAR, in the file ``url`` of ``source``. Digests: SHA-256 of the uncompressed bytes.

    ``signatures``: of a published chunk map. ``learnt``: the digests are of a NAR that was verified whole here.
    ``present``: a byte per chunk of the sparse file; None: there is none.
    """

    source: str
    url: str
    compression: str
    chunks: tuple[Chunk, ...]
    signatures: tuple[str, ...] = ()
    learnt: bool = False
    present: bytes | None = None


class ChunkMaps:
    """The chunk maps of one index; on its thread."""

    def __init__(self, index: Index) -> None:
        self._db = index.database

    def get(self, number: int) -> ChunkMap | None:
        found = self._db.one(
            "SELECT m.source, m.url, m.compression, m.base, m.chunks, m.signatures, m.learnt, m.present, p.nar_size"
            " FROM chunk_maps m JOIN paths p USING (number) WHERE number = ?",
            (number,),
        )
        if found is None:
            return None
        source, url, compression, base, table, signatures, learnt, present, nar_size = found
        try:
            chunks = parse_table(table, nar_size)
        except FormatError:
            return None  # damaged: asked for again
        if present is not None and len(present) != len(chunks):
            return None
        if base:
            chunks = place_chunks([(c.compressed_size, c.size, c.digest) for c in chunks], base)
        return ChunkMap(source, url, compression, chunks, tuple(signatures.split()), bool(learnt), present)

    def put(self, number: int, chunk_map: ChunkMap) -> None:
        """In place of an earlier one. A sparse file that was written by that must be gone."""
        base = chunk_map.chunks[0].compressed_offset
        with self._db.change():
            self._db.run("DELETE FROM chunk_places WHERE number = ?", (number,))
            self._db.run(
                "INSERT OR REPLACE INTO chunk_maps"
                " (number, source, url, compression, base, chunks, signatures, learnt, present)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL)",
                (
                    number,
                    chunk_map.source,
                    chunk_map.url,
                    chunk_map.compression,
                    base,
                    write_table(chunk_map.chunks),
                    "\n".join(chunk_map.signatures),
                    chunk_map.learnt,
                ),
            )
            self._db.run_many(
                "INSERT INTO chunk_places (digest, number, ordinal) VALUES (?, ?, ?)",
                [(_key(chunk.digest), number, at) for at, chunk in enumerate(chunk_map.chunks)],
            )

    def any(self) -> bool:
        """Whether there is any chunk map."""
        return self._db.one("SELECT 1 FROM chunk_maps LIMIT 1") is not None

    def elsewhere(self, number: int) -> list[int]:
        """Ordinals of the number's chunks that whole NARs hold, too: one question for all of them, each digest looked for once."""
        found = self._db.all(
            "WITH mine AS (SELECT DISTINCT digest FROM chunk_places WHERE number = ?1)"
            " SELECT ordinal FROM chunk_places WHERE number = ?1 AND digest IN ("
            " SELECT digest FROM mine WHERE EXISTS ("
            " SELECT 1 FROM chunk_places c JOIN paths p USING (number)"
            " WHERE c.digest = mine.digest AND c.number <> ?1 AND p.nar = ?2 AND p.quarantined = 0))",
            (number, NarState.WHOLE),
        )
        return [int(ordinal) for (ordinal,) in found]

    def holders(self, digest: bytes, but: int) -> list[tuple[int, int]]:
        """(path number, ordinal) of chunks that may have this digest and be here, of others than number ``but``."""
        found = self._db.all(
            "SELECT c.number, c.ordinal FROM chunk_places c JOIN paths p USING (number)"
            " WHERE c.digest = ? AND c.number <> ? AND p.nar <> 0 AND p.quarantined = 0 LIMIT ?",
            (_key(digest), but, HOLDERS),
        )
        return [(int(number), int(ordinal)) for number, ordinal in found]


def _key(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little", signed=True)
