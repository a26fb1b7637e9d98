"""Frames of stored NAR files: found from the file's end, and decompressed one by one."""

from __future__ import annotations

import hashlib
import io
import lzma
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.formats import nar
from veneer.formats.chunk_map import MAX_CHUNK
from veneer.formats.seekable_zstd import SEEKABLE_MAGIC, Frame, write_seek_table
from veneer.model.errors import FormatError, TruncatedError
from veneer.model.tree import RegularFile
from veneer.publish.contents import in_pieces
from veneer.publish.encode import Encoder
from veneer.sources.compression import open_decoder
from veneer.sources.frames import GRID, MAX_FRAMES, MAX_TABLE, TailKeeper, decode_frame, find_frames

CONTENT = b"".join(i.to_bytes(4, "big") * (i % 7) for i in range(40_000))
SIZES = (7, 1000, 100_000)


def zstd_file(
    content: bytes, sizes: tuple[int, ...] = SIZES, *, checksum: bool = False, content_size: bool = True
) -> bytes:
    """``content`` in frames of these sizes, the last with the rest."""
    compressor = zstandard.ZstdCompressor(level=1, write_checksum=checksum, write_content_size=content_size)
    parts = list(cut(content, sizes))
    frames = [compressor.compress(part) for part in parts]
    return b"".join(frames) + write_seek_table([(len(f), len(p)) for f, p in zip(frames, parts, strict=True)])


def cut(content: bytes, sizes: tuple[int, ...]) -> Iterator[bytes]:
    at = 0
    for size in sizes:
        yield content[at : at + size]
        at += size
    yield content[at:]


def xz_tool(content: bytes, *options: str) -> bytes:
    program = shutil.which("xz")
    if program is None:
        pytest.skip("no xz program")
    return subprocess.run(
        [program, "-c", *options], input=content, stdout=subprocess.PIPE, check=True, timeout=60
    ).stdout


def found(compression: str, file: bytes, nar_size: int, most_questions: int = 2) -> tuple[Frame, ...] | None:
    search = find_frames(compression, len(file), nar_size)
    try:
        offset, size = next(search)
        for _ in range(most_questions):
            assert 0 <= offset <= offset + size <= len(file)
            offset, size = search.send(file[offset : offset + size])
    except StopIteration as end:
        frames: tuple[Frame, ...] | None = end.value
        return frames
    raise AssertionError(f"more than {most_questions} questions")


def encoded(frame: Frame, file: bytes) -> bytes:
    return file[frame.compressed_offset : frame.compressed_offset + frame.compressed_size]


def joined(compression: str, frames: tuple[Frame, ...], file: bytes) -> bytes:
    return b"".join(decode_frame(compression, encoded(frame, file), frame.size) for frame in frames)


def whole(compression: str, file: bytes) -> bytes:
    decoder = open_decoder(compression, io.BytesIO(file))
    return b"".join(iter(lambda: decoder.read(1 << 20), b""))


@pytest.mark.parametrize(("checksum", "content_size"), [(False, True), (True, True), (False, False)])
def test_frames_of_zstd_give_what_the_whole_file_gives(checksum: bool, content_size: bool) -> None:
    file = zstd_file(CONTENT, checksum=checksum, content_size=content_size)
    frames = found("zstd", file, len(CONTENT), 1)
    assert frames is not None
    assert [frame.size for frame in frames[:-1]] == list(SIZES)
    assert joined("zstd", frames, file) == whole("zstd", file) == CONTENT


@pytest.mark.parametrize(
    "options",
    [
        ["-T2", "--block-size=65536"],
        ["-T1", "--block-size=65536"],
        ["-T1", "--block-list=7,1000,100000"],
        ["-T2", "--block-size=50001", "--check=crc32"],
        ["-T2", "--block-size=50001", "--check=sha256"],
        ["-T2", "--block-size=50001", "--check=none"],
        ["-T1", "--block-size=50001", "--x86", "--lzma2=preset=1"],
        ["-T2", "--block-size=50001", "--delta=dist=4", "--lzma2=preset=1"],
    ],
)
def test_blocks_of_xz_give_what_the_whole_file_gives(options: list[str]) -> None:
    file = xz_tool(CONTENT, *options)
    frames = found("xz", file, len(CONTENT), 1)
    assert frames is not None
    assert len(frames) > 3
    assert joined("xz", frames, file) == whole("xz", file) == CONTENT


