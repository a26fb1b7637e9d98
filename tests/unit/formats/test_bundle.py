"""Closure bundles: what is written is read back, and hostile ones are refused within bounds."""

from __future__ import annotations

import contextlib
import resource

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from veneer.formats import bundle
from veneer.formats.bundle import (
    CHUNKS,
    LISTING,
    MAX_ENTRIES,
    MAX_OTHER,
    MAX_PLAIN,
    NARINFO,
    Entry,
    announced,
    is_announced,
    parse_bundle,
    write_bundle,
)
from veneer.formats.narinfo import parse_narinfo, write_narinfo
from veneer.model.errors import FormatError, LimitError, TruncatedError
from veneer.model.hashes import Hash
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath

ROOT = "0" * 32
FIRST = Entry(ROOT, NARINFO, b"StorePath: x\n")
ENTRIES = [
    FIRST,
    Entry("1" * 32, NARINFO, b""),
    Entry(ROOT, LISTING, b"{}"),
    Entry(ROOT, CHUNKS, b"\0\n 1\n"),
]
MAGIC = b"veneer-bundle-1\n"

hash_parts = st.text("0123456789abcdfghijklmnpqrsvwxyz", min_size=32, max_size=32)


def frame(plain: bytes, *, sized: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=sized).compress(plain)


def parsed(data: bytes) -> list[Entry]:
    return list(parse_bundle(data, ROOT))


@given(
    st.lists(
        st.builds(Entry, hash_parts, st.sampled_from([NARINFO, LISTING, CHUNKS]), st.binary()),
        unique_by=lambda entry: (entry.hash_part, entry.suffix),
    )
)
def test_what_is_written_is_read_back(entries: list[Entry]) -> None:
    entries = [FIRST, *(e for e in entries if (e.hash_part, e.suffix) != (ROOT, NARINFO))]
    assert parsed(write_bundle(ROOT, entries)) == entries


def test_the_file_is_the_documented_one() -> None:
    plain = zstandard.ZstdDecompressor().decompress(write_bundle(ROOT, ENTRIES))
    assert plain == b"".join(
        [
            MAGIC,
            f"{ROOT}.narinfo 13\nStorePath: x\n".encode(),
            f"{'1' * 32}.narinfo 0\n".encode(),
            f"{ROOT}.ls 2\n{{}}".encode(),
            f"{ROOT}.chunks 5\n\0\n 1\n".encode(),
        ]
    )


@pytest.mark.parametrize(
    "plain",
    [
        b"",
        b"veneer-bundle-2\n",
        MAGIC,
        MAGIC + f"{'1' * 32}.narinfo 0\n".encode(),
        MAGIC + FIRST.header[:-1],
        MAGIC + FIRST.header + FIRST.body + b"\n",
        MAGIC + FIRST.header + FIRST.body + FIRST.header + FIRST.body,
        *(
            MAGIC + FIRST.header + FIRST.body + text
            for text in (
                f"{'1' * 32}.nar 0\n".encode(),
                f"{'1' * 31}e.ls 0\n".encode(),
                f"../{'1' * 29}.ls 0\n".encode(),
                f"{'1' * 33}.ls 0\n".encode(),
                f"{'1' * 32}.ls -1\n".encode(),
                f"{'1' * 32}.ls 00\n".encode(),
                f"{'1' * 32}.ls  0\n".encode(),
                f"{'1' * 32}.ls 1\n".encode(),
                f"{'1' * 32}.ls {MAX_OTHER}\n".encode(),
            )
        ),
    ],
)
def test_what_does_not_follow_the_format_is_refused(plain: bytes) -> None:
    with pytest.raises(FormatError):
        parsed(frame(plain))


@pytest.mark.parametrize("data", [b"", b"\x28\xb5\x2f\xfd", b"x" * 100, frame(b"")[:-1]])
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        parsed(data)


