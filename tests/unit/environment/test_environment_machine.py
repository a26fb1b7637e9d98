"""What is said when the kernel refuses, and the messages between init and supervisor."""

from __future__ import annotations

import errno
import os
import signal
import threading

import pytest

from veneer.environment import plan as p
from veneer.environment import syscalls
from veneer.environment.apply import StepError, overlay_options
from veneer.environment.channel import Channel, failure
from veneer.environment.machine import ReadSetting, can_layers_be_at_fault, explain, namespaces_refused
from veneer.model.errors import MachineError, UsageError

OVERLAY = p.MountOverlay("/nix/store", ("/a", "/b"), "/u", "/w", True)


def error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def settings(values: dict[str, str]) -> ReadSetting:
    return lambda name: values.get(name)


def failed(step: p.Step, number: int) -> StepError:
    return StepError(step, error(number), [])


@pytest.mark.parametrize(
    ("setting", "value", "hint"),
    [
        ("kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
        ("user/max_user_namespaces", "0", "user.max_user_namespaces="),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "apparmor_restrict_unprivileged_userns=0"),
    ],
)
def test_setting_that_forbids_namespaces_is_named(setting: str, value: str, hint: str) -> None:
    refused = namespaces_refused(error(errno.EPERM), settings({setting: value}))
    assert hint in refused.hint
    assert refused.where == setting.replace("/", ".")


def test_refusal_without_a_setting_points_to_the_container() -> None:
    assert "seccomp" in namespaces_refused(error(errno.EPERM), settings({})).hint
    assert "root" in namespaces_refused(error(errno.EINVAL), settings({})).hint


@pytest.mark.parametrize(
    ("step", "number", "hint"),
    [
        (OVERLAY, errno.ENODEV, "modprobe overlay"),
        (OVERLAY, errno.EPERM, "5.11"),
        (OVERLAY, errno.EINVAL, "ext4"),
        (p.MountLower("/l"), errno.ENODEV, "modprobe fuse"),
        (p.MountMemory("/tmp"), errno.EACCES, "seccomp"),
        (p.CutPropagation(), errno.EINVAL, "mount --bind"),
        (p.MakeDir("/x"), errno.ENOSPC, ""),
    ],
)
def test_failed_step_is_explained(step: p.Step, number: int, hint: str) -> None:
    explained = explain(failed(step, number), in_user_namespace=True, read=settings({}))
    assert isinstance(explained, MachineError)
    assert hint in explained.hint


def test_only_a_refused_overlay_is_tried_with_other_layers() -> None:
    assert can_layers_be_at_fault(failed(OVERLAY, errno.EINVAL))
    assert not can_layers_be_at_fault(failed(OVERLAY, errno.ENODEV))
    assert not can_layers_be_at_fault(failed(OVERLAY, errno.ENOTCONN))
    assert not can_layers_be_at_fault(failed(p.MountLower("/l"), errno.EINVAL))


def test_overlay_options_are_what_nix_looks_for() -> None:
    assert overlay_options(OVERLAY) == "lowerdir=/a:/b,upperdir=/u,workdir=/w,userxattr"


def test_errors_and_descriptors_pass_the_channel() -> None:
    ours, theirs = Channel.pair()
    theirs.send_failure(UsageError("what", where="wh\x1bere", hint="hint"))
    reader, writer = os.pipe()
    theirs.send("started", [writer])
    os.close(writer)
    theirs.close()
    message = ours.receive()
    assert message is not None
    told = failure(message)
    assert (type(told), told.what, told.where, told.hint) == (UsageError, "what", "wh\\x1bere", "hint")
    message = ours.receive()
    assert message is not None
    os.write(message.fds[0], b"x")
    assert os.read(reader, 1) == b"x"
    assert ours.receive() is None
    ours.close()
    for fd in (reader, *message.fds):
        os.close(fd)


def test_waiting_signal_tells_its_origin() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    fd = syscalls.signalfd([signal.SIGUSR1])
    try:
        # To this thread: another one, left by another test, does not block it and would end the process.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        info = syscalls.read_signal(fd)
        assert syscalls.read_signal(fd) is None
    finally:
        os.close(fd)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert info is not None
    assert (info.number, info.sender) == (signal.SIGUSR1, os.getpid())
    assert info.code <= 0


def test_capabilities_agree_with_the_kernels_own_list() -> None:
    with open("/proc/self/status") as file:
        effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff"))
    assert syscalls.has_capability(syscalls.CAP_SYS_ADMIN) == bool(effective >> syscalls.CAP_SYS_ADMIN & 1)


def test_refused_mount_says_where() -> None:
    with pytest.raises(OSError) as caught:
        syscalls.unmount("/proc/self/no-such-mount")
    assert caught.value.filename == "/proc/self/no-such-mount"
