"""Writable layers on disk: made, locked, kept by name or removed, swept after a crash.

``environments_root/NAME/{lock,users,upper,work,var}`` for a named one, ``tmp-`` and eight digits for a temporary one. Invariants:

U1: whoever uses a layer holds ``flock`` on its lock file through one open file that its processes share, so the lock is
    free exactly when all of them are gone, however they ended. The file's text is the first one's pid, for messages.
U2: a directory is made and locked, or found unlocked and taken for removal, under ``flock`` on ``environments_root``:
    nobody sweeps what another has just made.
U3: what is removed is removed by its lock's holder; a named one gets a temporary one's name first, so that what a crash
    leaves of it is swept.
U4: every command that joins an environment holds ``flock`` shared on ``NAME/users`` while a process of it is left; the
    environment's own processes hold it exclusively until others may join, and again before they end. So nobody joins
    what is not ready or about to end, and nobody mounts a layer that a joined process still sees.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from veneer.environment.spec import TEMPORARY_PREFIX, is_name
from veneer.model.errors import MachineError, UsageError, VeneerError

_LOCK = "lock"
_USERS = "users"
_REMOVAL_TRIES = 3
_MAX_DEPTH = 100


@dataclass(frozen=True, slots=True)
class Layer:
    """A locked writable layer: ``directory`` holds ``upper``, ``work`` and ``var`` (state of the programs inside). ``lock_fd``: closing its last copy unlocks.
    ``users_fd``: the exclusive lock of U4; -1 for a temporary layer, which nobody joins."""

    directory: Path
    temporary: bool
    lock_fd: int
    users_fd: int = -1

    def release(self) -> None:
        """Unlock; a temporary layer is removed first. Call when nothing runs on it any more.

        OSError when something cannot be removed: then it is left for a later ``sweep``.
        """
        try:
            if self.temporary:
                remove_tree(self.directory)
        finally:
            if self.users_fd >= 0:
                os.close(self.users_fd)
            os.close(self.lock_fd)


def take_named(root: Path, name: str) -> Layer:
    """The layer ``name``, made if new. UsageError when it is in use, MachineError when it cannot be made."""
    layer = try_named(root, name)
    if layer is None:
        directory = root / name
        raise UsageError(
            f"the environment {name} is in use by process {_holder(directory)}",
            where=str(directory),
            hint="wait for it to end, or use another name",
        )
    return layer


def try_named(root: Path, name: str) -> Layer | None:
    """The layer ``name``, made if new; None when it is in use. MachineError when it cannot be made."""
    directory = root / name
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(root):
            directory.mkdir(mode=0o700, exist_ok=True)
            layer = _take(directory)
            if layer is not None:
                _make_layers(directory)
    except OSError as error:
        raise MachineError(
            f"cannot make the environment {name}: {error.strerror}",
            where=error.filename or str(directory),
            hint="choose another directory for environments, or run without a name",
        ) from error
    return layer


def is_used(root: Path, name: str) -> bool:
    """Whether anybody holds the layer ``name``. OSError when its directory cannot be read."""
    with _locked(root):
        try:
            fd = os.open(root / name / _LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        return not _flock_now(fd, fcntl.LOCK_SH, keep=False)


def join(directory: Path) -> int:
    """A shared lock of U4: waits until the environment is ready, or has ended. OSError."""
    fd = os.open(directory / _USERS, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
    except BaseException:
        os.close(fd)
        raise
    return fd


def keep_others_out(directory: Path) -> int | None:
    """The exclusive lock of U4 as a new descriptor; None when others have joined, or it is starting or ending. OSError."""
    fd = os.open(directory / _USERS, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    return fd if _flock_now(fd, fcntl.LOCK_EX) else None


def names(root: Path) -> list[str]:
    """Of the layers that are kept, sorted. OSError when the directory cannot be read."""
    try:
        with os.scandir(root) as entries:
            return sorted(
                entry.name for entry in entries if is_name(entry.name) and entry.is_dir(follow_symlinks=False)
            )
    except FileNotFoundError:
        return []


def remove_named(layer: Layer) -> None:
    """Remove a named layer that nobody uses, and release it. OSError: what is left is swept later."""
    root = layer.directory.parent
    doomed = root / f"{TEMPORARY_PREFIX}{os.urandom(4).hex()}"
    with _locked(root):
        layer.directory.rename(doomed)
    replace(layer, directory=doomed, temporary=True).release()


def take_temporary(root: Path) -> Layer:
    """A fresh layer. OSError when the directory cannot be written to."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(root):
        directory = root / f"{TEMPORARY_PREFIX}{os.urandom(4).hex()}"
        directory.mkdir(mode=0o700)
        lock_fd = _try_lock(directory)
        if lock_fd is None:
            raise VeneerError("a fresh directory was locked by somebody else", where=str(directory))
        _make_layers(directory)
    return Layer(directory, temporary=True, lock_fd=lock_fd)