def test_sizes_that_are_not_said_or_too_large_are_refused_before_anything_is_decoded() -> None:
    body = MAGIC + FIRST.header + FIRST.body
    with pytest.raises(LimitError):
        parsed(frame(body, sized=False))
    bomb = frame(bytes(MAX_PLAIN + 1))
    assert len(bomb) < 100_000
    with pytest.raises(LimitError):
        parsed(bomb)
    with pytest.raises(LimitError):
        parsed(frame(body + f"{ROOT}.ls {MAX_OTHER + 1}\n".encode()))
    with pytest.raises(LimitError):
        write_bundle(ROOT, [FIRST, Entry(ROOT, LISTING, bytes(MAX_OTHER + 1))])


def test_more_entries_than_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_ENTRIES >= 3 * 30_000
    data = write_bundle(ROOT, ENTRIES)
    monkeypatch.setattr(bundle, "MAX_ENTRIES", len(ENTRIES) - 1)
    with pytest.raises(LimitError):
        parsed(data)
    with pytest.raises(LimitError):
        write_bundle(ROOT, ENTRIES)


def test_one_body_at_a_time_is_in_memory() -> None:
    many = [FIRST, *(Entry(f"{n:032d}", LISTING, bytes(MAX_OTHER)) for n in range(14))]
    data = write_bundle(ROOT, many)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(len(entry.body) for entry in parse_bundle(data, ROOT)) > 14 * MAX_OTHER
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 * MAX_OTHER >> 10 << 1


def test_a_cut_anywhere_is_seen() -> None:
    data = write_bundle(ROOT, ENTRIES)
    for end in range(len(data)):
        with pytest.raises(FormatError):
            parsed(data[:end])


@pytest.mark.parametrize(
    "more",
    [b"more", b"\x50\x2a\x4d\x18\0\0\0\0", frame(b"x")[:6], frame(b"")],
    ids=["bytes", "skippable frame", "half a frame", "empty frame"],
)
def test_what_follows_the_frame_is_refused(more: bytes) -> None:
    with pytest.raises(FormatError):
        parsed(write_bundle(ROOT, ENTRIES) + more)


def test_a_frame_of_more_blocks_than_writers_make_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_bundle(ROOT, [FIRST, Entry(ROOT, LISTING, bytes(range(256)) * 2000)])
    assert len(parsed(data)) == 2
    monkeypatch.setattr(bundle, "_MAX_BLOCKS", 3)
    with pytest.raises(LimitError):
        parsed(data)


def test_a_changed_byte_is_seen() -> None:
    data = write_bundle(ROOT, ENTRIES)
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        with contextlib.suppress(FormatError):
            assert parsed(bytes(changed)) == ENTRIES


@given(st.binary(max_size=300))
def test_any_bytes_are_accepted_or_refused(data: bytes) -> None:
    for candidate in (
        data,
        frame(data),
        frame(MAGIC + data),
        frame(MAGIC + FIRST.header + FIRST.body + data),
    ):
        with contextlib.suppress(FormatError):
            parsed(candidate)


def test_a_bundle_of_another_root_is_refused() -> None:
    with pytest.raises(FormatError, match="begins with"):
        list(parse_bundle(write_bundle(ROOT, ENTRIES), "1" * 32))
    with pytest.raises(FormatError):
        write_bundle("1" * 32, ENTRIES)
    with pytest.raises(TruncatedError):
        parsed(frame(MAGIC + FIRST.header))


def test_a_narinfo_that_announces_its_bundle_is_otherwise_the_same() -> None:
    path = StorePath(ROOT, "hello-1")
    info = UnverifiedPathInfo(path, "nar/x", "zstd", Hash("sha256", bytes(32)), 300, extra=(("Other", "1"),))
    data = write_narinfo(info)
    said = announced(data, ROOT)
    assert said.startswith(data)
    found = parse_narinfo(said)
    assert is_announced(found) and not is_announced(info)
    assert found.extra == (*info.extra, ("Bundle", f"{ROOT}.bundle"))
    assert write_narinfo(found) == said
