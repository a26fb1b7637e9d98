"""The kernel's structs: their sizes, and agreement with <linux/fuse.h> where the machine has it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from veneer.formats import fuse_wire as wire

HEADER = Path("/usr/include/linux/fuse.h")

SIZES = {
    "IN_HEADER": 40, "OUT_HEADER": 16, "ATTR": 88, "ENTRY_OUT": 128, "ATTR_OUT": 104, "DIRENT": 24,
    "INIT_IN": 64, "INIT_OUT": 64, "READ_IN": 40, "GETATTR_IN": 16, "OPEN_IN": 8, "OPEN_OUT": 16,
    "RELEASE_IN": 24, "FLUSH_IN": 24, "FORGET_IN": 8, "BATCH_FORGET_IN": 8, "INTERRUPT_IN": 8, "STATFS_OUT": 80,
    "SETATTR_IN": 88, "GETXATTR_IN": 8, "ACCESS_IN": 8, "LSEEK_IN": 24, "IOCTL_IN": 32, "WRITE_IN": 40,
    "MKNOD_IN": 16, "MKDIR_IN": 8, "RENAME_IN": 8, "RENAME2_IN": 16, "LINK_IN": 8, "CREATE_IN": 16, "FSYNC_IN": 16,
    "LK_IN": 48, "BMAP_IN": 16, "POLL_IN": 24, "FALLOCATE_IN": 32, "COPY_FILE_RANGE_IN": 56, "SYNCFS_IN": 8,
    "INVAL_INODE_OUT": 24, "INVAL_ENTRY_OUT": 16, "STATX_IN": 24, "SETXATTR_IN": 8,
}  # fmt: skip

STRUCTS_IN_HEADER = {
    "IN_HEADER": "fuse_in_header", "OUT_HEADER": "fuse_out_header", "ATTR": "fuse_attr", "INIT_IN": "fuse_init_in",
    "INIT_OUT": "fuse_init_out", "READ_IN": "fuse_read_in", "GETATTR_IN": "fuse_getattr_in",
    "OPEN_IN": "fuse_open_in", "OPEN_OUT": "fuse_open_out", "RELEASE_IN": "fuse_release_in",
    "FLUSH_IN": "fuse_flush_in", "STATFS_OUT": "fuse_kstatfs", "SETATTR_IN": "fuse_setattr_in",
    "LSEEK_IN": "fuse_lseek_in", "IOCTL_IN": "fuse_ioctl_in", "WRITE_IN": "fuse_write_in",
    "CREATE_IN": "fuse_create_in", "FALLOCATE_IN": "fuse_fallocate_in", "POLL_IN": "fuse_poll_in",
    "COPY_FILE_RANGE_IN": "fuse_copy_file_range_in", "INVAL_INODE_OUT": "fuse_notify_inval_inode_out",
    "INVAL_ENTRY_OUT": "fuse_notify_inval_entry_out", "INTERRUPT_IN": "fuse_interrupt_in",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SIZES))
def test_struct_has_the_kernels_size(name: str) -> None:
    assert getattr(wire, name).size == SIZES[name]


def test_each_opcode_stands_once() -> None:
    numbers = [row.number for row in wire.OPCODES]
    assert len(set(numbers)) == len(numbers)
    assert len({row.name for row in wire.OPCODES}) == len(numbers)


def test_only_forgets_interrupts_and_notify_replies_go_unanswered() -> None:
    silent = {row.name for row in wire.OPCODES if not row.answered}
    assert silent == {"FORGET", "BATCH_FORGET", "INTERRUPT", "NOTIFY_REPLY"}


def test_replies_carry_their_whole_length() -> None:
    assert wire.reply(7, b"abc") == b"\x13\0\0\0" + bytes(4) + b"\x07" + bytes(7) + b"abc"
    assert wire.error_reply(wire.RESENT | 2, 5) == b"\x10\0\0\0\xfb\xff\xff\xff\x02" + bytes(6) + b"\x80"
    for notice in (wire.inval_entry(1, b"name"), wire.inval_inode(3), wire.resend()):
        length, code, unique = wire.OUT_HEADER.unpack_from(notice)
        assert length == len(notice)
        assert code > 0
        assert unique == 0


def _struct_size(text: str, name: str) -> int:
    match = re.search(rf"struct {name} \{{(.*?)\n\}};", text, re.DOTALL)
    assert match is not None
    body = re.sub(r"/\*.*?\*/", "", match[1], flags=re.DOTALL)
    size = 0
    for bits, repeat in re.findall(r"u?int(\d+)_t\s+\w+(?:\[(\d+)\])?;", body):
        size += int(bits) // 8 * int(repeat or 1)
    return size


@pytest.mark.skipif(not HEADER.exists(), reason="needs <linux/fuse.h> (linux-libc-dev)")
def test_layouts_agree_with_the_systems_header() -> None:
    text = HEADER.read_text()
    for ours, theirs in STRUCTS_IN_HEADER.items():
        assert _struct_size(text, theirs) == getattr(wire, ours).size, theirs


@pytest.mark.skipif(not HEADER.exists(), reason="needs <linux/fuse.h> (linux-libc-dev)")
def test_numbers_agree_with_the_systems_header() -> None:
    text = HEADER.read_text()
    numbers = {m[1]: int(m[2]) for m in re.finditer(r"^\tFUSE_(\w+)\s*= (\d+)", text, re.MULTILINE)}
    for row in wire.OPCODES:
        assert numbers.get(row.name, row.number) == row.number, row.name
    flags = {
        m[1]: 1 << int(m[2])
        for m in re.finditer(r"^#define FUSE_(\w+)\s+\(1(?:ULL)? << (\d+)\)", text, re.MULTILINE)
    }
    for name in ("ASYNC_READ", "DO_READDIRPLUS", "READDIRPLUS_AUTO", "NO_OPEN_SUPPORT", "PARALLEL_DIROPS",
                 "MAX_PAGES", "CACHE_SYMLINKS", "NO_OPENDIR_SUPPORT", "EXPLICIT_INVAL_DATA", "INIT_EXT"):  # fmt: skip
        assert flags[name] == getattr(wire, name), name
