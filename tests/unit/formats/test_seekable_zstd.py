"""The seek table at the end of a zstd file."""

from __future__ import annotations

import contextlib
import io
import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from veneer.formats.seekable_zstd import (
    FOOTER_SIZE,
    MAX_FRAME_SIZE,
    Frame,
    parse_seek_table,
    table_size,
    write_seek_table,
)
from veneer.model.errors import FormatError, LimitError

SIZES = [(100, 1000), (7, 0), (50, 5000)]
GOLDEN = bytes.fromhex(
    "5e2a4d18 19000000 64000000e8030000 3200000088130000 02000000 00 b1ea928f".replace(" ", "")
)


@given(st.lists(st.tuples(st.integers(1, 1 << 31), st.integers(0, MAX_FRAME_SIZE)), max_size=20))
def test_what_is_written_is_read_back(sizes: list[tuple[int, int]]) -> None:
    table = write_seek_table(sizes)
    assert table_size(table[-FOOTER_SIZE:]) == len(table)
    frames = parse_seek_table(table, file_size=sum(c for c, _ in sizes) + len(table))
    assert [(f.compressed_size, f.size) for f in frames] == sizes


def test_frames_lie_one_after_the_other() -> None:
    table = write_seek_table(SIZES)
    assert parse_seek_table(table, file_size=157 + len(table)) == (
        Frame(0, 100, 0, 1000),
        Frame(100, 7, 1000, 0),
        Frame(107, 50, 1000, 5000),
    )


def test_bytes_are_those_of_the_specification() -> None:
    assert write_seek_table([(100, 1000), (50, 5000)]) == GOLDEN


def test_zstd_skips_the_table() -> None:
    frames = [zstandard.ZstdCompressor().compress(text) for text in (b"one", b"two")]
    file = b"".join(frames) + write_seek_table([(len(frame), 3) for frame in frames])
    reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(file), read_across_frames=True)
    assert reader.read() == b"onetwo"


def test_checksums_of_others_are_passed_over() -> None:
    entries = struct.pack("<III", 10, 20, 0xABCDEF)
    table = struct.pack("<II", 0x184D2A5E, 21) + entries + struct.pack("<IBI", 1, 0x83, 0x8F92EAB1)
    assert table_size(table[-FOOTER_SIZE:]) == len(table)
    assert parse_seek_table(table, file_size=10 + len(table)) == (Frame(0, 10, 0, 20),)


@pytest.mark.parametrize("footer", [b"", b"\0" * FOOTER_SIZE, b"\xb1\xea\x92\x8f"])
def test_a_file_without_a_table_is_told(footer: bytes) -> None:
    assert table_size(footer) is None


def test_a_table_of_another_file_is_refused() -> None:
    with pytest.raises(FormatError, match="a file of 183 bytes"):
        parse_seek_table(GOLDEN, file_size=192)


@pytest.mark.parametrize(
    "table",
    [
        GOLDEN[:-1],
        GOLDEN[1:],
        GOLDEN + b"\0",
        b"\x5f" + GOLDEN[1:],
        GOLDEN[:4] + b"\x1a" + GOLDEN[5:],
        GOLDEN[:-5] + b"\x04" + GOLDEN[-4:],
        GOLDEN[:8] + bytes(4) + GOLDEN[12:],
        GOLDEN[:12] + b"\xff\xff\xff\xff" + GOLDEN[16:],
    ],
)
def test_damaged_tables_are_refused(table: bytes) -> None:
    with pytest.raises(FormatError):
        parse_seek_table(table, file_size=150 + len(GOLDEN))


def test_a_footer_that_claims_too_many_frames_is_refused_before_anything_is_asked_for() -> None:
    with pytest.raises(LimitError):
        table_size(struct.pack("<IBI", 0x8000001, 0, 0x8F92EAB1))


@given(st.binary(max_size=200))
def test_any_bytes_are_accepted_or_refused(data: bytes) -> None:
    with contextlib.suppress(FormatError):
        parse_seek_table(data, file_size=1000)


def test_frames_that_have_no_place_in_the_table_are_refused() -> None:
    for sizes in ([(0, 1)], [(1, MAX_FRAME_SIZE + 1)], [(1 << 32, 1)]):
        with pytest.raises(LimitError):
            write_seek_table(sizes)
