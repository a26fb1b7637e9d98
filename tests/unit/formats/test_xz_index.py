"""The index at the end of an .xz file, and blocks as files of their own."""

from __future__ import annotations

import contextlib
import lzma
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.formats.seekable_zstd import Frame
from veneer.formats.xz_index import (
    CHECK_SIZES,
    FOOTER_SIZE,
    HEADER_SIZE,
    MAX_BLOCKS,
    Footer,
    around,
    parse_footer,
    parse_index,
)
from veneer.model.errors import FormatError, LimitError, TruncatedError

CONTENT = bytes(range(256)) * 40
ONE = lzma.compress(CONTENT)


def number(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def end_of(records: list[tuple[int, int]], *, count: bytes | None = None, tail: bytes = b"") -> bytes:
    """Index and footer, as a writer with these records would make them."""
    index = b"\0" + (number(len(records)) if count is None else count)
    index += b"".join(number(unpadded) + number(size) for unpadded, size in records) + tail
    index += bytes(-len(index) % 4)
    index += zlib.crc32(index).to_bytes(4, "little")
    foot = (len(index) // 4 - 1).to_bytes(4, "little") + b"\0\4"
    return index + zlib.crc32(foot).to_bytes(4, "little") + foot + b"YZ"


def file_size(records: list[tuple[int, int]]) -> int:
    blocks = sum(unpadded + -unpadded % 4 for unpadded, _ in records)
    return HEADER_SIZE + blocks + len(end_of(records))


def end_of_file(data: bytes) -> bytes:
    footer = parse_footer(data[-FOOTER_SIZE:])
    assert footer is not None
    return data[-footer.index_size - FOOTER_SIZE :]


@given(st.lists(st.tuples(st.integers(5, 1 << 40), st.integers(0, 1 << 40)), max_size=200))
def test_blocks_lie_one_after_the_other_behind_the_header(records: list[tuple[int, int]]) -> None:
    frames = parse_index(end_of(records), file_size=file_size(records))
    assert frames is not None
    assert [frame.size for frame in frames] == [size for _, size in records]
    compressed_offset, offset = HEADER_SIZE, 0
    for frame, (unpadded, _) in zip(frames, records, strict=True):
        assert (frame.compressed_offset, frame.offset) == (compressed_offset, offset)
        assert frame.compressed_size == -(-unpadded // 4) * 4
        compressed_offset += frame.compressed_size
        offset += frame.size


def test_the_index_of_a_real_file_is_read() -> None:
    end = end_of_file(ONE)
    assert parse_footer(ONE[-FOOTER_SIZE:]) == Footer(len(end) - FOOTER_SIZE, lzma.CHECK_CRC64)
    assert parse_index(end, file_size=len(ONE)) == (
        Frame(HEADER_SIZE, len(ONE) - HEADER_SIZE - len(end), 0, len(CONTENT)),
    )


def test_a_file_without_content_has_no_blocks() -> None:
    empty = lzma.compress(b"")
    assert parse_index(end_of_file(empty), file_size=len(empty)) == ()


@pytest.mark.parametrize("footer", [b"", bytes(12), b"YZ", ONE[:12]])
def test_what_is_no_footer_is_told(footer: bytes) -> None:
    assert parse_footer(footer) is None


@pytest.mark.parametrize("file", [ONE + ONE, ONE + bytes(4) + ONE])
def test_several_streams_are_told(file: bytes) -> None:
    assert parse_index(end_of_file(file), file_size=len(file)) is None


def test_padding_after_the_stream_is_told() -> None:
    assert parse_footer((ONE + bytes(4))[-FOOTER_SIZE:]) is None


def test_an_index_of_a_longer_file_is_refused() -> None:
    with pytest.raises(FormatError, match="another file"):
        parse_index(end_of_file(ONE), file_size=len(ONE) - 4)


@pytest.mark.parametrize("at", range(len(end_of([(100, 1000), (77, 5)]))))
def test_every_changed_byte_of_index_and_footer_is_refused(at: int) -> None:
    records = [(100, 1000), (77, 5)]
    end = bytearray(end_of(records))
    end[at] ^= 0x11
    with pytest.raises(FormatError):
        parse_index(bytes(end), file_size=file_size(records))


@pytest.mark.parametrize(
    "end",
    [
        end_of([(4, 1)]),
        end_of([], count=number(1)),
        end_of([(100, 1)], count=number(2)),
        end_of([(100, 1)], count=b"\x81\0"),
        end_of([(100, 1)], count=b"\xff" * 9 + b"\1"),
        end_of([(100, 1)], tail=b"\1"),
        end_of([(100, 1)], tail=bytes(4)),
    ],
)
def test_records_that_cannot_be_are_refused(end: bytes) -> None:
    with pytest.raises(FormatError):
        parse_index(end, file_size=1 << 20)


def test_a_number_of_blocks_beyond_the_limit_is_refused_before_they_are_read() -> None:
    with pytest.raises(LimitError):
        parse_index(end_of([], count=number(MAX_BLOCKS + 1)), file_size=1 << 30)


@given(st.binary(max_size=200))
def test_any_bytes_are_accepted_or_refused(data: bytes) -> None:
    with contextlib.suppress(FormatError):
        parse_index(data, file_size=1000)
    with contextlib.suppress(FormatError):
        parse_index(end_of([], count=b"", tail=data), file_size=1000)
    with contextlib.suppress(FormatError):
        around(data, 10)


@pytest.mark.parametrize("check", [lzma.CHECK_NONE, lzma.CHECK_CRC32, lzma.CHECK_CRC64, lzma.CHECK_SHA256])
@pytest.mark.parametrize(
    "content",
    [
        b"x",
        CONTENT,
        CONTENT * 1000,
        b"".join(zlib.crc32(b"%d" % i).to_bytes(4, "big") for i in range(50_000)),
    ],
)
def test_a_block_becomes_a_file_of_its_own(check: int, content: bytes) -> None:
    file = lzma.compress(content, check=check)
    end = end_of_file(file)
    assert around(file[HEADER_SIZE : -len(end)], len(content)) == (file[:HEADER_SIZE], end)


def test_kinds_of_check_are_those_of_the_library() -> None:
    known = {kind for kind in range(lzma.CHECK_ID_MAX + 1) if lzma.is_check_supported(kind)}
    assert known == set(CHECK_SIZES)


def test_a_block_cut_short_is_truncated() -> None:
    block = ONE[HEADER_SIZE : -len(end_of_file(ONE))]
    for length in range(len(block) - 12):
        with pytest.raises(TruncatedError):
            around(block[:length], len(CONTENT))
