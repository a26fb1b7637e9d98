"""What a mount server notes for a trace."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from veneer.formats import touches
from veneer.formats.tree_index import node_id
from veneer.model.store_path import StorePath
from veneer.mount.recording import Recording

GIT = StorePath("1" * 32, "git-2.39.5")


@pytest.fixture
def notes() -> Iterator[int]:
    fd = os.memfd_create("notes")
    yield fd
    os.close(fd)


def rows(fd: int) -> list[touches.Touched]:
    return list(touches.parse(os.pread(fd, touches.MAX_SIZE + 1, 0)))


def test_each_touch_is_noted_once(notes: int) -> None:
    recording = Recording(notes)
    for _ in range(3):
        recording.looked_up(7, str(GIT).encode())
        recording.read(node_id(7, 2), 4096, 4096)
        recording.read(node_id(7, 2), 4096, 100)
    recording.read(node_id(7, 2), 4096, 8192)
    assert rows(notes) == [
        touches.Touched(7, GIT),
        touches.Touched(7, None, 2, 4096, 4096),
        touches.Touched(7, None, 2, 4096, 8192),
    ]


def test_notes_end_at_their_limit(notes: int) -> None:
    recording = Recording(notes)
    for page in range(touches.MAX_SIZE // touches.ROW_SIZE + 10):
        recording.read(node_id(7, 2), 4096 * page, 4096)
    assert os.fstat(notes).st_size == touches.MAX_SIZE
    Recording(notes).read(node_id(8, 2), 0, 4096)
    assert os.fstat(notes).st_size == touches.MAX_SIZE