def sweep(root: Path) -> list[Path]:
    """Remove temporary layers that nobody uses, left by a crash. Returns what could not be removed."""
    stale: list[Layer] = []
    try:
        with _locked(root):
            for directory in sorted(root.glob(f"{TEMPORARY_PREFIX}*")):
                lock_fd = _try_lock(directory)
                if lock_fd is not None:
                    stale.append(Layer(directory, temporary=True, lock_fd=lock_fd))
    except FileNotFoundError:
        return []
    left: list[Path] = []
    for layer in stale:
        try:
            layer.release()
        except OSError:
            left.append(layer.directory)
    return left


def remove_tree(path: Path) -> None:
    """Remove a directory and everything below, entering also what its owner may not enter (overlay's work directory, Nix's
    read-only trees). Links are not followed. OSError with the path."""
    for attempt in range(_REMOVAL_TRIES):
        try:
            _remove_dir(None, os.fspath(path), _open_dir(None, os.fspath(path)), depth=0)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            # Something that still ends wrote there meanwhile.
            if error.errno != errno.ENOTEMPTY or attempt == _REMOVAL_TRIES - 1:
                raise


def _remove_dir(parent: int | None, name: str, top: int, depth: int) -> None:
    """Remove one directory; those nested too deep for one descriptor each are moved up to ``top`` first.

    The outermost call's own descriptor is ``top``.
    """
    fd = top if depth == 0 else _open_dir(parent, name)
    try:
        while found := _list(fd):
            for child, is_directory in found:
                if not is_directory:
                    os.unlink(child, dir_fd=fd)
                elif depth < _MAX_DEPTH:
                    _remove_dir(fd, child, top, depth + 1)
                else:
                    os.rename(child, f"deep-{os.urandom(8).hex()}", src_dir_fd=fd, dst_dir_fd=top)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)


def _open_dir(parent: int | None, name: str) -> int:
    os.chmod(name, stat.S_IRWXU, dir_fd=parent)
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)


def _list(fd: int) -> list[tuple[str, bool]]:
    with os.scandir(fd) as entries:
        return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _try_lock(directory: Path) -> int | None:
    """The descriptor that holds the lock; None when another has it, or the directory has gone."""
    try:
        fd = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        os.close(fd)
        raise
    return fd


def _take(directory: Path) -> Layer | None:
    lock_fd = _try_lock(directory)
    if lock_fd is None:
        return None
    try:
        users_fd = os.open(directory / _USERS, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        os.close(lock_fd)
        raise
    if _flock_now(users_fd, fcntl.LOCK_EX):
        return Layer(directory, temporary=False, lock_fd=lock_fd, users_fd=users_fd)
    os.close(lock_fd)
    return None


def _flock_now(fd: int, kind: int, *, keep: bool = True) -> bool:
    """Whether the lock was free; ``fd`` is closed unless it was and is to be kept."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return False
    if not keep:
        os.close(fd)
    return True


def _make_layers(directory: Path) -> None:
    for name in ("upper", "work", "var"):
        path = directory / name
        path.mkdir(exist_ok=True)
    # The merged store's own mode is that of its upper directory.
    for name in ("upper", "var"):
        (directory / name).chmod(0o755)


def _holder(directory: Path) -> str:
    try:
        return (directory / _LOCK).read_text(encoding="ascii", errors="replace").strip() or "unknown"
    except OSError:
        return "unknown"
