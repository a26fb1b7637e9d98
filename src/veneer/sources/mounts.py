"""Which file system a directory lies on, found out without a question to that file system.

An ``O_PATH`` descriptor of a mount's root is opened by the kernel alone. So a directory that our own mount covers is
recognised here, where ``stat`` would wait for an answer that only we can give.
"""

from __future__ import annotations

import os
from pathlib import Path

from veneer.formats.mountinfo import parse_mountinfo

OWN = b"fuse.veneer"
_REMOTE = (b"nfs", b"nfs4", b"cifs", b"smb3", b"9p", b"ceph", b"afs", b"virtiofs", b"lustre", b"glusterfs")
_LOCAL_FUSE = (b"fuseblk", b"fuse.fuse-overlayfs")


def open_directory(directory: Path) -> int:
    """An ``O_PATH`` descriptor for the caller to close. OSError."""
    return os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def file_system_of(descriptor: int) -> bytes:
    """The type of the file system as the kernel names it; b"" when it cannot be told (no /proc, another namespace)."""
    try:
        about = Path(f"/proc/self/fdinfo/{descriptor}").read_bytes()
        number = about.partition(b"mnt_id:")[2].split()[0] + b" "
        mounts = Path("/proc/self/mountinfo").read_bytes()
    except (OSError, IndexError):
        return b""
    return next(
        (parse_mountinfo(line)[0].fstype for line in mounts.split(b"\n") if line.startswith(number)), b""
    )


def is_remote(file_system: bytes) -> bool:
    """Whether another machine may write there: then neither shared memory nor locks can be counted on."""
    if file_system.startswith(b"fuse"):
        return file_system not in _LOCAL_FUSE
    return file_system in _REMOTE
