"""Who may follow a dead mount server."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from veneer.formats import fuse_wire as wire
from veneer.mount.session import Session
from veneer.mount.succession import Succession, tell

RESENDING = Session(40, wire.HAS_RESEND | wire.NO_OPEN_SUPPORT, 1 << 20)


@pytest.fixture
def succession() -> Iterator[Succession]:
    reader, writer = os.pipe()  # a descriptor without an error, as a mount that is there
    made = Succession(reader, successors=3, within=10.0)
    yield made
    made.close()
    os.close(reader)
    os.close(writer)


def test_without_a_session_nobody_follows(succession: Succession) -> None:
    assert "not been answered" in (succession.obstacle(0.0) or "")


def test_the_last_session_told_is_the_successors(succession: Succession) -> None:
    tell(succession.writer, Session(31, 0, 4096))
    tell(succession.writer, RESENDING)
    assert succession.obstacle(0.0) is None
    assert succession.session == RESENDING


def test_where_the_kernel_sends_nothing_again_nobody_follows(succession: Succession) -> None:
    tell(succession.writer, Session(37, wire.NO_OPEN_SUPPORT, 4096))
    assert "Linux 6.9" in (succession.obstacle(0.0) or "")


def test_deaths_in_short_order_are_counted_and_old_ones_forgotten(succession: Succession) -> None:
    tell(succession.writer, RESENDING)
    assert [succession.obstacle(at) for at in (0.0, 5.0, 9.0)] == [None] * 3
    assert succession.obstacle(10.0) is None  # the first is ten seconds old
    assert succession.obstacle(11.0) == "more than 3 died within 10 s"


def test_a_mount_that_is_gone_needs_nobody() -> None:
    reader, writer = os.pipe()
    made = Succession(writer)  # POLLERR, as the device of an unmounted file system
    os.close(reader)
    tell(made.writer, RESENDING)
    assert made.obstacle(0.0) == "the mount is gone"
    made.close()
    os.close(writer)