def test_uncompressed_files_are_cut_in_a_grid_without_a_question() -> None:
    content = bytes(2 * GRID) + b"rest"
    frames = found("none", content, len(content), 0)
    assert frames is not None
    assert [frame.size for frame in frames] == [GRID, GRID, 4]
    assert joined("none", frames, content) == content


def test_huge_uncompressed_files_have_a_wider_grid() -> None:
    size = 3 * GRID * MAX_FRAMES + 1
    with pytest.raises(StopIteration) as end:
        next(find_frames("none", size, size))
    frames = end.value.value
    assert len(frames) <= MAX_FRAMES
    assert sum(frame.size for frame in frames) == size


def test_sizes_that_nothing_has_are_read_whole() -> None:
    with pytest.raises(StopIteration) as end:
        next(find_frames("none", (1 << 63) - 1, (1 << 63) - 1))
    assert end.value.value is None


@pytest.mark.parametrize(
    ("compression", "file"),
    [
        ("none", CONTENT[:100]),
        ("none", b""),
        ("zstd", b""),
        ("zstd", zstandard.compress(CONTENT)),
        ("zstd", zstandard.compress(CONTENT[:1000]) + zstandard.compress(CONTENT[1000:])),
        ("zstd", zstd_file(CONTENT, ())),
        ("zstd", zstd_file(CONTENT, (0, 0))),
        ("zstd", bytes(MAX_TABLE) + struct.pack("<IBI", MAX_TABLE // 8, 0, SEEKABLE_MAGIC)),
        ("xz", b""),
        ("xz", lzma.compress(CONTENT)),
        ("xz", lzma.compress(CONTENT[:1000]) + lzma.compress(CONTENT[1000:])),
        ("xz", lzma.compress(CONTENT) + bytes(4)),
        ("br", CONTENT),
        ("bzip2", CONTENT),
        ("", CONTENT),
    ],
)
def test_files_without_frames_are_read_whole(compression: str, file: bytes) -> None:
    assert found(compression, file, len(CONTENT) if compression != "none" else len(file)) is None


def test_frames_too_big_to_be_held_are_read_whole() -> None:
    frames = [(1000, MAX_CHUNK + 1), (1000, 1)]
    file = bytes(2000) + write_seek_table(frames)
    assert found("zstd", file, MAX_CHUNK + 2) is None


def test_empty_frames_are_left_out() -> None:
    file = zstd_file(CONTENT, (0, 1000, 0))
    frames = found("zstd", file, len(CONTENT))
    assert frames is not None
    assert len(frames) == 2
    assert joined("zstd", frames, file) == CONTENT


@pytest.mark.parametrize("compression", ["none", "zstd", "xz"])
@pytest.mark.parametrize("off", [-1, 1])
def test_frames_of_another_nar_are_refused(compression: str, off: int) -> None:
    file = {"none": CONTENT, "zstd": zstd_file(CONTENT), "xz": lzma.compress(CONTENT)}[compression]
    with pytest.raises(FormatError):
        found(compression, file, len(CONTENT) + off)


@pytest.mark.parametrize("compression", ["zstd", "xz"])
def test_tables_of_a_longer_file_are_refused(compression: str) -> None:
    file = (zstd_file(CONTENT) if compression == "zstd" else lzma.compress(CONTENT))[100:]
    with pytest.raises(FormatError, match="describes a file of"):
        found(compression, file, len(CONTENT))


def test_an_answer_of_another_size_is_refused() -> None:
    search = find_frames("zstd", 1_000_000, 1_000_000)
    _, size = next(search)
    with pytest.raises(TruncatedError):
        search.send(bytes(size - 1))


def test_a_table_longer_than_the_first_answer_is_asked_for_once_more() -> None:
    content = bytes(5000)
    file = zstd_file(content, (1,) * 4000)
    with pytest.raises(AssertionError, match="more than 1"):
        found("zstd", file, len(content), 1)
    frames = found("zstd", file, len(content), 2)
    assert frames is not None
    assert len(frames) == 4001


@settings(deadline=None)
@given(
    compression=st.sampled_from(["zstd", "xz"]),
    sizes=st.lists(st.integers(0, 3000), max_size=8),
    seed=st.integers(0, 1 << 32),
)
def test_any_cuts_come_back(compression: str, sizes: list[int], seed: int) -> None:
    content = random.Random(seed).randbytes(1000) * 10
    if compression == "zstd":
        file = zstd_file(content, tuple(sizes))
    else:
        if shutil.which("xz") is None or not all(sizes) or not sizes:
            return
        file = xz_tool(content, "-0", "-T1", "--block-list=" + ",".join(map(str, sizes)))
    frames = found(compression, file, len(content))
    assert (frames is None) == (len([part for part in cut(content, tuple(sizes)) if part]) < 2)
    if frames is not None:
        assert joined(compression, frames, file) == content


def block(content: bytes, check: int = lzma.CHECK_CRC64) -> bytes:
    """The only block of an .xz file."""
    file = lzma.compress(content, check=check)
    index_size = (int.from_bytes(file[-8:-4], "little") + 1) * 4
    return file[12 : -12 - index_size]


KINDS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "zstd": ("zstd", lambda content: zstandard.compress(content)),
    "zstd with checksum": (
        "zstd",
        lambda content: zstandard.ZstdCompressor(write_checksum=True).compress(content),
    ),
    "zstd of unknown size": (
        "zstd",
        lambda content: zstandard.ZstdCompressor(write_content_size=False).compress(content),
    ),
    "xz": ("xz", block),
    "xz with SHA-256": ("xz", lambda content: block(content, check=lzma.CHECK_SHA256)),
    "xz without check": ("xz", lambda content: block(content, check=lzma.CHECK_NONE)),
}


def frame_of(kind: str, content: bytes) -> tuple[str, bytes]:
    """(compression, the frame)."""
    compression, encode = KINDS[kind]
    return compression, encode(content)


SHORT = CONTENT[2000:2900]


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_refused(kind: str) -> None:
    compression, data = frame_of(kind, SHORT)
    assert decode_frame(compression, data, len(SHORT)) == SHORT
    check_size = {"xz": 8, "xz with SHA-256": 32}.get(kind)
    for length in range(len(data)):
        if len(data) - length == check_size:
            continue  # then it is a whole block without check
        with pytest.raises(FormatError):
            decode_frame(compression, data[:length], len(SHORT))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", [b"\0", bytes(4), bytes(8), bytes(32), b"x" * 100, None])
def test_anything_after_the_frame_is_refused(kind: str, tail: bytes | None) -> None:
    compression, data = frame_of(kind, SHORT)
    with pytest.raises(FormatError):
        decode_frame(compression, data + (data if tail is None else tail), len(SHORT))
    with pytest.raises(FormatError):
        decode_frame(compression, data + data, 2 * len(SHORT))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [-1, 0, 1, len(SHORT) - 1, len(SHORT) + 1, 1 << 20])
