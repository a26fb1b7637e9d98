"""Nix's own xz with ``parallel-compression`` has blocks, and we decompress each by itself."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.support.nix import RealNix
from veneer.formats.narinfo import parse_narinfo
from veneer.formats.seekable_zstd import Frame
from veneer.sources.compression import open_decoder
from veneer.sources.frames import TailKeeper, decode_frame, find_frames

pytestmark = pytest.mark.nix

MIB = 1 << 20


def found(search: Generator[tuple[int, int], bytes, tuple[Frame, ...] | None], file: bytes) -> list[Frame]:
    try:
        offset, size = next(search)
        while True:
            offset, size = search.send(file[offset : offset + size])
    except StopIteration as end:
        return list(end.value or ())


@pytest.mark.parametrize("parallel", [True, False])
def test_blocks_of_a_nar_compressed_in_parallel(real_nix: RealNix, tmp_path: Path, parallel: bool) -> None:
    if parallel and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor: Nix writes one block")
    content = tmp_path / "content"
    content.write_bytes(random.Random(1).randbytes(MIB // 2) * 14)
    path = real_nix.run("nix-store", "--add", content).strip()
    cache = tmp_path / "cache"
    options = f"compression=xz&compression-level=1&parallel-compression={str(parallel).lower()}"
    real_nix.copy([path], f"file://{cache}?{options}")
    [narinfo] = cache.glob("*.narinfo")
    info = parse_narinfo(narinfo.read_bytes())
    file = (cache / info.url).read_bytes()
    keeper = TailKeeper(io.BytesIO(file))
    decoder = open_decoder("xz", keeper)
    whole = b"".join(iter(lambda: decoder.read(MIB), b""))
    assert len(whole) == info.nar_size

    frames = found(find_frames("xz", len(file), info.nar_size), file)

    assert tuple(frames) == (keeper.frames("xz", info.nar_size) or ())
    if parallel:  # three times the dictionary of the level: 24 MiB at Nix's own
        assert [frame.size for frame in frames] == [3 * MIB, 3 * MIB, info.nar_size - 6 * MIB]
        parts = [(file[f.compressed_offset :][: f.compressed_size], f.size) for f in frames]
        assert b"".join(decode_frame("xz", *part) for part in parts) == whole
    else:
        assert not frames
