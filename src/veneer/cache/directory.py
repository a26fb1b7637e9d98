"""The cache directory: its layout, whose it is, who may write to it, and what a failing file system means.

    CACHEDIR.TAG     tells backup programs to leave it out
    lock             flock of the one daemon that writes; holds its process id
    starting         flock of the one daemon that starts: until it listens, or has given up
    index.sqlite     all rows; beside it -wal and -shm, and index.sqlite.damaged once SQLite found it broken
    trees/ nars/     published files, in 256 directories by the last two digits of the path number
    incoming/        files being written
    quarantine/      the last few NARs that turned out not to be the signed ones, for a look

Modes: 0700, or 0755 where other users' mount servers may read (``shared``); incoming and quarantine always 0700, the
index 0600. Only the owner of the directory may be its daemon: what it holds is believed without further checks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

from veneer.model.errors import CacheError, CacheFullError, CacheInUseError

PUBLISHED = ("trees", "nars")
PRIVATE = ("incoming", "quarantine")
INDEX = "index.sqlite"
LOCK = "lock"
STARTING = "starting"
_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# This directory was made by Veneer and can be made again.\n"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_WAIT = """
import fcntl, signal, sys
signal.signal(signal.SIGALRM, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))
fcntl.flock(0, fcntl.LOCK_EX)
"""


def cache_error(error: OSError, where: str | Path, doing: str) -> CacheError:
    """``error`` as one that says what to do. ``doing``: "write to", "open", … the cache."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    what = f"cannot {doing} the cache: {reason}"
    if error.errno in _FULL:
        return CacheFullError(
            what, where=str(where), hint="make room, or lower the cache's limit: veneer gc --max-size"
        )
    if error.errno == errno.EROFS:
        hint = "the file system is read-only; choose another cache directory"
    elif error.errno in (errno.EACCES, errno.EPERM):
        hint = "the cache directory must belong to the daemon's user and be writable"
    elif error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
        hint = "locks do not work here (NFS?); choose a cache directory on a local disk"
    elif error.errno == errno.ENOENT:
        hint = "was the cache directory deleted? restart the daemon"
    else:
        hint = ""
    return CacheError(what, where=str(where), hint=hint)


def prepare(root: Path, *, shared: bool) -> None:
    """Makes what is missing of the layout. CacheError when it cannot be made or belongs to somebody else."""
    mode = 0o755 if shared else 0o700
    try:
        root.mkdir(parents=True, exist_ok=True)
        status = root.stat()
        if status.st_uid != os.geteuid():
            raise CacheError(
                f"the cache directory belongs to another user (uid {status.st_uid}, we are {os.geteuid()})",
                where=str(root),
                hint="choose another cache directory, or connect to that user's daemon",
            )
        _set_mode(root, status.st_mode, mode)
        for name in PUBLISHED:
            _make(root / name, mode)
        for name in PRIVATE:
            _make(root / name, 0o700)
        tag = root / "CACHEDIR.TAG"
        if not tag.exists():
            tag.write_text(_TAG)
    except OSError as error:
        raise cache_error(error, error.filename or root, "set up") from error


def make_parent(file: Path) -> None:
    """Makes the directory of a published file (``trees/xx``, ``nars/xx``), with the mode of the one above it."""
    above = file.parent.parent
    _make(file.parent, above.stat().st_mode & 0o777)


def rename_published(temporary: Path, final: Path) -> None:
    """Gives a finished file its name below ``trees/xx`` or ``nars/xx``, making that directory if need be. OSError."""
    try:
        temporary.rename(final)
    except FileNotFoundError:
        make_parent(final)
        temporary.rename(final)


def _make(directory: Path, mode: int) -> None:
    directory.mkdir(exist_ok=True)
    _set_mode(directory, directory.lstat().st_mode, mode)


def _set_mode(path: Path, present: int, wanted: int) -> None:
    if present & 0o7777 != wanted:
        path.chmod(wanted)


def lock(root: Path, name: str = LOCK, *, seconds: float = 0) -> int:
    """A descriptor that holds the cache until closed (or until the process ends).

    ``seconds``: how long to wait for another to let go of it; CacheInUseError when it does not. CacheError: no lock here.
    """
    path = root / name
    deadline = time.monotonic() + seconds
    try:
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                _flock(fd, deadline - time.monotonic())
                held = os.fstat(fd)
                # The file may have been deleted and made anew between open and flock: then two could hold "the" lock.
                if path.exists() and os.path.samestat(held, path.stat()):
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                    return fd
            except BlockingIOError:
                raise _taken(root, fd) from None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
    except OSError as error:
        raise cache_error(error, path, "lock") from error


def wait_until_free(root: Path, seconds: float) -> bool:
    """Waits until no daemon holds the cache; False when one still does after ``seconds``."""
    try:
        fd = os.open(root / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        _flock(fd, seconds)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _flock(fd: int, seconds: float) -> None:
    """Locks the open file. BlockingIOError: another holds it, still after ``seconds``.

    A child waits in our place: flock has no time limit, and a lock belongs to the open file, which we share. Its own
    timer ends it, so it outlives neither the limit nor its use, whatever signals we have blocked.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if seconds <= 0:
            raise
        child = [sys.executable, "-I", "-S", "-c", _WAIT, str(seconds)]
        if subprocess.run(child, stdin=fd, check=False).returncode:
            raise


def _taken(root: Path, fd: int) -> CacheInUseError:
    text = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
    holder = f"another daemon (pid {text})" if text.isdigit() else "another daemon"
    os.close(fd)
    return CacheInUseError(
        f"{holder} owns this cache",
        where=str(root),
        hint="use that daemon, stop it, or choose another cache directory",
    )
