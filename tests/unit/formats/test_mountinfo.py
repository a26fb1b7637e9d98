"""The kernel's list of mounts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.mountinfo import write_mountinfo
from veneer.formats.mountinfo import MountInfo, parse_mountinfo
from veneer.model.errors import FormatError

MANUAL = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 propagate_from:2 - ext3 /dev/root rw,errors=continue\n"
OVERLAY = (
    b"70 60 0:51 / /nix/store rw,nosuid - overlay overlay "
    b"rw,lowerdir=/.veneer/lower/nix/store,upperdir=/a\\040b,workdir=/w,userxattr\n"
)

# What the kernel prints has no bare separators in its unescaped fields.
words = st.text("abcz019_:=.", min_size=1, max_size=8).map(str.encode).filter(lambda word: word != b"-")
names = st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name)
numbers = st.integers(0, 2**31)
mounts = st.builds(
    MountInfo,
    mount_id=numbers,
    parent_id=numbers,
    major=st.integers(0, 4095),
    minor=st.integers(0, 2**20),
    root=names,
    mount_point=names,
    options=st.lists(words, min_size=1, max_size=3).map(tuple),
    optional=st.lists(words, max_size=3).map(tuple),
    fstype=names,
    source=st.one_of(st.just(b""), names),
    super_options=words,
)


def test_line_of_the_manual_is_read() -> None:
    (mount,) = parse_mountinfo(MANUAL)
    assert mount == MountInfo(
        36, 35, 98, 0, b"/mnt1", b"/mnt2", (b"rw", b"noatime"), (b"master:1", b"propagate_from:2"), b"ext3",
        b"/dev/root", b"rw,errors=continue",
    )  # fmt: skip
    assert write_mountinfo([mount]) == MANUAL


def test_super_options_stay_as_the_kernel_wrote_them() -> None:
    (mount,) = parse_mountinfo(OVERLAY)
    assert mount.super_options.endswith(b"upperdir=/a\\040b,workdir=/w,userxattr")
    assert write_mountinfo([mount]) == OVERLAY


def test_empty_source_is_read() -> None:
    (mount,) = parse_mountinfo(b"1 0 0:5 / /x rw - tmpfs  rw\n")
    assert mount.source == b""


def test_backslash_without_digits_stays() -> None:
    (mount,) = parse_mountinfo(b"1 0 0:5 / /x\\9\\134\\777 rw - tmpfs tmpfs rw\n")
    assert mount.mount_point == b"/x\\9\\\\777"


def test_this_machines_list_is_read() -> None:
    with open("/proc/self/mountinfo", "rb") as file:
        data = file.read()
    assert b"/proc" in [mount.mount_point for mount in parse_mountinfo(data)]


@given(st.lists(mounts, max_size=4))
def test_what_is_written_is_read_back(values: list[MountInfo]) -> None:
    assert parse_mountinfo(write_mountinfo(values)) == values


@given(st.one_of(st.binary(), st.binary().map(lambda noise: MANUAL[:20] + noise)))
def test_any_input_is_accepted_or_refused(data: bytes) -> None:
    try:
        parse_mountinfo(data)
    except FormatError as error:
        assert "line" in error.where


@pytest.mark.parametrize(
    "line", [b"x 35 98:0 / / rw - a b c", b"1 2 3 / / rw - a b c", b"1 2 3:4 / / rw - a"]
)
def test_broken_line_is_refused(line: bytes) -> None:
    with pytest.raises(FormatError):
        parse_mountinfo(line)
