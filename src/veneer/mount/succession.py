"""What a mount server leaves to its successor, and how many successors there may be.

Whoever keeps /dev/fuse open beside the server keeps the mount: requests wait until a successor reads them, and those that the
dead server had read and not answered come back when it asks for them (FUSE_NOTIFY_RESEND, Linux 6.9). Before that they would
be lost, and their readers would wait for ever: there a mount ends with its server.
"""

from __future__ import annotations

import json
import os
import select
from collections import deque

from .session import Session

SUCCESSORS = 25
WITHIN = 10.0
"""Seconds. More deaths than this mean that there is something that no server survives."""
_MOST = 4096


class Succession:
    """``writer``: for the servers, the pipe that takes a session (``tell``). ``fuse_fd`` stays the caller's."""

    def __init__(self, fuse_fd: int, *, successors: int = SUCCESSORS, within: float = WITHIN) -> None:
        self._fuse_fd = fuse_fd
        self._reader, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._limit = successors
        self._within = within
        self._deaths: deque[float] = deque()
        self.session: Session | None = None
        """What the next server has to go on with."""

    def close(self) -> None:
        os.close(self._reader)
        os.close(self.writer)

    def obstacle(self, now: float) -> str | None:
        """A server died at ``now`` (seconds). None: it may have a successor; otherwise why not."""
        if self.session is None:
            self.session = self._told()
        if self.session is None:
            return "the kernel had not been answered yet"
        if not self.session.can_resend:
            return "this kernel cannot hand its requests to another one (Linux 6.9 can)"
        if not is_connected(self._fuse_fd):
            return "the mount is gone"
        while self._deaths and self._deaths[0] <= now - self._within:
            self._deaths.popleft()
        self._deaths.append(now)
        if len(self._deaths) > self._limit:
            return f"more than {self._limit} died within {self._within:g} s"
        return None

    def _told(self) -> Session | None:
        try:
            words = os.read(self._reader, _MOST).splitlines()
        except BlockingIOError:
            return None
        return Session.from_json(json.loads(words[-1])) if words else None


def tell(fd: int, session: Session) -> None:
    """Of a server, before it answers INIT: a mount that is in use always has a session that is known."""
    os.write(fd, json.dumps(session.to_json()).encode() + b"\n")


def is_connected(fuse_fd: int) -> bool:
    """Whether the mount is there: not unmounted, not aborted."""
    poll = select.poll()
    poll.register(fuse_fd, select.POLLIN)
    return not any(event & select.POLLERR for _, event in poll.poll(0))
