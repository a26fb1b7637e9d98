"""How much is read from the disk around what a reader waits for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from veneer.mount.content import DENSE, READ_AROUND, READ_WIDE, Nar

SIZE = 64 * READ_AROUND


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset, size) of each advice to the kernel."""
    calls: list[tuple[int, int]] = []

    def fadvise(fd: int, offset: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        calls.append((offset, size))

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    return calls


def nar(directory: Path) -> Nar:
    file = directory / "1.nar"
    file.write_bytes(bytes(SIZE))
    return Nar(os.open(file, os.O_RDONLY | os.O_CLOEXEC), whole=True)


def test_a_read_that_waits_brings_its_neighbourhood(tmp_path: Path, asked: list[tuple[int, int]]) -> None:
    assert nar(tmp_path).finish(memoryview(bytearray(4096)), 5 * READ_AROUND + 4096, 0) == 4096
    assert asked == [(5 * READ_AROUND, READ_AROUND)]


def test_a_file_that_is_read_all_over_comes_in_big_pieces(
    tmp_path: Path, asked: list[tuple[int, int]]
) -> None:
    file = nar(tmp_path)
    for _ in range(SIZE // READ_AROUND // DENSE):
        file.finish(memoryview(bytearray(4096)), 0, 0)
    file.finish(memoryview(bytearray(4096)), READ_WIDE + 12288, 0)
    assert {size for _, size in asked[:-1]} == {READ_AROUND}
    assert asked[-1] == (READ_WIDE, READ_WIDE)


def test_a_read_as_big_as_its_neighbourhood_needs_no_advice(
    tmp_path: Path, asked: list[tuple[int, int]]
) -> None:
    assert nar(tmp_path).finish(memoryview(bytearray(READ_AROUND)), 0, 4096) == READ_AROUND
    assert asked == []
