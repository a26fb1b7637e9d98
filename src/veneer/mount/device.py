"""/dev/fuse, mount(2) and umount(2). The only module of the mount server that uses ctypes.

Nothing here touches a file below the mount point: with nobody serving yet, that would never return.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
from pathlib import Path

from veneer.model.errors import MachineError

DEVICE = "/dev/fuse"
READ_AHEAD_KB = 1024
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_MNT_DETACH = 2
_OCTAL = re.compile(rb"\\([0-7]{3})")
"""How mountinfo writes blanks and backslashes."""


def open_fuse() -> int:
    """A fresh descriptor of /dev/fuse, not inherited over exec. MachineError."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        hint = {
            errno.ENOENT: "load the fuse module, or give the container /dev/fuse (docker run --device /dev/fuse)",
            errno.ENODEV: "load the fuse module (modprobe fuse)",
            errno.EACCES: "/dev/fuse must be readable and writable for this user (chmod 666, as udev does)",
            errno.EPERM: "this container may not use /dev/fuse (device cgroup); docker run --device /dev/fuse",
        }.get(error.errno or 0, "")
        raise MachineError(f"cannot open {DEVICE}: {error.strerror}", where=DEVICE, hint=hint) from error


def mount_fuse(fd: int, target: str, *, source: str = "veneer", allow_other: bool = True) -> None:
    """Mounts ``fd`` on the directory ``target``, read only, and raises its read-ahead if we may. MachineError.

    Returns before the server has answered anything; opening files blocks until it does.
    """
    options = f"fd={fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()},default_permissions"
    if allow_other:
        options += ",allow_other"
    where = os.path.realpath(target)
    _call("mount", source.encode(), os.fsencode(target), b"fuse.veneer", _MS_RDONLY | _MS_NOSUID | _MS_NODEV,
          options.encode(), where=target)  # fmt: skip
    raise_read_ahead(where)


def umount(target: str, *, detach: bool = False) -> None:
    """Unmounts; ``detach`` does so even when files are open. MachineError."""
    _call("umount2", os.fsencode(target), _MNT_DETACH if detach else 0, where=target)


def raise_read_ahead(target: str, kilobytes: int = READ_AHEAD_KB) -> bool:
    """Sets the mount's read-ahead, 128 KiB otherwise. False when not permitted (not root, /sys read only).

    ``target`` is absolute and free of links: to resolve it would ask our own server.
    """
    number = device_number(target)
    if number is None:
        return False
    with contextlib.suppress(OSError):
        Path(f"/sys/class/bdi/{number}/read_ahead_kb").write_text(str(kilobytes))
        return True
    return False


def device_number(target: str) -> str | None:
    """``major:minor`` of what is mounted on ``target``, from mountinfo; absolute and free of links."""
    found = None
    wanted = os.fsencode(target)
    with open("/proc/self/mountinfo", "rb") as lines:
        for line in lines:
            fields = line.split(b" ")
            if _OCTAL.sub(lambda m: bytes([int(m[1], 8)]), fields[4]) == wanted:
                found = fields[2].decode("ascii")
    return found


def _call(name: str, *arguments: bytes | int, where: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    function = getattr(libc, name)
    converted = [ctypes.c_ulong(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in arguments]
    if function(*converted) != 0:
        code = ctypes.get_errno()
        hint = "this needs root, or root of a user namespace (unshare -Urm)" if code == errno.EPERM else ""
        raise MachineError(f"{name}: {os.strerror(code)}", where=where, hint=hint)
