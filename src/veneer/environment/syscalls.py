"""The system calls that Python 3.11 does not offer: everything that needs ctypes in this package.

Each function raises OSError with the kernel's errno and the path it was about. None of them changes the process's
memory or keeps state; those that change the process (namespaces, root, death signal) say so.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_REMOUNT: Final = 32
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_SLAVE: Final = 1 << 19
MS_UNBINDABLE: Final = 1 << 17

MNT_DETACH: Final = 2

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000

CAP_SYS_ADMIN: Final = 21

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NAME: Final = 15
_PR_SET_CHILD_SUBREAPER: Final = 36
_CAPABILITY_VERSION_3: Final = 0x20080522
_SFD_CLOEXEC: Final = os.O_CLOEXEC
_SFD_NONBLOCK: Final = os.O_NONBLOCK
_SIGINFO: Final = struct.Struct(
    "=IiiII"
)  # the start of struct signalfd_siginfo: signo, errno, code, pid, uid
_SIGINFO_SIZE: Final = 128
_SIGSET_BYTES: Final = 128  # sigset_t of glibc and musl
_PIVOT_ROOT_NUMBERS: Final = {"x86_64": 155, "i686": 217, "armv7l": 218}
_PIVOT_ROOT_GENERIC: Final = 41  # aarch64, riscv64, loongarch64 and whatever came after them

# CDLL(None): the C library that is loaded already; nothing is searched on disk.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.unshare.argtypes = [ctypes.c_int]
_libc.setns.argtypes = [ctypes.c_int, ctypes.c_int]
_libc.signalfd.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
_libc.capget.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
_libc.syscall.restype = ctypes.c_long


def mount(source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
    """mount(2). The error's filename is ``target``."""
    arguments = (os.fsencode(source), os.fsencode(target), fstype.encode(), flags, os.fsencode(data))
    _check(_libc.mount(*arguments), target)


def unmount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def unshare(flags: int) -> None:
    """Give this process new namespaces; CLONE_NEWPID is for its children. Needs a process with one thread."""
    _check(_libc.unshare(flags), "")


def setns(pidfd: int, flags: int) -> None:
    """Enter another process's namespaces (Linux 5.8); CLONE_NEWPID is for our children. Needs a process with one thread."""
    _check(_libc.setns(pidfd, flags), "")


def pivot_root(new_root: str, put_old: str) -> None:
    """Make ``new_root`` the namespace's root and move the old one to ``put_old``, which lies beneath it."""
    number = _PIVOT_ROOT_NUMBERS.get(os.uname().machine, _PIVOT_ROOT_GENERIC)
    new, old = ctypes.c_char_p(os.fsencode(new_root)), ctypes.c_char_p(os.fsencode(put_old))
    _check(_libc.syscall(ctypes.c_long(number), new, old), new_root)


def set_parent_death_signal(number: int) -> None:
    """Have the kernel send ``number`` to this process when its parent thread ends. Not inherited by its children.

    The parent may be gone already: check after the call.
    """
    _check(_libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0), "")


def own_proc_files() -> None:
    """Give our files in /proc to our user again, from whom a change of credentials takes them."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "")


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends. Not inherited by children."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "")


def set_process_name(name: str) -> None:
    """The name that ps and /proc/PID/comm show; 15 bytes."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    _check(_libc.prctl(_PR_SET_NAME, ctypes.addressof(buffer), 0, 0, 0), "")


def has_capability(number: int) -> bool:
    """Whether this process has the capability in effect, in its own user namespace."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    _check(_libc.capget(header, data), "")
    effective = struct.unpack_from("=I", data.raw, 12 * (number // 32))[0]
    return bool(effective >> (number % 32) & 1)


@dataclass(frozen=True, slots=True)
class SignalInfo:
    """A signal that was waiting. ``code``: above 0 the kernel made it (a terminal, for instance), else a process."""

    number: int
    code: int
    sender: int


def signalfd(signals: Iterable[int]) -> int:
    """A descriptor (close on exec, non-blocking) that becomes readable when one of these signals, which are blocked, waits."""
    mask = 0
    for number in signals:
        mask |= 1 << (number - 1)
    fd: int = _libc.signalfd(-1, mask.to_bytes(_SIGSET_BYTES, sys.byteorder), _SFD_CLOEXEC | _SFD_NONBLOCK)
    _check(fd, "")
    return fd


def read_signal(fd: int) -> SignalInfo | None:
    """The next waiting signal of a ``signalfd``; None when none waits."""
    try:
        info = os.read(fd, _SIGINFO_SIZE)
    except BlockingIOError:
        return None
    number, _, code, sender, _ = _SIGINFO.unpack_from(info)
    return SignalInfo(number, code, sender)


def reset_signal_handlers() -> None:
    """Every signal with a handler of ours back to its default action; ignored ones stay ignored.

    SIGPIPE and SIGXFSZ, which the interpreter itself ignores, become default too.
    """
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        mine = callable(handler) and not isinstance(handler, signal.Handlers)
        if mine or number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)


def _check(result: int, path: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path or None)
