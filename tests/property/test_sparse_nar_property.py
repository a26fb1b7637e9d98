"""A sparse NAR against a model: written, killed and powered off at any step, it never calls a chunk present that is not right."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.caches import Clock, open_cache
from veneer.cache.cache import Cache
from veneer.cache.chunk_maps import ChunkMap, ChunkMaps
from veneer.cache.index import NarState
from veneer.cache.sparse import SparseNar
from veneer.formats.chunk_map import place_chunks
from veneer.model.hashes import Hash
from veneer.model.store_path import StorePath

SIZES = (5000, 1, 4096, 9000, 12_288, 777)
PARTS = [hashlib.shake_256(bytes([i])).digest(size) for i, size in enumerate(SIZES)]
NAR = b"".join(PARTS)
CHUNKS = place_chunks([(len(part), len(part), hashlib.sha256(part).digest()) for part in PARTS])
PATH = StorePath("0" * 32, "sparse")
HASH = Hash("sha256", hashlib.sha256(NAR).digest())

ordinals = st.integers(0, len(PARTS) - 1)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("land"), st.lists(ordinals, min_size=1, unique=True)),
        st.tuples(st.just("killed while writing"), ordinals),
        st.tuples(st.just("sync"), st.none()),
        st.tuples(st.just("restart"), st.none()),
        st.tuples(st.just("power loss"), st.sets(ordinals)),
        st.tuples(st.just("lost file"), st.none()),
        st.tuples(st.just("evict"), st.none()),
    ),
    max_size=12,
)


class Machine:
    """A cache with one sparse NAR. ``synced``: ordinals that a power loss cannot take."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.boots = 0
        self.cache = self.opened()
        self.number = self.cache.index.add_path(PATH, HASH, len(NAR), 1.0).number
        ChunkMaps(self.cache.index).put(self.number, ChunkMap("source", "url", "none", CHUNKS))
        self.nar: SparseNar | None = None
        self.synced: set[int] = set()
        self.landed: set[int] = set()

    def opened(self) -> Cache:
        return open_cache(self.root, Clock(), boot=f"boot-{self.boots}")

    def sparse(self) -> SparseNar:
        if self.nar is None:
            known = ChunkMaps(self.cache.index).get(self.number)
            assert known is not None
            self.nar = self.cache.nars.sparse(self.number, known.chunks, known.present)
        return self.nar

    def land(self, wanted: list[int]) -> None:
        nar = self.sparse()
        for at in wanted:
            nar.write(at, PARTS[at])
        nar.landed(wanted)
        self.cache.index.set_nar(self.number, NarState.SPARSE, nar.disk_size, bytes(nar.present))
        self.landed.update(wanted)

    def close(self) -> None:
        if self.nar is not None:
            self.nar.finish()
            self.nar = None
        self.cache.close()

    def restart(self) -> None:
        self.close()
        self.cache = self.opened()

    def power_loss(self, lost: set[int]) -> None:
        """Of what was not synced, some is zeros now; the rows were kept, as after an unlucky order of writes."""
        self.close()
        file = self.root / self.cache.nars.files(self.number)[1]
        if file.exists():
            with open(file, "r+b", buffering=0) as out:
                for at in lost - self.synced:
                    os.pwrite(out.fileno(), bytes(SIZES[at]), CHUNKS[at].offset)
        self.boots += 1
        self.cache = self.opened()

    def check(self) -> None:
        """Every chunk that is called present is right."""
        known = ChunkMaps(self.cache.index).get(self.number)
        row = self.cache.index.path(self.number)
        assert known is not None and row is not None
        file = self.cache.nars.files(self.number)[1]
        if row.nar is not NarState.SPARSE:
            assert known.present is None
            self.landed.clear()
            self.synced.clear()
            return
        assert known.present is not None
        data = file.read_bytes()
        assert len(data) == len(NAR)
        present = {at for at, here in enumerate(known.present) if here}
        assert present <= self.landed
        for at in present:
            chunk = CHUNKS[at]
            assert data[chunk.offset : chunk.offset + chunk.size] == PARTS[at]
        self.landed = present
        self.synced &= present
        nar = self.sparse()
        assert nar.held == sum(SIZES[at] for at in present)
        for at in present:
            span = nar.around(CHUNKS[at].offset, CHUNKS[at].offset + 1)
            assert span is not None and data[span[0] : span[1]] == NAR[span[0] : span[1]]


@settings(max_examples=60, deadline=None)
@given(steps)
def test_what_a_sparse_nar_calls_present_is_right_after_any_crash(history: list[tuple[str, object]]) -> None:
    with tempfile.TemporaryDirectory() as root:
        machine = Machine(Path(root) / "cache")
        try:
            for step, argument in history:
                if step == "land":
                    assert isinstance(argument, list)
                    machine.land(argument)
                elif step == "killed while writing":
                    assert isinstance(argument, int)
                    machine.sparse().write(argument, PARTS[argument])  # no row tells of it
                    machine.restart()
                elif step == "sync":
                    machine.cache.end_sync(machine.cache.begin_sync().run())
                    machine.synced = set(machine.landed)
                elif step == "restart":
                    machine.restart()
                elif step == "power loss":
                    assert isinstance(argument, set)
                    machine.power_loss(argument)
                elif step == "lost file":
                    machine.close()
                    machine.cache.nars.files(machine.number)[1].unlink(missing_ok=True)
                    machine.cache = machine.opened()
                else:
                    if machine.nar is not None:
                        machine.nar.finish()
                        machine.nar = None
                    machine.cache.evict(max_bytes=0)
                machine.check()
        finally:
            machine.close()
