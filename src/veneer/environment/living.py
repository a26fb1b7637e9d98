"""Environments that live: who owns one, how to find its init again and be sure that it is still that process.

``NAME/owner.json`` is written by the environment's init as soon as others may join, and stays behind when it ends. It is
believed only after a look at the process itself: a pidfd is opened first, then start time, boot and user are compared, then
the pidfd must still be alive. A pid that was given to another process meanwhile cannot pass, nor one of another machine or
container that shares the directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from veneer.environment import upper
from veneer.environment.spec import RunSpec, check_name
from veneer.model.errors import MachineError, UsageError

OWNER = "owner.json"
OWN_NAMES = ("veneer-init", "veneer-keeper", "veneer-mount", "veneer-joined", "nix-daemon")
"""The keeper itself is outside; what it forks is called so until it has a name of its own."""
_PAUSE = 0.01
"""Between two looks, up to a deadline. No event tells that a flock is free (inotify's close comes before it), and an owner to join may appear first."""
_PATIENCE = 30.0
"""How long an environment may be held by somebody who cannot be joined: one that is ending."""


@dataclass(frozen=True, slots=True)
class Owner:
    """What a joiner has to know. ``pid``, ``start``: of init, in the host's pid namespace ``pid_namespace`` and in clock
    ticks after the boot ``boot``. ``uid``, ``gid``: the owner's. ``in_user_namespace``: it was needed to mount.
    ``since``: seconds since the epoch. ``command``: empty for one that just stays. The rest as in RunSpec."""

    pid: int
    start: int
    pid_namespace: int
    boot: str
    uid: int
    gid: int
    in_user_namespace: bool
    since: float
    command: tuple[str, ...]
    store_dir: str
    map_root: bool
    view: dict[str, Any] | None
    cache_root: str
    nix_socket: str | None
    nix_mode: Literal["overlay", "daemon", "filled"]


@dataclass(slots=True)
class Living:
    """An environment that is up. ``init_fd``: a pidfd. ``users_fd``: a shared lock that keeps it up, or -1."""

    directory: Path
    owner: Owner
    init_fd: int
    users_fd: int = -1

    @property
    def name(self) -> str:
        return self.directory.name

    def close(self) -> None:
        for fd in (self.init_fd, self.users_fd):
            if fd >= 0:
                os.close(fd)


@dataclass(frozen=True, slots=True)
class Process:
    """``pid``: on the host. ``command``: its command line, or its name in brackets."""

    pid: int
    command: str


def claim(root: Path, name: str) -> upper.Layer | Living:
    """The layer ``name`` for its first user, or the living environment to join for a later one.

    Waits while it is starting or ending. UsageError: it is another user's, or held by somebody who cannot be joined.
    MachineError: it cannot be made.
    """
    check_name(name)
    refuse_others(root / name)
    deadline = time.monotonic() + _PATIENCE
    while True:
        layer = upper.try_named(root, name)
        if layer is not None:
            return layer
        living = _join(root / name)
        if living is not None:
            return living
        if time.monotonic() > deadline:
            return upper.take_named(root, name)  # says who holds it
        time.sleep(_PAUSE)


def attach(root: Path, name: str) -> Living | None:
    """The living environment to join, None when it is not up. Waits while it is starting. UsageError as ``claim``."""
    check_name(name)
    refuse_others(root / name)
    deadline = time.monotonic() + _PATIENCE
    while root.exists() and upper.is_used(root, name):
        living = _join(root / name)
        if living is not None:
            return living
        if time.monotonic() > deadline:
            raise UsageError(f"the environment {name} does not answer: it is starting or ending")
        time.sleep(_PAUSE)
    return None


def look(directory: Path) -> Living | None:
    """The environment if it is up, without keeping it up. UsageError when it is up elsewhere."""
    owner = read_owner(directory)
    if owner is None:
        return None
    if owner.boot != boot_id():
        return None  # a lock that is held nevertheless is another machine's; whoever waits for it says so
    if owner.pid_namespace != _host_pid_namespace():
        raise UsageError(f"the environment {directory.name} belongs to another container or machine")
    try:
        init_fd = os.pidfd_open(owner.pid)
    except ProcessLookupError:
        return None
    if _is_owner(directory, owner) and not select.select([init_fd], [], [], 0)[0]:
        return Living(directory, owner, init_fd)
    os.close(init_fd)
    return None


def read_owner(directory: Path) -> Owner | None:
    """What the last owner wrote; None when nobody did, or it is of another version."""
    try:
        document = json.loads((directory / OWNER).read_bytes())
        return Owner(**{**document, "command": tuple(document["command"])})
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def members(living: Living) -> list[Process]:
    """The processes in it, without its own. Of nested pid namespaces only what was seen from here is missing."""
    namespace = _namespace(living.owner.pid)
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or namespace is None or _namespace(int(entry.name)) != namespace:
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile
            name = (entry / "comm").read_text(errors="replace").strip()
            words = (entry / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            line = b" ".join(words).decode(errors="replace") or f"[{name}]"
            if name not in OWN_NAMES:
                found.append(Process(int(entry.name), line))
    return sorted(found, key=lambda process: process.pid)


def describe(spec: RunSpec, owner: tuple[int, int], *, in_user_namespace: bool) -> dict[str, Any]:
    """What ``announce`` writes of an environment, apart from init's identity."""
    return {
        "pid_namespace": _host_pid_namespace(),
        "boot": boot_id(),
        "uid": owner[0],
        "gid": owner[1],
        "in_user_namespace": in_user_namespace,
        "since": time.time(),
        "command": list(spec.command),
        "store_dir": spec.store_dir,
        "map_root": spec.map_root,
        "view": spec.view,
        "cache_root": str(spec.cache_root),
        "nix_socket": None if spec.nix is None else str(spec.nix.socket),
        "nix_mode": "overlay" if spec.nix is None else spec.nix.mode,
    }


def identify() -> dict[str, int]:
    """This process as the host sees it: to be called while /proc is the host's. OSError without one."""
    pid = int(Path("/proc/self").readlink().name)
    return {"pid": pid, "start": _start_of(pid)}


def announce(directory: Path, document: Mapping[str, Any]) -> None:
    """Write the owner's file. OSError."""
    new = directory / f".{OWNER}"
    new.write_text(json.dumps(document))
    new.chmod(0o600)  # URLs may hold passwords
    new.replace(directory / OWNER)


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _join(directory: Path) -> Living | None:
    try:
        users_fd = upper.join(directory)
    except FileNotFoundError:
        return None  # just removed
    except OSError as error:
        raise MachineError(f"cannot join the environment: {error.strerror}", where=str(directory)) from error
    living = look(directory)
    if living is None:
        os.close(users_fd)
        return None
    living.users_fd = users_fd
    return living


def refuse_others(directory: Path) -> None:
    """UsageError unless it is ours, nobody's yet, or we are root."""
    try:
        uid = directory.stat().st_uid
    except FileNotFoundError:
        return
    except PermissionError:
        uid = -1
    if os.geteuid() not in (0, uid):
        raise UsageError(
            f"the environment {directory.name} belongs to another user",
            where=str(directory),
            hint="use a name and a directory of environments of your own: environments-dir in the configuration",
        )


def _is_owner(directory: Path, owner: Owner) -> bool:
    try:
        same = _start_of(owner.pid) == owner.start
        return same and Path(f"/proc/{owner.pid}").stat().st_uid == directory.stat().st_uid
    except (OSError, ValueError, IndexError):
        return False


def _start_of(pid: int) -> int:
    """When it was started, in clock ticks after the boot."""
    return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19])


def _namespace(pid: int) -> int | None:
    try:
        return Path(f"/proc/{pid}/ns/pid").stat().st_ino
    except OSError:
        return None


def _host_pid_namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino
