"""Carries a plan's steps out, and back when one fails.

Runs in a mount namespace of its own, as the process that will be the environment's init. What a step did is undone by the
function that it pushed; ``Detach`` lets go of the old root, so after it nothing can be undone (the kernel removes the whole
namespace with its last process anyhow).

Invariants. A1: only paths given in the plan are touched. A2: a failed step has left nothing of itself.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import assert_never

from veneer.environment import plan as p
from veneer.environment import syscalls as sys_

_QUIET = sys_.MS_NOSUID | sys_.MS_NODEV
_MEMORY_OPTIONS = "mode=755"
_REFUSED = (errno.EPERM, errno.EACCES, errno.EINVAL, errno.EBUSY)


class StepError(Exception):
    """A step that failed. ``error``: the kernel's answer. ``rest``: the steps after it, none of which ran."""

    def __init__(self, step: p.Step, error: OSError, rest: Sequence[p.Step]) -> None:
        super().__init__(f"{step}: {error}")
        self.step = step
        self.error = error
        self.rest = rest


@dataclass(slots=True)
class Executor:
    """``fuse_fd``: /dev/fuse, opened in this user namespace. ``serve``: called as soon as our file system is mounted; a
    mount server has to answer from then on. ``warn``: takes a sentence."""

    fuse_fd: int
    serve: Callable[[], None]
    warn: Callable[[str], None]
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def apply(self, steps: Sequence[p.Step]) -> None:
        """All steps, in order. StepError leaves those before it in place: go on with others, or ``roll_back``."""
        for number, step in enumerate(steps):
            try:
                self._do(step)
            except OSError as error:
                raise StepError(step, error, steps[number + 1 :]) from error

    def roll_back(self) -> None:
        """Undo everything back to the start, or to the last ``Detach``. The first OSError ends it."""
        while self._undo:
            self._undo.pop()()

    def _do(self, step: p.Step) -> None:
        match step:
            case p.CutPropagation():
                sys_.mount("none", "/", "", sys_.MS_REC | sys_.MS_SLAVE)
            case p.MountMemory(target):
                self._mount("tmpfs", target, "tmpfs", _QUIET, _MEMORY_OPTIONS)
            case p.MakeDir(path):
                self._make_dir(path)
            case p.MakeFile(path):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o444))
                self._undo.append(Path(path).unlink)
            case p.MakeScript(path, text):
                Path(path).write_text(text, "utf-8")
                self._undo.append(Path(path).unlink)
                Path(path).chmod(0o555)
            case p.MakeFifo(path):
                os.mkfifo(path, 0o600)
                self._undo.append(Path(path).unlink)
            case p.MakeLink(path, target):
                Path(path).symlink_to(target)
                self._undo.append(Path(path).unlink)
            case p.EnterRoot(new, old):
                self._enter_root(new, old)
            case p.Bind(source, target, optional):
                self._bind(source, target, optional)
            case p.MountProc(target, fallback):
                self._mount_proc(target, fallback)
            case p.MountLower(target):
                self._mount("veneer", target, "fuse.veneer", _QUIET | sys_.MS_RDONLY, self._fuse_options())
                self.serve()
            case p.MountOverlay():
                self._mount("overlay", step.target, "overlay", _QUIET, overlay_options(step))
            case p.Detach(target):
                sys_.unmount(target, sys_.MNT_DETACH)
                Path(target).rmdir()
                self._undo.clear()
            case p.MakeReadOnly(target):
                flags = sys_.MS_REMOUNT | sys_.MS_BIND | sys_.MS_RDONLY | _QUIET
                sys_.mount("none", target, "", flags)
            case _:
                assert_never(step)

    def _mount(self, source: str, target: str, fstype: str, flags: int, data: str = "") -> None:
        sys_.mount(source, target, fstype, flags, data)
        self._undo.append(lambda: sys_.unmount(target, sys_.MNT_DETACH))

    def _make_dir(self, path: str) -> None:
        try:
            Path(path).mkdir(0o755)
        except FileExistsError:
            return
        Path(path).chmod(0o755)  # whatever the umask
        self._undo.append(Path(path).rmdir)

    def _bind(self, source: str, target: str, optional: bool) -> None:
        try:
            self._mount(source, target, "", sys_.MS_BIND | sys_.MS_REC)
        except OSError as error:
            if not optional:
                raise
            self.warn(f"{target} of the host is not visible inside: {error.strerror}")

    def _mount_proc(self, target: str, fallback: str) -> None:
        try:
            self._mount("proc", target, "proc", _QUIET | sys_.MS_NOEXEC)
        except OSError as error:
            # A container that hides parts of /proc may not mount it anew: the kernel would reveal them.
            if error.errno not in _REFUSED:
                raise
            self._mount(fallback, target, "", sys_.MS_BIND | sys_.MS_REC)

    def _enter_root(self, new: str, old: str) -> None:
        try:
            sys_.pivot_root(new, new + old)
        except OSError as error:
            # The root is a boot-time ramdisk or a plain directory (chroot): neither can be moved away.
            if error.errno != errno.EINVAL:
                raise
            self._enter_by_chroot(new, old)
        else:
            self._undo.append(lambda: sys_.pivot_root(old, old + new))
        os.chdir("/")

    def _enter_by_chroot(self, new: str, old: str) -> None:
        sys_.mount("none", new, "", sys_.MS_UNBINDABLE)  # or the copy of / would hold itself
        self._mount("/", new + old, "", sys_.MS_BIND | sys_.MS_REC)
        outside = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

        def leave() -> None:
            os.fchdir(outside)
            os.chroot(".")
            os.close(outside)

        os.chroot(new)
        self._undo.append(leave)

    def _fuse_options(self) -> str:
        owner = f"user_id={os.geteuid()},group_id={os.getegid()}"
        return f"fd={self.fuse_fd},rootmode=40000,{owner},default_permissions,allow_other"


def overlay_options(step: p.MountOverlay) -> str:
    """The overlay's mount data. The paths were made by the plan: they hold no comma, colon or backslash."""
    layers = f"lowerdir={':'.join(step.lowers)},upperdir={step.upper},workdir={step.work}"
    return f"{layers},userxattr" if step.restricted else layers
