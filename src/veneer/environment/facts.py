"""What the plan needs to know about the machine: read once, before the first process is started."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from veneer.environment import syscalls
from veneer.model.errors import MachineError

PRIVATE = ".veneer"
"""Our own directory in the new root: mount points and the layers of the overlay."""
_STAGING = ("tmp", "run", "mnt", "var", "usr", "etc")
_WHOLE_UID_MAP = "0 0 4294967295"

BUILD_GROUP = "nixbld"

Kind = Literal["directory", "link", "file"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a directory of the host. ``target``: where a link points to. Devices and sockets count as files."""

    name: str
    kind: Kind
    target: str = ""


@dataclass(frozen=True, slots=True)
class NixFacts:
    """``host_store``: the overlay has the host's store as a second lower layer. ``unprivileged``: a user namespace is needed.
    ``has_build_group``: the users exist as which Nix builds when root asks."""

    host_store: bool
    unprivileged: bool
    has_build_group: bool


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The host as the plan sees it.

    ``root``: what is in ``/``. ``staging``: a real directory in ``/`` on which the new root is mounted for a moment.
    ``store``: the host's own store with links resolved, None when it has none. ``store_in_place``: it is reached without
    links, so the overlay can go on top of it. ``store_parent``: the directory above the store with links resolved, None
    when the host has none; ``store_siblings``: what is in it, looked at only when the store is not in place.
    ``nearest``: the deepest ancestor of the store directory that exists.
    ``environment``: the directory that holds ``upper`` and ``work``, links resolved; None: keep them in memory.
    ``needs_user_namespace``: we have no right to mount. ``restricted_overlay``: the overlay belongs to a user namespace
    that is not the machine's first, so it must keep its marks in user.* attributes. ``has_build_group``: the users exist
    as which Nix builds when root asks.
    """

    root: tuple[Entry, ...]
    staging: str
    store: str | None
    store_in_place: bool
    store_parent: str | None
    store_siblings: tuple[Entry, ...]
    nearest: str
    environment: str | None
    needs_user_namespace: bool
    restricted_overlay: bool
    has_build_group: bool

    @property
    def for_nix(self) -> NixFacts:
        return NixFacts(self.store is not None, self.needs_user_namespace, self.has_build_group)


def read_facts(store_dir: str, environment: str | None) -> HostFacts:
    """MachineError when ``/`` cannot be listed or has no directory to stage the new root on."""
    try:
        root = tuple(_entries("/"))
    except OSError as error:
        raise MachineError(f"cannot list the root directory: {error.strerror}", where="/") from error
    directories = {entry.name for entry in root if entry.kind == "directory"}
    staging = next((name for name in _STAGING if name in directories), None)
    if staging is None:
        raise MachineError("no directory to build the new root on", where="/", hint="mkdir /tmp")
    store = os.path.realpath(store_dir)
    parent = os.path.realpath(Path(store_dir).parent)
    has_store, has_parent = Path(store).is_dir(), Path(parent).is_dir()
    in_place = has_store and store == store_dir
    needs_user_namespace = not syscalls.has_capability(syscalls.CAP_SYS_ADMIN)
    return HostFacts(
        root=root,
        staging=f"/{staging}",
        store=store if has_store else None,
        store_in_place=in_place,
        store_parent=parent if has_parent else None,
        store_siblings=() if in_place or not has_parent else tuple(_entries(parent)),
        nearest=_nearest(store_dir),
        environment=None if environment is None else os.path.realpath(environment),
        needs_user_namespace=needs_user_namespace,
        restricted_overlay=needs_user_namespace or not in_first_user_namespace(),
        has_build_group=has_group(BUILD_GROUP),
    )


def has_group(name: str) -> bool:
    """Whether /etc/group has it; the name services of the machine are not asked, because that may take seconds."""
    try:
        with open("/etc/group", "rb") as file:
            return any(line.startswith(name.encode() + b":") for line in file)
    except OSError:
        return False


def in_first_user_namespace() -> bool:
    """Whether this process belongs to the machine's first user namespace (as far as its uid map can tell)."""
    try:
        with open("/proc/self/uid_map", encoding="ascii") as file:
            return " ".join(file.read().split()) == _WHOLE_UID_MAP
    except OSError as error:
        if error.errno == errno.ENOENT:  # a kernel without user namespaces, or no /proc
            return True
        raise


def _nearest(path: str) -> str:
    candidate = Path(path)
    while not candidate.is_dir():
        candidate = candidate.parent
    return str(candidate)


def _entries(path: str) -> Iterator[Entry]:
    """Sorted. Types come from the directory itself, so that a dead network mount is not touched."""
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_symlink():
                yield Entry(entry.name, "link", str(Path(entry.path).readlink()))
            else:
                yield Entry(entry.name, "directory" if entry.is_dir(follow_symlinks=False) else "file")
