"""Decoders of NAR compression: what they accept, what they refuse, and that memory stays bounded."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tracemalloc
import zlib
from collections.abc import Callable

import brotli
import lz4.frame
import pytest
import zstandard

from veneer.model.errors import FormatError, SourceError
from veneer.sources.compression import FrameScanner, open_decoder

ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "xz": lzma.compress,
    "zstd": lambda data: zstandard.ZstdCompressor(level=1).compress(data),
    "br": lambda data: brotli.compress(data, quality=1),
    "bzip2": bz2.compress,
    "": bz2.compress,
    "gzip": gzip.compress,
    "lz4": lz4.frame.compress,
}
COMPRESSED = [name for name in ENCODERS if name != "none"]
CONCATENATED = [name for name in COMPRESSED if name != "br"]
CONTENT = b"".join(i.to_bytes(4, "big") * (i % 7) for i in range(40_000))


class Pieces(io.RawIOBase):
    """Gives ``data`` in reads of at most ``step`` bytes, as a socket would."""

    def __init__(self, data: bytes, step: int) -> None:
        self._data = memoryview(data)
        self._step = step

    def read(self, size: int = -1, /) -> bytes:
        size = self._step if size < 0 else min(size, self._step)
        piece, self._data = bytes(self._data[:size]), self._data[size:]
        return piece


def decode(name: str, data: bytes, *, step: int = 1 << 20, size: int = 1 << 20) -> bytes:
    decoder = open_decoder(name, Pieces(data, step))
    out = bytearray()
    while piece := decoder.read(size):
        assert len(piece) <= size
        out += piece
    assert decoder.read(size) == b""
    return bytes(out)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize(("step", "size"), [(1 << 20, 1 << 20), (7, 4096), (1000, 13), (1 << 20, 1)])
def test_decodes_whatever_the_piece_sizes(name: str, step: int, size: int) -> None:
    content = CONTENT if size > 1000 else CONTENT[:3000]
    assert decode(name, ENCODERS[name](content), step=step, size=size) == content


@pytest.mark.parametrize("name", ENCODERS)
def test_empty_content_decodes_to_nothing(name: str) -> None:
    assert decode(name, ENCODERS[name](b"")) == b""


@pytest.mark.parametrize("name", COMPRESSED)
def test_empty_input_is_truncated(name: str) -> None:
    with pytest.raises(FormatError, match="truncated"):
        decode(name, b"")


@pytest.mark.parametrize("name", CONCATENATED)
@pytest.mark.parametrize("step", [1, 5, 1 << 20])
def test_several_streams_are_one_content(name: str, step: int) -> None:
    parts = [b"one", b"", b"two" * 1000]
    assert decode(name, b"".join(ENCODERS[name](part) for part in parts), step=step) == b"".join(parts)


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_every_truncation_is_an_error(name: str, step: int) -> None:
    data = ENCODERS[name](CONTENT[:500])
    for length in range(len(data)):
        with pytest.raises(FormatError, match="truncated"):
            decode(name, data[:length], step=step)


@pytest.mark.parametrize("name", COMPRESSED)
def test_truncation_in_a_second_stream_is_an_error(name: str) -> None:
    first, second = ENCODERS[name](b"first"), ENCODERS[name](CONTENT[:300])
    for length in range(1, len(second)):
        with pytest.raises(FormatError):
            decode(name, first + second[:length])


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("tail", [b"x", b"garbage after the end", b"\0", b"\0" * 7])
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_trailing_garbage_is_an_error(name: str, tail: bytes, step: int) -> None:
    with pytest.raises(FormatError):
        decode(name, ENCODERS[name](CONTENT[:500]) + tail, step=step)


@pytest.mark.parametrize("step", [1, 1 << 20])
def test_xz_padding_of_whole_words_is_accepted(step: int) -> None:
    data = lzma.compress(b"one") + bytes(8) + lzma.compress(b"two") + bytes(4)
    assert decode("xz", data, step=step) == b"onetwo"


def test_xz_that_asks_for_too_much_memory_is_refused() -> None:
    data = bytearray(lzma.compress(b"x", filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 4096}]))
    data[data.index(b"\x21\x01\x00", 12) + 2] = 36  # the LZMA2 filter's one property: a dictionary of 1 GiB
    end = 12 + (data[12] + 1) * 4 - 4
    data[end : end + 4] = zlib.crc32(data[12:end]).to_bytes(4, "little")
    with pytest.raises(FormatError, match=r"[Mm]emory"):
        decode("xz", bytes(data))


def test_zstd_skippable_frames_are_passed_over() -> None:
    skippable = (0x184D2A5E).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"hello"
    frame = ENCODERS["zstd"](b"content")
    for step in (1, 3, 1 << 20):
        assert (
            decode("zstd", skippable + frame + skippable + frame + skippable, step=step) == b"contentcontent"
        )


def test_zstd_truncated_in_a_skippable_frame_is_an_error() -> None:
    skippable = (0x184D2A5E).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"hello"
    frame = ENCODERS["zstd"](b"content")
    for length in range(1, len(skippable)):
        with pytest.raises(FormatError):
            decode("zstd", frame + skippable[:length])


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("content_size", [False, True])
def test_frame_scanner_knows_every_boundary(checksum: bool, content_size: bool) -> None:
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=checksum, write_content_size=content_size)
    for content in (b"", b"x", bytes(300_000), CONTENT):
        frame = compressor.compress(content)
        for step in (1, 2, 3, 1000, len(frame)):
            scanner = FrameScanner()
            for at in range(0, len(frame), step):
                assert not scanner.complete
                scanner.feed(frame[at : at + step])
            assert scanner.complete


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_bomb_is_read_in_bounded_memory(name: str) -> None:
    bomb = ENCODERS[name](bytes(64 << 20))
    decoder = open_decoder(name, io.BytesIO(bomb))
    tracemalloc.start()
    try:
        total = 0
        while piece := decoder.read(1 << 16):
            assert len(piece) <= 1 << 16
            total += len(piece)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 64 << 20
    assert peak < 16 << 20


@pytest.mark.parametrize("name", COMPRESSED)
def test_errors_of_the_encoded_reader_pass_through(name: str) -> None:
    class Broken:
        def read(self, size: int = -1, /) -> bytes:
            raise SourceError("connection lost")

    with pytest.raises(SourceError, match="connection lost"):
        open_decoder(name, Broken()).read(10)


def test_unknown_compression_is_named_with_the_known_ones() -> None:
    with pytest.raises(FormatError, match="'rar'") as caught:
        open_decoder("rar", io.BytesIO())
    assert "zstd" in caught.value.hint
