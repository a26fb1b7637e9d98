"""Checks of the kernel and of what it allows this user."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from veneer.doctor.finding import Result, Subject
from veneer.environment import machine, syscalls
from veneer.formats.mountinfo import parse_mountinfo
from veneer.model.errors import MachineError
from veneer.mount import device

OLDEST = (5, 11)
HAND_OVER = (6, 9)
_FILE_SYSTEM = "fuse.veneer"
_TRIAL_SECONDS = 8.0


def kernel(subject: Subject) -> Iterator[Result]:
    yield kernel_version(os.uname().release)


def kernel_version(release: str) -> Result:
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is None:
        return Result(
            "warning", f"the kernel's version is not understood: {release}", "Linux 5.11 or newer is needed"
        )
    version = (int(match[1]), int(match[2]))
    if version < OLDEST:
        return Result(
            "failed", f"Linux {release} is older than 5.11", "use a machine with Linux 5.11 or newer"
        )
    if version < HAND_OVER:
        return Result("ok", f"Linux {release}; handing a mount over from one server to another needs 6.9")
    return Result("ok", f"Linux {release}")


def fuse(subject: Subject) -> Iterator[Result]:
    try:
        os.close(device.open_fuse())
    except MachineError as error:
        yield Result("failed", error.what, error.hint)
        return
    mode = stat.S_IMODE(Path(device.DEVICE).stat().st_mode)
    others = (
        "" if mode & 0o006 == 0o006 else f"; other users may not (mode {mode:04o}): chmod 666 {device.DEVICE}"
    )
    yield Result("ok", f"{device.DEVICE} can be opened{others}")


def namespaces(subject: Subject) -> Iterator[Result]:
    """Whether a user without rights could; for root that is only worth a warning."""
    step, number = attempt("user")
    if step in ("", "overlay", "write through the overlay", "fuse"):
        yield Result("ok", "user and mount namespaces can be made")
        return
    error = machine.namespaces_refused(OSError(number, os.strerror(number)))
    privileged = syscalls.has_capability(syscalls.CAP_SYS_ADMIN)
    what = f"{error.what}: {error.where}" if error.where else error.what
    yield Result("warning" if privileged else "failed", what, error.hint)


def overlay(subject: Subject) -> Iterator[Result]:
    privileged = syscalls.has_capability(syscalls.CAP_SYS_ADMIN)
    step, number = attempt("root" if privileged else "user")
    reason = os.strerror(number)
    match step:
        case "":
            yield Result("ok", "an overlay can be mounted and written to, and FUSE can be mounted")
        case "overlay":
            fix = (
                "modprobe overlay (as root)"
                if privileged
                else "Linux 5.11 or newer, with the overlay module loaded"
            )
            yield Result("failed", f"overlayfs was refused: {reason}", fix)
        case "write through the overlay":
            yield Result(
                "failed", f"writing through an overlay failed: {reason}", "run as root, or use a newer kernel"
            )
        case "fuse":
            fix = "modprobe fuse (as root); in a container: docker run --device /dev/fuse --cap-add SYS_ADMIN"
            yield Result("failed", f"mounting FUSE was refused: {reason}", fix)
        case _:
            error = machine.namespaces_refused(OSError(number, reason))
            yield Result("failed", error.what, error.hint)


def attempt(mode: str) -> tuple[str, int]:
    """(step that failed or "", errno) of a trial in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "veneer.doctor.trial", mode],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_TRIAL_SECONDS,
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise MachineError(
            f"the trial ended with status {done.returncode}", where=done.stderr.decode()[-300:]
        ) from None
    return str(answer["step"]), int(answer["errno"])


def stale_mounts(subject: Subject) -> Iterator[Result]:
    with open("/proc/self/mountinfo", "rb") as file:
        mounts = [
            m for m in parse_mountinfo(file.read()) if m.fstype.decode("ascii", "replace") == _FILE_SYSTEM
        ]
    dead = others = 0
    for mount in mounts:
        place = os.fsdecode(mount.mount_point)
        try:
            os.statvfs(place)
        except OSError as error:
            # Another user's: the kernel shows it to them alone.
            if error.errno in (errno.EACCES, errno.EPERM):
                others += 1
                continue
            dead += 1
            fix = f"umount -l {place}, and an overlay on top of it first; then mount again"
            yield Result("failed", f"nobody serves the mount on {place}: {error.strerror}", fix)
    if not dead:
        own = len(mounts) - others
        told = f"{own} mounts of veneer, all served" if own else "no mounts of veneer here"
        yield Result("ok", f"{told}; {others} of other users" if others else told)