def test_another_size_is_refused(kind: str, size: int) -> None:
    compression, data = frame_of(kind, SHORT)
    with pytest.raises(FormatError):
        decode_frame(compression, data, size)


@pytest.mark.parametrize("kind", KINDS)
def test_every_changed_byte_is_refused_or_seen_by_a_digest(kind: str) -> None:
    compression, data = frame_of(kind, SHORT)
    right = hashlib.sha256(SHORT).digest()
    passed = 0
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            changed = bytearray(data)
            changed[at] ^= flip
            try:
                decoded = decode_frame(compression, bytes(changed), len(SHORT))
            except FormatError:
                continue
            assert len(decoded) == len(SHORT)
            passed += hashlib.sha256(decoded).digest() != right
    if kind in ("zstd with checksum", "xz", "xz with SHA-256"):
        assert not passed


@pytest.mark.parametrize("compression", ["zstd", "xz"])
def test_every_changed_byte_of_a_file_is_refused_or_seen_by_digests(compression: str) -> None:
    sizes = (100, 300)
    file = (
        zstd_file(SHORT, sizes)
        if compression == "zstd"
        else xz_tool(SHORT, "-T1", "--block-list=100,300,500", "--check=crc32")
    )
    frames = found(compression, file, len(SHORT))
    assert frames is not None
    digests = {
        frame: hashlib.sha256(part).digest() for frame, part in zip(frames, cut(SHORT, sizes), strict=True)
    }
    for at in range(len(file)):
        changed = bytearray(file)
        changed[at] ^= 0x21
        try:
            for frame in found(compression, bytes(changed), len(SHORT)) or ():
                decoded = decode_frame(compression, encoded(frame, bytes(changed)), frame.size)
                if digests.get(frame) == hashlib.sha256(decoded).digest():
                    assert decoded == SHORT[frame.offset : frame.offset + frame.size]
        except FormatError:
            continue


