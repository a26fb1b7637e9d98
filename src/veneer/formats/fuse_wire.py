"""The FUSE kernel protocol, version 7: what Linux writes to and expects from /dev/fuse.

Source: include/uapi/linux/fuse.h up to 7.45 (Linux 6.18). Integers have the host's byte order; we serve little-endian
hosts only. Structs are padded to 8 bytes by hand, so the layouts below hold for every architecture.

    request = fuse_in_header (40) · the opcode's struct · names, each ended by NUL
    reply   = fuse_out_header (16; error = 0 or -errno) · the opcode's struct or bytes
    notice  = fuse_out_header (error = the code, unique = 0) · the code's struct

One read(2) gives one whole request and needs a buffer of max(8192, max_write + 80) bytes; one write(2) or writev(2) must
give one whole reply. write(2) answers ENOENT for a request that was aborted meanwhile, read(2) ENODEV once unmounted.

Who enforces what: the kernel checks that a reply's length is what it says and what the opcode allows (EINVAL, and EIO
for the caller); ``mount.dispatch`` that every request that expects a reply gets one.

Bit 0 of ``unique`` marks an INTERRUPT, bit 63 a request sent again after FUSE_NOTIFY_RESEND: replies repeat the value.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

MAJOR = 7
MINOR = 45
OLDEST_MINOR = 31
"""Of Linux 5.4, older than any kernel we support; with it, every struct has the size given here."""
ROOT_NODE = 1
RESENT = 1 << 63

IN_HEADER = struct.Struct("<IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding"""
OUT_HEADER = struct.Struct("<IiQ")
"""len, error, unique"""
IN_SIZE = IN_HEADER.size
OUT_SIZE = OUT_HEADER.size

