"""Traces: round trips, merging, and any bytes at all."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.formats import touches, trace
from veneer.formats.trace import TracedFile, TracedPath, clip, coalesce, decode, encode, from_rows, to_rows
from veneer.formats.tree_index import node_id
from veneer.model.errors import FormatError, LimitError, VeneerError
from veneer.model.hashes import Hash
from veneer.model.store_path import StorePath

HASH = Hash("sha256", bytes(32))
GIT = StorePath("1" * 32, "git-2.39.5")
LIBC = StorePath("2" * 32, "glibc-2.37")
FIRST = '{"veneer-trace":1}\n'


def path(store_path: StorePath, *files: TracedFile, nar_size: int = 1 << 20) -> TracedPath:
    return TracedPath(store_path, HASH, nar_size, files)


def line(**changes: object) -> bytes:
    row = {"path": str(GIT), "nar_hash": HASH.sri, "nar_size": 9, "files": [], **changes}
    return (FIRST + json.dumps(row)).encode()


NAMES = st.lists(
    st.binary(min_size=1, max_size=8).filter(
        lambda part: b"/" not in part and b"\0" not in part and part not in (b".", b"..")
    ),
    max_size=3,
).map(b"/".join)


@st.composite
def files(draw: st.DrawFn) -> TracedFile:
    size = draw(st.integers(1, 1 << 40))
    parts = st.tuples(st.integers(0, size - 1), st.integers(1, size))
    return TracedFile(draw(NAMES), size, clip(draw(st.lists(parts, min_size=1, max_size=4)), size))


@given(st.lists(st.lists(files(), max_size=4, unique_by=lambda file: file.name), max_size=4))
def test_what_is_written_is_read_again(made: list[list[TracedFile]]) -> None:
    paths = tuple(path(StorePath(f"{i:032d}", "x"), *found) for i, found in enumerate(made))
    data = encode(paths)
    assert decode(data) == paths
    assert encode(decode(data)) == data
    assert data.isascii()


def test_a_trace_is_these_bytes() -> None:
    made = (
        path(
            GIT, TracedFile(b"bin/git", 4096, ((0, 4096),)), TracedFile(b"\xff\n", 9000, ((0, 10), (50, 1)))
        ),
        path(LIBC),
    )
    assert encode(made).decode().splitlines() == [
        '{"veneer-trace":1}',
        '{"path":"11111111111111111111111111111111-git-2.39.5","nar_hash":"sha256-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",'
        '"nar_size":1048576,"files":[["bin/git",4096],["\\udcff\\n",9000,0,10,50,1]]}',
        '{"path":"22222222222222222222222222222222-glibc-2.37","nar_hash":"sha256-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",'
        '"nar_size":1048576,"files":[]}',
    ]


def test_traces_after_one_another_are_a_trace_of_both() -> None:
    one = (path(GIT, TracedFile(b"bin/git", 9000, ((0, 100),))),)
    other = (
        path(LIBC),
        path(GIT, TracedFile(b"bin/git", 9000, ((50, 100),)), TracedFile(b"x", 5, ((0, 5),))),
    )
    assert decode(encode(one) + encode(other)) == (
        path(GIT, TracedFile(b"bin/git", 9000, ((0, 150),)), TracedFile(b"x", 5, ((0, 5),))),
        path(LIBC),
    )


def test_a_file_that_one_trace_has_whole_is_whole_in_both() -> None:
    one = path(GIT, TracedFile(b"x", 100, ((0, 100),)))
    other = path(GIT, TracedFile(b"x", 200, ((7, 1),)))
    for rows in ([one, other], [other, one]):
        assert decode(b"".join(encode((row,)) for row in rows))[0].files[0].is_whole


def test_lines_may_be_empty() -> None:
    assert decode(FIRST.encode() + b"\n\r\n") == ()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"null",
        b'{"veneer-trace":2}\n',
        b'{"veneer-trace":true}\n',
        b'{"veneer-trace":1,"more":1}\n',
        line().split(b"\n")[1],
        FIRST.encode() + b"[]",
        FIRST.encode() + b"[" * 200_000,
        FIRST.encode() + b"\xff",
        FIRST.encode("utf-16-le"),
        line(more=1),
        line(path="no-path"),
        line(path=7),
        line(nar_hash="sha1-AAAAAAAAAAAAAAAAAAAAAAAAAAA="),
        line(nar_hash="md5"),
        line(nar_size=-1),
        line(nar_size=1 << 63),
        line(nar_size=True),
        line(nar_size=1.0),
        line(files={}),
        line(files=["x"]),
        line(files=[["x"]]),
        line(files=[["x", 9, 1]]),
        line(files=[["x", 9, 1, 9]]),
        line(files=[["x", 9, 0, 0]]),
        line(files=[["x", 9, -1, 1]]),
        line(files=[[7, 9]]),
        line(files=[["../x", 9]]),
        line(files=[["a//b", 9]]),
        line(files=[["/a", 9]]),
        line(files=[["a\0", 9]]),
        line(files=[["\ud800", 9]]),
        line(files=[["a" * 5000, 9]]),
    ],
)
def test_what_is_no_trace_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode(data)


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_a_trace_or_refused(data: bytes, begun: bool) -> None:
    try:
        found = decode((FIRST.encode() if begun else b"") + data)
    except FormatError:
        return
    assert decode(encode(found)) == found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["path", "nar_hash", "nar_size", "files"]), inner)
    ),
    max_leaves=10,
)


@given(st.lists(JSON, max_size=3))
def test_any_rows_are_a_trace_or_refused(rows: list[object]) -> None:
    try:
        from_rows(rows)
    except VeneerError as error:
        assert isinstance(error, FormatError)


def test_too_large_a_trace_is_refused_before_it_is_taken_apart() -> None:
    with pytest.raises(LimitError):
        decode(b" " * (trace.MAX_SIZE + 1))
    huge = path(GIT, *(TracedFile(f"{i:04000d}".encode(), 1, ((0, 1),)) for i in range(4000)))
    with pytest.raises(LimitError):
        encode((huge,))


def test_ranges_become_one_where_they_meet() -> None:
    assert coalesce([(10, 5), (0, 5), (5, 2), (30, 0), (12, 1)]) == ((0, 7), (10, 5))
    assert clip([(0, 4096), (8192, 4096), (12288, 1)], 9000) == ((0, 4096), (8192, 808))


def test_rows_are_what_the_daemon_is_sent() -> None:
    made = (path(GIT, TracedFile(b"bin/git", 9000, ((0, 100),))),)
    assert from_rows(json.loads(json.dumps(to_rows(made)))) == made


# Notes of the mount servers.


def test_notes_are_read_in_order() -> None:
    data = touches.name_row(node_id(7, 0), str(GIT).encode()) + touches.read_row(node_id(7, 3), 4097, 10)
    assert list(touches.parse(data)) == [touches.Touched(7, GIT), touches.Touched(7, None, 3, 4096, 4096)]
    assert len(data) % touches.ROW_SIZE == 0


def test_a_name_that_ends_with_the_notes_is_no_shorter_name() -> None:
    name = touches.name_row(node_id(8, 0), str(GIT).encode())
    assert [row.name for row in touches.parse(name[: -touches.ROW_SIZE]) if row.name] == []


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_name_that_is_cut_off_is_lost_alone(lost: int) -> None:
    first, last = touches.read_row(node_id(7, 3), 0, 10), touches.read_row(node_id(9, 1), 0, 1)
    name = touches.name_row(node_id(8, 0), str(GIT).encode())
    found = list(touches.parse(first + name[: -lost * touches.ROW_SIZE] + last))
    assert (found[0].number, found[-1].number) == (7, 9)
    assert [row for row in found if row.name is not None] == []


@given(st.binary(max_size=200))
def test_any_notes_can_be_read(data: bytes) -> None:
    for row in touches.parse(data):
        assert row.name is not None or row.size > 0


def test_a_file_told_in_very_many_parts_takes_no_more_time_than_others() -> None:
    told = [["a", 1 << 40, 2 * n, 1] for n in range(20_000)]
    start = time.process_time()
    (found,) = decode(line(files=told))
    assert found.files == (TracedFile(b"a", 1 << 40, tuple((2 * n, 1) for n in range(20_000))),)
    assert time.process_time() - start < 10  # one by one: a minute
