"""What a machine lacks, in words: the kernel's refusals turned into what to enable."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from veneer.environment import namespace, syscalls
from veneer.environment import plan as p
from veneer.environment.apply import StepError
from veneer.model.errors import MachineError
from veneer.mount import device

ReadSetting = Callable[[str], str | None]

_NAMESPACE_SETTINGS = (
    ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=15000"),
    ("user/max_pid_namespaces", "0", "sysctl -w user.max_pid_namespaces=15000"),
    ("user/max_mnt_namespaces", "0", "sysctl -w user.max_mnt_namespaces=15000"),
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
    ),
)
_CONTAINER = (
    "in a container, allow it (docker run --security-opt seccomp=unconfined, or --privileged); or run as root"
)
_OUR_FAULT = 125


def read_setting(name: str) -> str | None:
    """The value of a sysctl, ``kernel/…``; None when this kernel does not have it."""
    try:
        with open(f"/proc/sys/{name}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return None


def namespaces_refused(error: OSError, read: ReadSetting = read_setting) -> MachineError:
    """unshare(2) or the first mount in a new user namespace was refused."""
    for name, refusing, fix in _NAMESPACE_SETTINGS:
        if read(name) == refusing:
            return MachineError(
                "user namespaces are off for this user", where=name.replace("/", "."), hint=fix
            )
    if error.errno == errno.EINVAL:
        return MachineError("this kernel has no user namespaces", hint="run as root")
    if error.errno == errno.ENOSPC:
        hint = "raise user.max_user_namespaces, or nest fewer"
        return MachineError("no more namespaces may be made", hint=hint)
    return MachineError(f"a new namespace was refused: {error.strerror}", hint=_CONTAINER)


def explain(failure: StepError, *, in_user_namespace: bool, read: ReadSetting = read_setting) -> MachineError:
    """A failed step, as the user should read it."""
    step, error = failure.step, failure.error
    missing = error.errno == errno.ENODEV
    match step:
        case p.MountOverlay() if missing:
            return MachineError(
                "the kernel has no overlayfs", where=step.target, hint="modprobe overlay (as root)"
            )
        case p.MountLower() if missing:
            return MachineError("the kernel has no FUSE", where=step.target, hint="modprobe fuse (as root)")
        case p.MountOverlay() if error.errno in (errno.EPERM, errno.EACCES) and in_user_namespace:
            hint = "mounting overlayfs without root needs Linux 5.11"
            return MachineError(f"overlayfs was refused: {error.strerror}", where=step.target, hint=hint)
        case p.MountOverlay():
            return MachineError(
                f"overlayfs was refused: {error.strerror}",
                where=step.target,
                hint="the directory of environments must be on a file system like ext4, xfs, btrfs or tmpfs, "
                "not on another overlay; choose one: environments-dir in the configuration",
            )
        case p.CutPropagation() if error.errno == errno.EINVAL:
            # What is mounted in here could appear outside, and cannot be kept from it.
            hint = "mount --bind DIR DIR before chroot DIR, or use a container"
            return MachineError(
                "the root directory is not a mount point, as in a plain chroot", where="/", hint=hint
            )
        case p.CutPropagation() | p.MountMemory() if error.errno in (errno.EPERM, errno.EACCES):
            return namespaces_refused(error, read)
        case _:
            return MachineError(f"cannot set the environment up: {error.strerror}", where=str(step))


def can_layers_be_at_fault(failure: StepError) -> bool:
    """Whether other directories for upper and work could help."""
    return isinstance(failure.step, p.MountOverlay) and failure.error.errno in (
        errno.EINVAL,
        errno.EOPNOTSUPP,
        errno.EROFS,
        errno.ELOOP,
        errno.EBUSY,
        errno.EPERM,
        errno.EACCES,
    )


def probe() -> None:
    """MachineError with what to enable, when an environment cannot be made here. Changes nothing; takes milliseconds."""
    os.close(device.open_fuse())
    alone = syscalls.has_capability(syscalls.CAP_SYS_ADMIN)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        os.close(reader)
        _try_in_child(writer, with_user=not alone)
    os.close(writer)
    with open(reader, "rb") as answers:
        answer = answers.read().decode()
    os.waitpid(child, 0)
    if answer:
        what, number = answer.split()
        error = OSError(int(number), os.strerror(int(number)))
        if what == "namespaces":
            raise namespaces_refused(error)
        raise MachineError("the kernel has no overlayfs", hint="modprobe overlay (as root)")


def _try_in_child(writer: int, *, with_user: bool) -> None:
    """Make the namespaces, then ask for an overlay of nothing: EINVAL from a kernel that has it, ENODEV from others."""
    status = _OUR_FAULT
    try:
        namespace.enter(os.geteuid(), os.getegid(), with_user=with_user)
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_SLAVE)
        try:
            syscalls.mount("overlay", "/", "overlay", 0, "")
        except OSError as error:
            if error.errno == errno.ENODEV:
                os.write(writer, f"overlay {error.errno}".encode())
        status = 0
    except OSError as error:
        os.write(writer, f"namespaces {error.errno}".encode())
    finally:
        os._exit(status)
