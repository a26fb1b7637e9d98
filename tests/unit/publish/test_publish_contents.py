"""A NAR file as what is published: its tree without reading what its files contain, and its bytes cut where they are told."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.formats.nar import nar_of, tree_of_nar
from veneer.model.errors import FormatError, TruncatedError
from veneer.model.tree import Directory, Node, RegularFile, Symlink
from veneer.publish.contents import nar_file

SIZES = st.lists(st.integers(0, 50) | st.integers(0, 400_000), max_size=8)


def nar(*sizes: int) -> bytes:
    entries: list[tuple[bytes, Node]] = [
        (b"%06d" % at, RegularFile(size, bool(size & 1), 0)) for at, size in enumerate(sizes)
    ]
    inner = Directory(tuple(entries))
    tree = Directory(((b"empty", Directory(())), (b"files", inner), (b"link", Symlink(b"files"))))
    return b"".join(nar_of(tree, lambda file: [bytes([file.offset % 251]) * file.size]))


def opened(data: bytes) -> int:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return os.dup(file.fileno())


@given(SIZES, st.sets(st.integers(1, 1_000_000), max_size=5))
def test_a_nar_file_has_the_tree_of_its_bytes_and_is_cut_where_it_is_told(
    sizes: list[int], cuts: set[int]
) -> None:
    data = nar(*sizes)
    ends = [*sorted(at for at in cuts if at < len(data)), len(data)]
    with nar_file(opened(data)) as (tree, read):
        assert tree == tree_of_nar([data])
        assert list(read(ends)) == [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("size", [10, 300_000])
def test_a_nar_file_that_is_cut_or_goes_on_is_none(size: int) -> None:
    data = nar(size, 7)
    for end in (0, 50, len(data) // 2, len(data) - 1):
        with pytest.raises(TruncatedError), nar_file(opened(data[:end])):
            pass
    with pytest.raises(FormatError), nar_file(opened(data + b"more")):
        pass


def test_a_file_system_may_give_less_than_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    data, real = nar(300_000, 7), os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: real(fd, min(size, 70_001), offset))
    with nar_file(opened(data)) as (tree, read):
        assert tree == tree_of_nar([data])
        assert list(read([200_000, len(data)])) == [data[:200_000], data[200_000:]]


def test_content_is_not_read_for_the_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "nar"
    file.write_bytes(nar(20 << 20, 20 << 20))
    real, read = os.pread, []

    def counted(fd: int, size: int, offset: int) -> bytes:
        read.append(size)
        return real(fd, size, offset)

    monkeypatch.setattr(os, "pread", counted)
    with nar_file(os.open(file, os.O_RDONLY)):
        assert sum(read) < 1 << 20
