"""Any bytes are decoded or refused with FormatError; what was encoded comes back."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable

import brotli
import lz4.frame
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.model.errors import FormatError
from veneer.sources.compression import FrameScanner, open_decoder

ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "xz": lambda data: lzma.compress(data, preset=0),
    "zstd": lambda data: zstandard.ZstdCompressor(level=1, write_checksum=True).compress(data),
    "br": lambda data: brotli.compress(data, quality=1),
    "bzip2": bz2.compress,
    "gzip": gzip.compress,
    "lz4": lambda data: lz4.frame.compress(data, content_checksum=True),
}
NAMES = st.sampled_from(sorted(ENCODERS))
CONTENT = st.one_of(st.binary(max_size=2000), st.binary(min_size=1, max_size=30).map(lambda unit: unit * 500))


def drain(name: str, data: bytes, size: int) -> bytes:
    decoder = open_decoder(name, io.BytesIO(data))
    out = bytearray()
    while piece := decoder.read(size):
        out += piece
        assert len(piece) <= size
        assert len(out) < 1 << 30
    return bytes(out)


@given(name=NAMES, content=CONTENT, size=st.integers(1, 5000))
def test_round_trip(name: str, content: bytes, size: int) -> None:
    assert drain(name, ENCODERS[name](content), size) == content


@given(name=NAMES, data=st.binary(max_size=500))
def test_random_bytes_are_refused_or_decoded(name: str, data: bytes) -> None:
    try:
        drain(name, data, 4096)
    except FormatError:
        return


@settings(max_examples=200)
@given(name=NAMES, content=CONTENT, at=st.integers(0, 1 << 20), flip=st.integers(1, 255))
def test_a_changed_byte_is_refused_or_decoded(name: str, content: bytes, at: int, flip: int) -> None:
    data = bytearray(ENCODERS[name](content))
    data[at % len(data)] ^= flip
    try:
        drain(name, bytes(data), 4096)
    except FormatError:
        return


@given(name=NAMES, content=CONTENT, cut=st.floats(0, 1, exclude_max=True))
def test_a_cut_is_always_refused(name: str, content: bytes, cut: float) -> None:
    data = ENCODERS[name](content)
    try:
        drain(name, data[: int(len(data) * cut)], 4096)
    except FormatError:
        return
    raise AssertionError("a cut stream was taken for a whole one")


@given(data=st.binary(max_size=300), step=st.integers(1, 50))
def test_frame_scanner_survives_any_bytes(data: bytes, step: int) -> None:
    scanner = FrameScanner()
    try:
        for at in range(0, len(data), step):
            scanner.feed(data[at : at + step])
    except FormatError:
        return
