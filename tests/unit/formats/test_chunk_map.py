"""Chunk maps: what is signed, and what is refused."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.formats.chunk_map import (
    MAX_CHUNK,
    UnverifiedChunkMap,
    parse_chunk_map,
    place_chunks,
    write_chunk_map,
)
from veneer.formats.signature import SecretKey
from veneer.model.errors import FormatError, LimitError
from veneer.model.hashes import Hash
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath

PATH = StorePath("0" * 32, "hello-1")
NAR_HASH = Hash("sha256", hashlib.sha256(b"nar").digest())
ROWS = [(10, 100, b"a" * 32), (20, 200, b"b" * 32)]
MAP = UnverifiedChunkMap(PATH, NAR_HASH, 300, "nar/x.nar.zst", place_chunks(ROWS), ("k-1:AAAA",))
INFO = UnverifiedPathInfo(PATH, "nar/x.nar.zst", "zstd", NAR_HASH, 300)


@given(
    st.lists(
        st.tuples(st.integers(1, 1000), st.integers(1, 1000), st.binary(min_size=32, max_size=32)), min_size=1
    )
)
def test_what_is_written_is_read_back(rows: list[tuple[int, int, bytes]]) -> None:
    chunk_map = replace(MAP, chunks=place_chunks(rows), nar_size=sum(size for _, size, _ in rows))
    assert parse_chunk_map(write_chunk_map(chunk_map)) == chunk_map


def test_the_file_is_the_documented_one() -> None:
    text, _, table = write_chunk_map(MAP).partition(b"\n\n")
    assert text.decode().split("\n") == [
        "Version: 1",
        f"StorePath: /nix/store/{PATH}",
        f"NarHash: {NAR_HASH.nix32}",
        "NarSize: 300",
        "URL: nar/x.nar.zst",
        f"TableHash: {Hash('sha256', hashlib.sha256(table).digest()).nix32}",
        "Sig: k-1:AAAA",
    ]
    assert table == b"".join(
        c.to_bytes(4, "little") + s.to_bytes(4, "little") + digest for c, s, digest in ROWS
    )


@pytest.mark.parametrize(
    "other",
    [
        replace(MAP, store_path=StorePath("1" * 32, "hello-1")),
        replace(MAP, nar_hash=Hash("sha256", bytes(32))),
        replace(MAP, nar_size=301, chunks=place_chunks([*ROWS, (1, 1, bytes(32))])),
        replace(MAP, chunks=place_chunks([(10, 100, b"a" * 32), (20, 200, b"c" * 32)])),
        replace(MAP, chunks=place_chunks([(10, 200, b"a" * 32), (20, 100, b"b" * 32)])),
        replace(MAP, chunks=place_chunks([(11, 100, b"a" * 32), (20, 200, b"b" * 32)])),
    ],
)
def test_a_signature_covers_path_nar_and_every_chunk(other: UnverifiedChunkMap) -> None:
    key = SecretKey.generate("k-1")
    signature = key.sign(MAP.fingerprint())
    assert key.public_key().verify(parse_chunk_map(write_chunk_map(MAP)).fingerprint(), signature)
    assert not key.public_key().verify(other.fingerprint(), signature)


def test_it_belongs_to_one_narinfo_and_one_file() -> None:
    assert MAP.belongs_to(INFO)
    assert not MAP.belongs_to(replace(INFO, url="nar/y.nar.zst"))
    assert not MAP.belongs_to(replace(INFO, nar_hash=Hash("sha256", bytes(32))))
    assert not MAP.belongs_to(replace(INFO, nar_size=299))
    assert not MAP.belongs_to(replace(INFO, compression="xz"))
    assert not MAP.belongs_to(replace(INFO, store_path=StorePath("1" * 32, "hello-1")))


def test_chunks_that_do_not_make_up_the_nar_are_refused() -> None:
    data = write_chunk_map(MAP)
    for size in ("299", "301", "0", "-1", str(1 << 63)):
        with pytest.raises(FormatError):
            parse_chunk_map(data.replace(b"NarSize: 300", f"NarSize: {size}".encode()))
    with pytest.raises(FormatError):
        write_chunk_map(replace(MAP, nar_size=301))


def test_a_gap_cannot_be_written() -> None:
    first, second = MAP.chunks
    with pytest.raises(FormatError, match="one after the other"):
        write_chunk_map(replace(MAP, chunks=(first, replace(second, offset=101))))


def test_a_changed_table_is_refused_without_any_key() -> None:
    data = bytearray(write_chunk_map(MAP))
    data[-1] ^= 1
    with pytest.raises(FormatError, match="TableHash"):
        parse_chunk_map(bytes(data))


def test_a_chunk_that_is_too_big_to_be_held_is_refused() -> None:
    rows = [(10, MAX_CHUNK + 1, b"a" * 32)]
    with pytest.raises(LimitError):
        write_chunk_map(replace(MAP, nar_size=MAX_CHUNK + 1, chunks=place_chunks(rows)))


@pytest.mark.parametrize(
    "change",
    [
        (b"Version: 1", b"Version: 2"),
        (b"StorePath: /nix/store/", b"StorePath: /gnu/store/"),
        (b"URL: ", b"Url: "),
        (b"URL: nar/x.nar.zst\n", b""),
        (b"Sig: ", b"sig: "),
        (b"URL: nar/x.nar.zst", b"URL: \x1b[2J"),
        (b"NarHash: sha256:", b"NarHash: sha512:"),
        (b"\n\n", b"\n"),
    ],
)
def test_headers_that_are_not_as_documented_are_refused(change: tuple[bytes, bytes]) -> None:
    with pytest.raises(FormatError):
        parse_chunk_map(write_chunk_map(MAP).replace(*change))


@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 20))
def test_any_bytes_are_accepted_or_refused(data: bytes, at: int, cut: int) -> None:
    whole = write_chunk_map(MAP)
    for text in (data, whole[:at] + data + whole[at + cut :], whole[:at]):
        with contextlib.suppress(FormatError):
            parse_chunk_map(text)
