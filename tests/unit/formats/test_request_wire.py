"""The request protocol: every message comes back as it went, cut anywhere; what breaks the rules is refused early."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.formats import request_wire as wire
from veneer.formats.request_wire import Frame, Kind, Splitter
from veneer.model.errors import FormatError, LimitError

U64 = st.integers(0, 2**64 - 1)
FREE_BODY = [
    k for k in Kind if k in (Kind.HELLO, Kind.LOOKUP, Kind.CONTROL, Kind.RESULT, Kind.PROGRESS, Kind.PRESENT)
]
FRAMES = st.builds(Frame, st.sampled_from(FREE_BODY), U64, st.binary(max_size=300))


@given(st.lists(FRAMES, max_size=5), st.data())
def test_frames_survive_any_cut_of_the_stream(frames: list[Frame], data: st.DataObject) -> None:
    stream = b"".join(frame.encode() for frame in frames)
    splitter, got, at = Splitter(), [], 0
    while at < len(stream):
        size = data.draw(st.integers(1, len(stream) - at))
        got += splitter.feed(stream[at : at + size])
        at += size
    assert got == frames


@given(U64, U64, U64, st.booleans())
def test_bodies_come_back_as_they_went(a: int, b: int, c: int, whole: bool) -> None:
    assert wire.content(wire.content_body(a, b, c)) == (a, b, c)
    assert wire.ready(wire.ready_body(a, b, c, whole=whole, inode=a)) == (a, b, c, whole, a)
    assert wire.found(wire.found_body(a, b)) == (a, b)
    assert wire.path_number(wire.path_number_body(a)) == a
    (body,) = wire.touched_bodies([(a, b, whole), (c, a, True)])
    assert wire.touched(body) == [(a, b, whole), (c, a, True)]
    assert wire.quarantined(wire.quarantined_body(a, "name")) == (a, "name")


def test_an_announced_body_over_the_limit_is_refused_before_it_is_read() -> None:
    header = wire.HEADER.pack(wire.MAX_BODY + 1, Kind.LOOKUP, 1)
    with pytest.raises(LimitError):
        Splitter().feed(header)


def test_many_touched_paths_are_told_in_several_messages_and_one_too_big_is_refused() -> None:
    rows = [(number, 1, False) for number in range(2 * wire.TOUCHED_ROWS + 1)]
    bodies = wire.touched_bodies(rows)
    assert wire.touched_bodies([]) == []
    stream = b"".join(Frame(Kind.TOUCHED, 1, body).encode() for body in bodies)
    got = [wire.touched(frame.body) for frame in Splitter().feed(stream)]
    assert [len(part) for part in got] == [wire.TOUCHED_ROWS, wire.TOUCHED_ROWS, 1]
    assert [row for part in got for row in part] == rows
    with pytest.raises(LimitError):
        Splitter().feed(wire.HEADER.pack(len(bodies[0]) + 17, Kind.TOUCHED, 1))


def test_unknown_kinds_and_wrong_sizes_are_refused() -> None:
    with pytest.raises(FormatError):
        Splitter().feed(wire.HEADER.pack(0, 99, 1))
    with pytest.raises(FormatError):
        Splitter().feed(wire.HEADER.pack(7, Kind.CONTENT, 1))
    with pytest.raises(FormatError):
        Splitter().feed(wire.HEADER.pack(8, Kind.DIRECTORY, 1))


@given(st.binary(max_size=200))
def test_any_bytes_are_accepted_or_refused_with_a_format_error(data: bytes) -> None:
    try:
        for frame in Splitter().feed(data):
            assert isinstance(frame, Frame)
    except FormatError as error:
        assert error.what


@pytest.mark.parametrize(
    ("read", "body"), [(wire.failed, b"abc"), (wire.quarantined, b"1234567"), (wire.touched, b"x" * 18)]
)
def test_short_bodies_are_refused(read: object, body: bytes) -> None:
    assert callable(read)
    with pytest.raises(FormatError):
        read(body)
