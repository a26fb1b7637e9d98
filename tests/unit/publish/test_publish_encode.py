"""NARs as frames: where they are cut, that they come back, and that they are always the same."""

from __future__ import annotations

import hashlib
import io
import itertools
import tracemalloc
from collections.abc import Iterator

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.formats.nar import nar_of, nar_size, with_offsets
from veneer.formats.seekable_zstd import FOOTER_SIZE, parse_seek_table, table_size
from veneer.model.errors import FormatError, UsageError
from veneer.model.tree import Directory, Node, RegularFile, Symlink
from veneer.publish.contents import in_pieces
from veneer.publish.encode import LARGEST, MIN_FRAME_SIZE, Encoded, Encoder, cut

FRAME = MIN_FRAME_SIZE


def tree(*sizes: int) -> Node:
    entries = tuple((b"%06d" % i, RegularFile(size, False, 0)) for i, size in enumerate(sizes))
    return with_offsets(Directory(entries))


def nar(node: Node) -> bytes:
    return b"".join(nar_of(node, lambda file: [bytes([file.offset % 251]) * file.size]))


def encode(node: Node, data: bytes, piece: int = 1 << 20, jobs: int = 2) -> tuple[Encoded, bytes]:
    out = io.BytesIO()
    with Encoder(frame_size=FRAME, jobs=jobs) as encoder:
        done = encoder.encode(node, in_pieces(data[i : i + piece] for i in range(0, len(data), piece)), out)
    return done, out.getvalue()


TREES = st.one_of(
    st.lists(st.integers(0, 3 * FRAME) | st.integers(0, 20 * FRAME), max_size=12).map(
        lambda sizes: tree(*sizes)
    ),
    st.integers(0, 3 * FRAME).map(lambda size: with_offsets(RegularFile(size, True, 0))),
    st.just(Symlink(b"there")),
    st.integers(0, 200).map(lambda n: Directory(tuple((b"%03d" % i, Symlink(b"t" * 100)) for i in range(n)))),
)


@given(TREES)
def test_frames_are_never_empty_nor_too_big_and_cover_the_nar(node: Node) -> None:
    ends = list(cut(node, FRAME))
    starts = [0, *ends[:-1]]
    assert ends[-1] == nar_size(node)
    assert all(0 < end - start <= LARGEST * FRAME for start, end in zip(starts, ends, strict=True))


@pytest.mark.parametrize(
    ("size", "long"), [(3, 1), (4, 2), (5, 2), (6, 3), (7, 3), (8, 4), (9, 4), (1000, 4)]
)
def test_frames_of_a_large_file_are_half_of_it_within_limits(size: int, long: int) -> None:
    node = tree(10, size * FRAME, 10, 2 * FRAME)
    assert isinstance(node, Directory)
    large = node.entries[1][1]
    assert isinstance(large, RegularFile)
    end = large.offset + size * FRAME
    ends = [at for at in cut(node, FRAME) if large.offset <= at <= end]
    sizes = [after - before for before, after in itertools.pairwise(ends)]
    assert ends[0] == large.offset
    assert all(each == long * FRAME for each in sizes[:-1])
    assert all(0 < each <= long * FRAME for each in sizes)
    assert end - ends[-1] <= FRAME  # goes on with what follows


@given(st.lists(st.integers(0, 3 * FRAME) | st.integers(0, 20 * FRAME), max_size=12))
def test_small_files_are_never_cut_and_big_ones_begin_a_frame(sizes: list[int]) -> None:
    node = tree(*sizes, 4 * FRAME)
    ends = set(cut(node, FRAME))
    assert isinstance(node, Directory)
    for _, file in node.entries:
        assert isinstance(file, RegularFile)
        if file.size >= FRAME:
            assert file.offset in ends
        else:
            assert not any(file.offset < end < file.offset + file.size for end in ends)


@pytest.mark.parametrize("level", range(1, 8))
def test_a_higher_level_is_another_one_and_no_larger(level: int) -> None:
    data = b"".join(
        hashlib.sha256(b"%d" % (n % 977)).digest()[: n % 29] + b"abcdefg"[: n % 7] for n in range(40_000)
    )

    def size(at: int) -> int:
        node = with_offsets(RegularFile(len(data), False, 0))
        with Encoder(level=at) as encoder:
            return encoder.encode(node, in_pieces(nar_of(node, lambda _: [data])), io.BytesIO()).file_size

    assert size(level + 1) < size(level)


def test_a_nar_that_is_no_longer_than_the_longest_frame_is_one() -> None:
    header = nar_size(tree(0))
    assert len(list(cut(tree(LARGEST * FRAME - header), FRAME))) == 1
    assert len(list(cut(tree(LARGEST * FRAME - header + 8), FRAME))) > 1


def test_small_neighbours_share_a_frame() -> None:
    assert len(list(cut(tree(*[10] * 10), FRAME))) == 1


@settings(deadline=None, max_examples=30)
@given(TREES, st.integers(1, 10_000))
def test_every_chunk_by_itself_and_the_whole_file_give_the_nar(node: Node, piece: int) -> None:
    data = nar(node)
    done, file = encode(node, data, piece)
    reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(file), read_across_frames=True)
    assert reader.read() == data
    assert (done.nar_size, done.nar_hash.digest) == (len(data), hashlib.sha256(data).digest())
    assert (done.file_size, done.file_hash.digest) == (len(file), hashlib.sha256(file).digest())
    for chunk in done.chunks:
        compressed = file[chunk.compressed_offset :][: chunk.compressed_size]
        part = zstandard.ZstdDecompressor().decompress(compressed)
        assert part == data[chunk.offset :][: chunk.size]
        assert hashlib.sha256(part).digest() == chunk.digest
    size = table_size(file[-FOOTER_SIZE:])
    assert size is not None
    frames = parse_seek_table(file[-size:], file_size=len(file))
    assert [(f.compressed_offset, f.offset, f.size) for f in frames] == [
        (c.compressed_offset, c.offset, c.size) for c in done.chunks
    ]


def test_equal_input_gives_equal_bytes_whatever_the_threads_and_pieces() -> None:
    node = tree(*range(0, 3 * FRAME, 997))
    data = nar(node)
    assert encode(node, data, 777, jobs=4) == encode(node, data, 1 << 20, jobs=1)


def test_a_nar_that_is_not_the_trees_does_not_pass_for_it() -> None:
    node = tree(100, 5000)
    data = nar(node)
    with pytest.raises(FormatError):
        encode(node, data + b"more")
    assert encode(node, data[:-1])[0].nar_size == len(data) - 1


def test_memory_is_bounded_by_frames_under_way() -> None:
    size = 64 << 20

    def pieces() -> Iterator[bytes]:
        yield from nar_of(node, lambda file: (bytes(1 << 20) for _ in range(size >> 20)))

    node = with_offsets(RegularFile(size, False, 0))
    tracemalloc.start()
    try:
        with Encoder(jobs=2) as encoder:
            encoder.encode(node, in_pieces(pieces()), io.BytesIO())
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("level", "frame"), [(0, FRAME), (23, FRAME), (3, FRAME - 1), (3, (16 << 20) + 1)])
def test_options_that_nothing_could_read_are_refused(level: int, frame: int) -> None:
    with pytest.raises(UsageError):
        Encoder(level=level, frame_size=frame)
