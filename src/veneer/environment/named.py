"""Named environments from outside: listed, compared with what lies below them, ended and removed."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from veneer.environment import living, upper
from veneer.environment.living import Owner, Process
from veneer.environment.spec import check_name
from veneer.model.errors import MachineError, UsageError, VeneerError

State = Literal["in use", "up", "starting", "idle"]
Change = Literal["new", "changed", "removed"]

_END_SECONDS = 10.0
_PAUSE = 0.01
"""Between two looks, up to a deadline. No event tells that a flock is free (inotify's close comes before it), and an environment that was starting may come up first."""
_SHOWN = 10
_ORIGINS = ("trusted.overlay.origin", "user.overlay.origin")
"""On what the overlay copied up from below."""
_WHITEOUTS = ("trusted.overlay.whiteout", "user.overlay.whiteout")


@dataclass(frozen=True, slots=True)
class Summary:
    """``state``: "up" has no process but its own. ``paths``, ``size``: top-level names in its upper layer, and bytes of
    all files in it. ``owner``: the last one, None when there never was one that said so."""

    name: str
    state: State
    processes: tuple[Process, ...]
    paths: int
    size: int
    owner: Owner | None


@dataclass(frozen=True, slots=True)
class Difference:
    """A top-level name of the upper layer. ``size``: bytes of the files in it."""

    name: str
    change: Change
    type: Literal["directory", "regular", "symlink", "other"]
    size: int


def summaries(root: Path) -> list[Summary]:
    """All named environments, by name. UsageError when their directory is not ours to read."""
    try:
        return [_summary(root, name) for name in upper.names(root)]
    except OSError as error:
        raise _unreadable(error, root) from error


def diff(root: Path, name: str) -> list[Difference]:
    """What is only in the upper layer, was copied up to it, or is hidden by it; by name. UsageError: no such environment."""
    directory = _existing(root, name)
    try:
        return list(_differences(directory / "upper"))
    except OSError as error:
        raise _unreadable(error, directory) from error


def end(root: Path, name: str, *, keep: bool, kill: bool) -> tuple[bool, bool]:
    """End the environment and, unless ``keep``, remove what was written to it. Whether it was up, whether it was removed.

    UsageError: no such environment, another user's, or processes use it (not with ``kill``).
    """
    directory = _existing(root, name)
    ended: Owner | None = None
    deadline = time.monotonic() + _END_SECONDS
    while (layer := upper.try_named(root, name)) is None:
        ended = end_once(directory, ended, kill=kill) or ended
        if time.monotonic() > deadline:
            layer = upper.take_named(root, name)  # or says who holds it
            break
        time.sleep(_PAUSE)
    if keep:
        layer.release()
        return ended is not None, False
    try:
        upper.remove_named(layer)
    except OSError as error:
        raise VeneerError(
            f"not all of the environment could be removed: {error.strerror}", where=error.filename or name
        ) from error
    return ended is not None, True


def end_once(directory: Path, ended: Owner | None, *, kill: bool) -> Owner | None:
    """Kill init, when the environment is up and nobody is in the way. With it the kernel ends all of the environment.

    Whose environment was killed; ``ended``: the one before, whose processes are still dying.
    """
    found = living.look(directory)
    if found is None:
        return None  # starting, or ending already
    if found.owner == ended:
        found.close()
        return ended
    users_fd = None
    try:
        # From here on nobody joins, and a process that we do not see cannot come from outside.
        users_fd = None if kill else upper.keep_others_out(directory)
        processes = living.members(found)
        if not kill and (processes or users_fd is None):
            raise _in_use(directory.name, processes)
        signal.pidfd_send_signal(found.init_fd, signal.SIGKILL)
    except (ProcessLookupError, FileNotFoundError):
        pass  # it ended meanwhile
    except PermissionError as error:
        raise MachineError("the environment may not be ended", where=str(directory)) from error
    finally:
        found.close()
        if users_fd is not None:
            os.close(users_fd)
    return found.owner


def _in_use(name: str, processes: list[Process]) -> UsageError:
    shown = "; ".join(f"{process.pid} {process.command[:100]}" for process in processes[:_SHOWN])
    more = f"; and {len(processes) - _SHOWN} more" if len(processes) > _SHOWN else ""
    return UsageError(
        f"the environment {name} is in use by {shown or 'a command that starts or ends'}{more}",
        hint=f"end them, or: veneer down --kill {name}",
    )


def _existing(root: Path, name: str) -> Path:
    check_name(name)
    living.refuse_others(root / name)
    if not (root / name).is_dir():
        raise UsageError(f"there is no environment {name}", where=str(root), hint="veneer ls lists them")
    return root / name


def _unreadable(error: OSError, place: Path) -> UsageError:
    return UsageError(f"cannot read the environments: {error.strerror}", where=error.filename or str(place))


def _summary(root: Path, name: str) -> Summary:
    directory = root / name
    state: State = "idle"
    processes: list[Process] = []
    if upper.is_used(root, name):
        found = living.look(directory)
        state = "starting"
        if found is not None:
            processes = living.members(found)
            state = "in use" if processes else "up"
            found.close()
    top = directory / "upper"
    paths = sum(1 for _ in _names(top)) if top.is_dir() else 0
    owner = living.read_owner(directory)
    return Summary(name, state, tuple(processes), paths, size_of(top), owner)


def _names(top: Path) -> Iterator[os.DirEntry[str]]:
    """Without what Nix keeps beside the paths: locks, links of optimised files."""
    with os.scandir(top) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and not entry.name.endswith(".lock"):
                yield entry


def _differences(top: Path) -> Iterator[Difference]:
    for entry in sorted(_names(top), key=lambda entry: entry.name):
        found = entry.stat(follow_symlinks=False)
        if is_whiteout(entry.path, found):
            yield Difference(entry.name, "removed", "other", 0)
            continue
        change: Change = "changed" if _has_mark(entry.path, _ORIGINS) else "new"
        yield Difference(entry.name, change, _type(found.st_mode), size_of(Path(entry.path)))


def is_whiteout(path: str, found: os.stat_result) -> bool:
    """Whether the overlay hides what lies below under this name."""
    if stat.S_ISCHR(found.st_mode):
        return found.st_rdev == 0
    return stat.S_ISREG(found.st_mode) and not found.st_size and _has_mark(path, _WHITEOUTS)


def _has_mark(path: str, names: tuple[str, ...]) -> bool:
    try:
        return not set(names).isdisjoint(os.listxattr(path, follow_symlinks=False))
    except OSError:
        return False


def _type(mode: int) -> Literal["directory", "regular", "symlink", "other"]:
    if stat.S_ISDIR(mode):
        return "directory"
    if stat.S_ISREG(mode):
        return "regular"
    return "symlink" if stat.S_ISLNK(mode) else "other"


def size_of(path: Path) -> int:
    """Bytes of all regular files at or below ``path``, each once; directories that may not be read count nothing."""
    seen: set[tuple[int, int]] = set()
    total = 0
    waiting = [path]
    while waiting:
        place = waiting.pop()
        try:
            found = place.lstat()
            if stat.S_ISDIR(found.st_mode):
                waiting.extend(place.iterdir())
        except OSError:
            continue
        key = (found.st_dev, found.st_ino)
        if stat.S_ISREG(found.st_mode) and key not in seen:
            seen.add(key)
            total += found.st_size
    return total
