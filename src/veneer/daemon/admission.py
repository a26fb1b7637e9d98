"""Who may connect to the daemon's sockets, who may control it, and how much of it one user can occupy.

Invariant A1: what other users do takes nothing from root and the daemon's own user: those have connections of their own
number, and no bound on what they have open. Bounds for others, each per user id: CONNECTIONS_OF_USER connections on the
request socket, OPEN_OF_USER requests being answered (CONTROLS_OF_USER of them CONTROL), HELD_OF_USER bytes of requests that have come or are announced, and
the same of answers that they do not read. All other users together have CONNECTIONS_OF_OTHERS connections, and never more than a quarter of the daemon's descriptors.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from veneer.model.errors import DaemonError, LimitError

CONNECTIONS = 4096
"""Of root and the daemon's user."""
CONNECTIONS_OF_OTHERS = 1024
CONNECTIONS_OF_USER = 256
OPEN_OF_USER = 8192
CONTROLS_OF_USER = 8
HELD_OF_USER = 64 << 20
_FILES = 1 << 16
_SO_PEERGROUPS = 59


@dataclass(frozen=True, slots=True)
class Credentials:
    """Of the process that connected, as the kernel says. ``groups``: its own and the supplementary ones."""

    pid: int
    uid: int
    groups: frozenset[int]


def credentials(sock: socket.socket) -> Credentials:
    """Who holds the other end of a unix socket."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        more = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
    except OSError:  # more than 256 groups: only the own one counts
        more = b""
    return Credentials(pid, uid, frozenset((gid, *(group for (group,) in struct.iter_unpack("i", more)))))


def allow_many_files() -> None:
    """Each connection and each open NAR costs a descriptor; the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # a service manager may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@dataclass(slots=True, eq=False)
class User:
    """What one user id has of the daemon now. ``own``: root or the daemon's user."""

    uid: int
    own: bool
    connections: int = 0
    held: int = 0
    unread: dict[object, Callable[[], int]] = field(default_factory=dict)
    """By connection: the bytes of answers that its client has not taken."""
    controls: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(CONTROLS_OF_USER))
    """For CONTROL: one such request may concern many paths, and all users share one event loop."""
    room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(OPEN_OF_USER))

    def hold(self, size: int) -> None:
        """``size`` bytes of a request are announced. LimitError: too many are, already."""
        if not self.own and self.held + size > HELD_OF_USER:
            raise LimitError(
                f"user {self.uid} has requests of {self.held} bytes under way; {size} more are too many",
                where="request protocol",
                hint="wait for answers before asking more",
            )
        self.held += size

    def let_go(self, size: int) -> None:
        self.held -= size

    def reads_too_little(self) -> bool:
        """Whether the user's clients leave too many answers lying."""
        return not self.own and sum(size() for size in self.unread.values()) > HELD_OF_USER


class Admission:
    """The users who are connected. Event loop only."""

    def __init__(self, group: int | None = None) -> None:
        """``group``: its members may control, besides root and the daemon's user."""
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        files = _FILES if files == resource.RLIM_INFINITY else files
        self._own = min(CONNECTIONS, files // 2)
        self._others = min(CONNECTIONS_OF_OTHERS, files // 4)
        self._group = group
        self._users: dict[int, User] = {}

    def may_control(self, who: Credentials) -> bool:
        return _is_own(who.uid) or (self._group is not None and self._group in who.groups)

    def enter(self, uid: int) -> User:
        """One connection more. DaemonError: too many are there."""
        user = self._users.get(uid) or User(uid, _is_own(uid))
        others = sum(each.connections for each in self._users.values() if not each.own)
        own = sum(each.connections for each in self._users.values() if each.own)
        if user.own:
            full = own >= self._own
        else:
            full = user.connections >= CONNECTIONS_OF_USER or others >= self._others
        if full:
            raise DaemonError(
                f"the daemon has no room for another connection of user {uid}, who has {user.connections}",
                hint="end some of that user's runs and mounts",
            )
        self._users[uid] = user
        user.connections += 1
        return user

    def leave(self, user: User) -> None:
        user.connections -= 1
        if not user.connections:
            self._users.pop(user.uid, None)


def _is_own(uid: int) -> bool:
    return uid in (0, os.geteuid())
