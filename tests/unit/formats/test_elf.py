"""What ELF files are linked with: made ones, real ones, and any bytes."""

from __future__ import annotations

import contextlib
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.elf_files import make_elf
from veneer.formats.elf import (
    MAX_NAME,
    MAX_NEEDED,
    MAX_QUESTIONS,
    MAX_SEARCH,
    MAX_SEGMENTS,
    Linked,
    questions,
)
from veneer.model.errors import FormatError, LimitError, TruncatedError

NAMES = st.binary(min_size=1, max_size=300).filter(lambda name: b"\0" not in name)


def read_linked(read: Callable[[int, int], bytes], size: int) -> Linked | None:
    """What ``questions`` finds, of a file of ``size`` bytes that ``read(offset, size)`` can give any part of."""
    asking = questions(size)
    try:
        wanted = next(asking)
        while True:
            wanted = asking.send(read(*wanted))
    except StopIteration as end:
        found: Linked | None = end.value
        return found


def linked(data: bytes) -> Linked | None:
    return read_linked(lambda offset, size: data[offset : offset + size], len(data))


@given(
    st.lists(NAMES, max_size=20), NAMES, st.lists(NAMES, max_size=5), st.sampled_from([32, 64]), st.booleans()
)
def test_what_was_put_in_comes_out(
    needed: list[bytes], interpreter: bytes, search: list[bytes], bits: int, old: bool
) -> None:
    path = b":".join(search)
    data = make_elf(
        needed, interpreter=interpreter, bits=bits, runpath=None if old else path, rpath=path if old else None
    )
    found = linked(data)
    assert found == Linked(interpreter, tuple(needed), tuple(filter(None, path.split(b":"))))


def test_runpath_counts_before_rpath() -> None:
    found = linked(make_elf([b"libz.so"], runpath=b"/new", rpath=b"/old"))
    assert found is not None and found.search == (b"/new",)


def test_what_is_linked_with_nothing_has_nothing() -> None:
    assert linked(make_elf()) == Linked(b"", (), ())
    assert linked(make_elf(file_type=2)) == Linked(b"", (), ())


@pytest.mark.parametrize(
    "data",
    [b"", b"\x7fELF", b"#!/bin/sh\n" * 20, make_elf(file_type=1), make_elf(file_type=4)],
    ids=["empty", "cut", "script", "object file", "core"],
)
def test_other_files_are_none(data: bytes) -> None:
    assert linked(data) is None


def test_other_byte_orders_and_classes_are_none() -> None:
    data = bytearray(make_elf([b"libz.so"]))
    data[5] = 2
    assert linked(bytes(data)) is None
    data[4:6] = b"\3\1"
    assert linked(bytes(data)) is None


def test_only_what_is_needed_is_read() -> None:
    data = make_elf([b"libz.so.1"] * 5, interpreter=b"/lib/ld.so", filling=bytes(1 << 20))
    asked = []

    def read(offset: int, size: int) -> bytes:
        asked.append(size)
        return data[offset : offset + size]

    assert read_linked(read, len(data)) is not None
    assert sum(asked) < 4096


@given(st.binary(max_size=300), st.integers(0, 200))
def test_any_bytes_are_read_or_refused(junk: bytes, at: int) -> None:
    data = bytearray(make_elf([b"libz.so.1", b"libc.so.6"], interpreter=b"/ld", runpath=b"/lib"))
    data[at : at + len(junk)] = junk
    with contextlib.suppress(FormatError):
        linked(bytes(data))


@given(st.binary(max_size=400))
def test_any_bytes_after_the_magic_are_read_or_refused(junk: bytes) -> None:
    with contextlib.suppress(FormatError):
        linked(b"\x7fELF\2\1" + junk)


@given(st.integers(0, 400))
def test_a_file_that_was_cut_is_refused(size: int) -> None:
    whole = make_elf([b"libz.so.1", b"libc.so.6"], interpreter=b"/ld", runpath=b"/lib")
    data = whole[: min(size, len(whole) - 1)]
    if len(data) < 64:
        assert linked(data) is None
    else:
        with pytest.raises(FormatError):
            linked(data)


def test_a_reader_that_gives_less_is_noticed() -> None:
    data = make_elf([b"libz.so.1"])
    with pytest.raises(TruncatedError):
        read_linked(lambda offset, size: data[offset : offset + min(size, 70)], len(data))


def test_limits_are_kept() -> None:
    with pytest.raises(LimitError):
        linked(make_elf([b"lib.so"] * (MAX_NEEDED + 1)))
    with pytest.raises(LimitError):
        linked(make_elf([b"x" * MAX_NAME]))
    with pytest.raises(LimitError):
        linked(make_elf(interpreter=b"x" * MAX_NAME))
    data = bytearray(make_elf())
    struct.pack_into("<H", data, 56, MAX_SEGMENTS + 1)
    with pytest.raises(LimitError):
        linked(bytes(data))


def binaries() -> list[Path]:
    found = [Path(program) for name in ("sh", "git", "ls") if (program := shutil.which(name))]
    return [path for path in (*found, Path(sys.executable)) if path.resolve().read_bytes()[:4] == b"\x7fELF"]


@pytest.mark.parametrize("file", binaries(), ids=lambda path: path.name)
def test_real_programs_are_read_as_readelf_does(file: Path) -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("needs readelf")
    told = subprocess.run(
        [readelf, "-dlW", file], capture_output=True, text=True, check=True, env={"LC_ALL": "C"}
    ).stdout
    found = linked(file.read_bytes())
    assert found is not None
    assert [name.decode() for name in found.needed] == re.findall(r"\(NEEDED\).*\[(.*)\]", told)
    assert [found.interpreter.decode()] == re.findall(r"program interpreter: (.*)\]", told)
    search = re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", told)
    assert b":".join(found.search).decode() == ":".join(search)


def test_the_first_loader_counts_as_for_the_kernel() -> None:
    data = bytearray(make_elf(interpreter=b"/ld"))
    first, third, size = 64, 64 + 2 * 56, 56
    data[first : first + size] = data[third : third + size]
    (where,) = struct.unpack_from("<Q", data, third + 8)
    struct.pack_into("<QQQQ", data, third + 8, where + 1, 0, 0, 3)
    assert linked(bytes(data)) == Linked(b"/ld", (), ())


def test_questions_are_counted_for_the_worst_case() -> None:
    names = [b"%0300d" % n for n in range(MAX_NEEDED)]
    data = make_elf(names, interpreter=b"/ld", runpath=b"/" + b"x" * 300)
    asked: list[int] = []

    def read(offset: int, size: int) -> bytes:
        asked.append(size)
        return data[offset : offset + size]

    found = read_linked(read, len(data))
    assert found is not None
    assert len(found.needed) == MAX_NEEDED
    assert len(asked) == MAX_QUESTIONS
    assert max(asked) <= MAX_SEARCH
