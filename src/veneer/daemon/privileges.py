"""What a daemon gives up before it reads anything from anybody.

``become`` makes a daemon that root started one of an ordinary user. ``renounce`` is for every daemon: no program that it
starts gains rights (no_new_privs), and one that stays root keeps, of root's capabilities, only the two that let it open
files that are not root's: caches and keys in directories of users, the host store's temporary roots. What is left to it
is in ``docs/concepts/trust.md``. Both concern the calling thread and those it starts, so they come first in a program.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import struct
from pathlib import Path

from veneer.model.errors import CacheError, MachineError, UsageError

CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
KEPT = (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)
_CAP_SETPCAP = 8
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_VERSION_3 = 0x20080522


def become(name: str, cache_root: Path) -> None:
    """Become the user ``name``, with its groups; a cache directory that is new or empty is given to it.

    UsageError: there is no such user, or we are not root. CacheError: the directory is somebody else's.
    """
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        raise UsageError(f"there is no user {name!r}", hint="useradd --system, or systemd-sysusers") from None
    if os.geteuid() == user.pw_uid:
        return
    if os.geteuid() != 0:
        raise UsageError(f"only root can become {name}", hint="leave out --user")
    try:
        status = cache_root.stat()
        if status.st_uid != user.pw_uid:
            if any(cache_root.iterdir()):
                raise CacheError(
                    f"the cache directory is not {name}'s but that of uid {status.st_uid}",
                    where=str(cache_root),
                    hint=f"chown -R {name}: {cache_root}, with no daemon running, or choose another",
                )
            os.chown(cache_root, user.pw_uid, user.pw_gid)
        os.initgroups(name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
    except OSError as error:
        raise MachineError(f"cannot become {name}: {error.strerror}", where=str(cache_root)) from error
    os.environ["HOME"] = user.pw_dir


def renounce() -> None:
    """Give up what a store daemon never needs. What the machine does not let us give up, stays."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    number = 0
    while libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0) >= 0:
        if number not in (*KEPT, _CAP_SETPCAP):
            libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
        number += 1
    libc.prctl(_PR_CAPBSET_DROP, _CAP_SETPCAP, 0, 0, 0)
    header = struct.pack("<Ii", _VERSION_3, 0)
    held = ctypes.create_string_buffer(24)  # effective, permitted, inheritable; then the same of the upper 32
    if libc.capget(header, held) == 0:
        wanted = sum(1 << cap for cap in KEPT) & struct.unpack_from("<6I", held)[1]
        libc.capset(header, struct.pack("<6I", wanted, wanted, 0, 0, 0, 0))