@given(compression=st.sampled_from(["zstd", "xz"]), data=st.binary(max_size=300), size=st.integers(1, 1000))
def test_any_bytes_are_decoded_or_refused(compression: str, data: bytes, size: int) -> None:
    try:
        assert len(decode_frame(compression, data, size)) == size
    except FormatError:
        return


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_is_refused_in_bounded_memory(kind: str) -> None:
    compression, data = frame_of(kind, bytes(16 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            decode_frame(compression, data, 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 12 << 20  # the window of xz: 8 MiB
    finally:
        tracemalloc.stop()


def test_a_frame_that_claims_a_terabyte_is_refused_before_it_is_allocated() -> None:
    data = b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + b"\1\0\0"
    with pytest.raises(FormatError, match="says 1099511627776"):
        decode_frame("zstd", data, 100)


def test_hostile_windows_are_neither_filled_nor_kept() -> None:
    """Frames of a few bytes with windows of 128 and 192 MiB."""
    script = """if True:
        import lzma, pathlib, zlib, zstandard
        from veneer.sources.frames import decode_frame

        def memory(key):
            status = pathlib.Path("/proc/self/status").read_text()
            return int(status.split(key + ":")[1].split()[0]) >> 10

        window = zstandard.ZstdCompressionParameters.from_level(1, window_log=27)
        compressor = zstandard.ZstdCompressor(compression_params=window).compressobj()
        zstd = compressor.compress(b"x") + compressor.flush()
        del compressor
        xz = bytearray(lzma.compress(b"x", filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 4096}])[12:-20])
        xz[4] = 31
        xz[8:12] = zlib.crc32(xz[:8]).to_bytes(4, "little")
        filled, mapped = memory("VmHWM"), memory("VmSize")
        for _ in range(5):
            assert decode_frame("zstd", zstd, 1) == decode_frame("xz", bytes(xz), 1) == b"x"
        print(memory("VmPeak") - mapped, memory("VmHWM") - filled, memory("VmSize") - mapped)
    """
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True, timeout=60
    )
    asked, filled, kept = map(int, done.stdout.split())
    assert asked > 100
    assert max(filled, kept) < 16


@pytest.mark.parametrize("compression", ["br", "gzip", "", "rar"])
def test_compressions_without_frames_are_named(compression: str) -> None:
    with pytest.raises(FormatError, match="no frames"):
        decode_frame(compression, b"x", 1)


def test_a_skippable_frame_is_no_frame() -> None:
    skippable = (0x184D2A5E).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"hello"
    with pytest.raises(FormatError):
        decode_frame("zstd", skippable, 5)
    with pytest.raises(FormatError):
        decode_frame("zstd", skippable + zstandard.compress(b"hello"), 5)


@pytest.mark.parametrize("kind", ["zstd", "xz"])
def test_threads_decode_at_once(kind: str) -> None:
    contents = [bytes([i]) * 1000 + CONTENT[:20_000] for i in range(20)]
    jobs = [(*frame_of(kind, content), content) for content in contents]
    with ThreadPoolExecutor(8) as pool:
        decoded = pool.map(lambda job: decode_frame(job[0], job[1], len(job[2])), jobs)
        assert list(decoded) == contents


def keep(file: bytes, piece: int, limit: int) -> TailKeeper:
    keeper = TailKeeper(io.BytesIO(file), limit=limit)
    assert b"".join(iter(lambda: keeper.read(piece), b"")) == file
    assert keeper.length == len(file)
    return keeper


@pytest.mark.parametrize("piece", [1, 1000, 1 << 20])
@pytest.mark.parametrize("compression", ["none", "zstd", "xz"])
def test_frames_are_known_after_a_download(compression: str, piece: int) -> None:
    content = CONTENT * 3
    files = {"none": content, "zstd": zstd_file(content), "xz": block_file(content)}
    keeper = keep(files[compression], piece, 8 << 10)
    frames = keeper.frames(compression, len(content))
    assert frames is not None
    assert frames == found(compression, files[compression], len(content))


def block_file(content: bytes) -> bytes:
    return xz_tool(content, "-T2", "--block-size=65536")


def test_a_table_longer_than_what_was_kept_is_told() -> None:
    file = zstd_file(CONTENT, (1,) * 2000)
    assert keep(file, 100, 8000).frames("zstd", len(CONTENT)) is None
    assert keep(file, 100, 20_000).frames("zstd", len(CONTENT)) is not None


def test_no_more_than_the_limit_and_a_piece_is_kept() -> None:
    file = random.Random(1).randbytes(8 << 20)
    tracemalloc.start()
    try:
        keeper = keep_only(file, 64 << 10, 100_000)
        assert tracemalloc.get_traced_memory()[1] < 400_000
    finally:
        tracemalloc.stop()
    assert keeper.length == len(file)


def keep_only(file: bytes, piece: int, limit: int) -> TailKeeper:
    keeper = TailKeeper(io.BytesIO(file), limit=limit)
    while keeper.read(piece):
        pass
    return keeper


@pytest.mark.parametrize("file", [b"", b"x"])
def test_short_downloads_have_no_frames(file: bytes) -> None:
    for compression in ("zstd", "xz"):
        assert keep(file, 10, 100).frames(compression, 1000) is None
    assert TailKeeper(io.BytesIO(file)).frames("zstd", 1000) is None


def test_published_files_are_found(tmp_path: Path) -> None:
    content = random.Random(2).randbytes(1 << 20)
    tree = RegularFile(len(content), False, 0)
    data = b"".join(nar.nar_of(nar.with_offsets(tree), lambda _: [content]))
    out = io.BytesIO()
    with Encoder(frame_size=64 << 10) as encoder:
        done = encoder.encode(nar.with_offsets(tree), in_pieces([data]), out)
    frames = found("zstd", out.getvalue(), len(data), 1)
    assert frames is not None
    chunks = [(c.compressed_offset, c.compressed_size, c.offset, c.size) for c in done.chunks]
    assert chunks == [(f.compressed_offset, f.compressed_size, f.offset, f.size) for f in frames]
    assert joined("zstd", frames, out.getvalue()) == data


@pytest.mark.parametrize("piece", [1, 7, 1000, 1 << 20])
def test_frames_without_a_table_are_learnt_as_they_pass(piece: int) -> None:
    parts = [bytes([i]) * size for i, size in enumerate((300_000, 1, 70_000, 200))]
    compressor = zstandard.ZstdCompressor()
    pieces = [compressor.compress(part) for part in parts]
    file = b"".join(pieces)
    keeper = TailKeeper(io.BytesIO(file), "zstd")
    while keeper.read(piece):
        pass
    frames = keeper.frames("zstd", sum(map(len, parts)))
    assert frames is not None
    cut = [file[f.compressed_offset : f.compressed_offset + f.compressed_size] for f in frames]
    assert cut == pieces
    assert [decode_frame("zstd", data, f.size) for data, f in zip(cut, frames, strict=True)] == parts
    assert keeper.frames("zstd", 5) is None


def test_frames_that_do_not_tell_their_size_are_not_learnt() -> None:
    silent = zstandard.ZstdCompressor(write_content_size=False)
    keeper = TailKeeper(io.BytesIO(silent.compress(b"a" * 1000) + silent.compress(b"b" * 1000)), "zstd")
    while keeper.read(100):
        pass
    assert keeper.frames("zstd", 2000) is None
    one = TailKeeper(io.BytesIO(zstandard.ZstdCompressor().compress(b"a" * 1000)), "zstd")
    while one.read(100):
        pass
    assert one.frames("zstd", 1000) is None