_ATTR = "QQQQQQIIIIIIIIII"
ATTR = struct.Struct("<" + _ATTR)
"""ino, size, blocks, atime, mtime, ctime, their nsec, mode, nlink, uid, gid, rdev, blksize, flags"""
ENTRY_OUT = struct.Struct("<QQQQII" + _ATTR)
"""nodeid, generation, entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec, attr"""
ATTR_OUT = struct.Struct("<QII" + _ATTR)
"""attr_valid, attr_valid_nsec, dummy, attr"""
DIRENT = struct.Struct("<QQII")
"""ino, off, namelen, type; then the name, padded to 8"""
INIT_IN = struct.Struct("<IIIII44x")
"""major, minor, max_readahead, flags, flags2. Kernels before 5.17 send 16 bytes: no flags2."""
INIT_OUT = struct.Struct("<IIIIHHIIHHII24x")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages,
map_alignment, flags2, max_stack_depth"""
READ_IN = struct.Struct("<QQIIQII")
"""fh, offset, size, read_flags, lock_owner, flags, padding. READDIR and READDIRPLUS too: offset is the cookie."""
GETATTR_IN = struct.Struct("<IIQ")
OPEN_IN = struct.Struct("<II")
OPEN_OUT = struct.Struct("<QII")
RELEASE_IN = struct.Struct("<QIIQ")
FLUSH_IN = struct.Struct("<QIIQ")
FORGET_IN = struct.Struct("<Q")
BATCH_FORGET_IN = struct.Struct("<II")
INTERRUPT_IN = struct.Struct("<Q")
STATFS_OUT = struct.Struct("<QQQQQIIII24x")
"""blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, padding"""
SETATTR_IN = struct.Struct("<IIQQQQQQIIIIIIII")
GETXATTR_IN = struct.Struct("<II")
SETXATTR_IN = struct.Struct("<II")
ACCESS_IN = struct.Struct("<II")
LSEEK_IN = struct.Struct("<QQII")
IOCTL_IN = struct.Struct("<QIIQII")
WRITE_IN = struct.Struct("<QQIIQII")
MKNOD_IN = struct.Struct("<IIII")
MKDIR_IN = struct.Struct("<II")
RENAME_IN = struct.Struct("<Q")
RENAME2_IN = struct.Struct("<QII")
LINK_IN = struct.Struct("<Q")
CREATE_IN = struct.Struct("<IIII")
FSYNC_IN = struct.Struct("<QII")
LK_IN = struct.Struct("<QQQQIIII")
BMAP_IN = struct.Struct("<QII")
POLL_IN = struct.Struct("<QQII")
FALLOCATE_IN = struct.Struct("<QQQII")
COPY_FILE_RANGE_IN = struct.Struct("<QQQQQQQ")
SYNCFS_IN = struct.Struct("<Q")
STATX_IN = struct.Struct("<IIQII")

# Flags of INIT. Those from 32 on travel in flags2 and count only together with INIT_EXT.
ASYNC_READ = 1 << 0
DO_READDIRPLUS = 1 << 13
READDIRPLUS_AUTO = 1 << 14
NO_OPEN_SUPPORT = 1 << 17
PARALLEL_DIROPS = 1 << 18
MAX_PAGES = 1 << 22
CACHE_SYMLINKS = 1 << 23
NO_OPENDIR_SUPPORT = 1 << 24
EXPLICIT_INVAL_DATA = 1 << 25
INIT_EXT = 1 << 30
HAS_RESEND = 1 << 39

# Flags of an OPEN reply.
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_CACHE_DIR = 1 << 3

# Codes of notices, with their structs.
NOTIFY_INVAL_INODE = 2
NOTIFY_INVAL_ENTRY = 3
NOTIFY_RESEND = 7
INVAL_INODE_OUT = struct.Struct("<Qqq")
INVAL_ENTRY_OUT = struct.Struct("<QII")


@dataclass(frozen=True, slots=True)
class Opcode:
    """One kind of request. ``reply`` is None when the reply is bare, bytes without a struct, or absent."""

    number: int
    name: str
    request: struct.Struct | None
    reply: struct.Struct | None
    since: str
    answered: bool = True
    """Whether the kernel waits for a reply at all."""


LOOKUP = 1
FORGET = 2
GETATTR = 3
READLINK = 5
OPEN = 14
READ = 15
STATFS = 17
INIT = 26
OPENDIR = 27
READDIR = 28
INTERRUPT = 36
BATCH_FORGET = 42
READDIRPLUS = 44

OPCODES = (
    Opcode(LOOKUP, "LOOKUP", None, ENTRY_OUT, "7.1"),
    Opcode(FORGET, "FORGET", FORGET_IN, None, "7.1", answered=False),
    Opcode(GETATTR, "GETATTR", GETATTR_IN, ATTR_OUT, "7.1"),
    Opcode(4, "SETATTR", SETATTR_IN, ATTR_OUT, "7.1"),
    Opcode(READLINK, "READLINK", None, None, "7.1"),
    Opcode(6, "SYMLINK", None, ENTRY_OUT, "7.1"),
    Opcode(8, "MKNOD", MKNOD_IN, ENTRY_OUT, "7.1"),
    Opcode(9, "MKDIR", MKDIR_IN, ENTRY_OUT, "7.1"),
    Opcode(10, "UNLINK", None, None, "7.1"),
    Opcode(11, "RMDIR", None, None, "7.1"),
    Opcode(12, "RENAME", RENAME_IN, None, "7.1"),
    Opcode(13, "LINK", LINK_IN, ENTRY_OUT, "7.1"),
    Opcode(OPEN, "OPEN", OPEN_IN, OPEN_OUT, "7.1"),
    Opcode(READ, "READ", READ_IN, None, "7.1"),
    Opcode(16, "WRITE", WRITE_IN, None, "7.1"),
    Opcode(STATFS, "STATFS", None, STATFS_OUT, "7.1"),
    Opcode(18, "RELEASE", RELEASE_IN, None, "7.1"),
    Opcode(20, "FSYNC", FSYNC_IN, None, "7.1"),
    Opcode(21, "SETXATTR", SETXATTR_IN, None, "7.1"),
    Opcode(22, "GETXATTR", GETXATTR_IN, None, "7.1"),
    Opcode(23, "LISTXATTR", GETXATTR_IN, None, "7.1"),
    Opcode(24, "REMOVEXATTR", None, None, "7.1"),
    Opcode(25, "FLUSH", FLUSH_IN, None, "7.1"),
    Opcode(INIT, "INIT", INIT_IN, INIT_OUT, "7.1"),
    Opcode(OPENDIR, "OPENDIR", OPEN_IN, OPEN_OUT, "7.1"),
    Opcode(READDIR, "READDIR", READ_IN, None, "7.1"),
    Opcode(29, "RELEASEDIR", RELEASE_IN, None, "7.1"),
    Opcode(30, "FSYNCDIR", FSYNC_IN, None, "7.1"),
    Opcode(31, "GETLK", LK_IN, None, "7.7"),
    Opcode(32, "SETLK", LK_IN, None, "7.7"),
    Opcode(33, "SETLKW", LK_IN, None, "7.7"),
    Opcode(34, "ACCESS", ACCESS_IN, None, "7.3"),
    Opcode(35, "CREATE", CREATE_IN, None, "7.3"),
    Opcode(INTERRUPT, "INTERRUPT", INTERRUPT_IN, None, "7.7", answered=False),
    Opcode(37, "BMAP", BMAP_IN, None, "7.8"),
    Opcode(38, "DESTROY", None, None, "7.8"),
    Opcode(39, "IOCTL", IOCTL_IN, None, "7.11"),
    Opcode(40, "POLL", POLL_IN, None, "7.11"),
    Opcode(41, "NOTIFY_REPLY", None, None, "7.15", answered=False),
    Opcode(BATCH_FORGET, "BATCH_FORGET", BATCH_FORGET_IN, None, "7.16", answered=False),
    Opcode(43, "FALLOCATE", FALLOCATE_IN, None, "7.19"),
    Opcode(READDIRPLUS, "READDIRPLUS", READ_IN, None, "7.21"),
    Opcode(45, "RENAME2", RENAME2_IN, None, "7.23"),
    Opcode(46, "LSEEK", LSEEK_IN, None, "7.24"),
    Opcode(47, "COPY_FILE_RANGE", COPY_FILE_RANGE_IN, None, "7.28"),
    Opcode(50, "SYNCFS", SYNCFS_IN, None, "7.34"),
    Opcode(51, "TMPFILE", CREATE_IN, None, "7.37"),
    Opcode(52, "STATX", STATX_IN, None, "7.39"),
)


def reply(unique: int, body: bytes = b"") -> bytes:
    """A whole successful reply."""
    return OUT_HEADER.pack(OUT_SIZE + len(body), 0, unique) + body


def error_reply(unique: int, errno: int) -> bytes:
    """A whole reply that gives the caller ``errno`` (positive here)."""
    return OUT_HEADER.pack(OUT_SIZE, -errno, unique)


def inval_entry(parent: int, name: bytes) -> bytes:
    """The notice that makes the kernel forget what ``name`` in ``parent`` is."""
    body = INVAL_ENTRY_OUT.pack(parent, len(name), 0) + name + b"\0"
    return OUT_HEADER.pack(OUT_SIZE + len(body), NOTIFY_INVAL_ENTRY, 0) + body


def inval_inode(node: int) -> bytes:
    """The notice that makes the kernel forget a node's attributes and all of its pages."""
    return OUT_HEADER.pack(OUT_SIZE + INVAL_INODE_OUT.size, NOTIFY_INVAL_INODE, 0) + INVAL_INODE_OUT.pack(
        node, 0, 0
    )


def resend() -> bytes:
    """The notice that makes the kernel hand out again what was read and not answered (HAS_RESEND negotiated)."""
    return OUT_HEADER.pack(OUT_SIZE, NOTIFY_RESEND, 0)
