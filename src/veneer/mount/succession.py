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
from collections.abc import Mapping

from veneer.formats import request_wire, tree_index
from veneer.model.errors import FormatError

from .session import Session

SUCCESSORS = 25
WITHIN = 10.0
"""Seconds. More deaths than this mean that there is something that no server survives."""
_MOST = 4096

FORMATS = {"session": 1, "tree": tree_index.VERSION, "request": request_wire.VERSION}
"""What a server and a successor of another version of the program must have in common."""
READY = b"ready"
"""A server of another version says this when it could serve, and waits to be told."""


class Succession:
    """``writer``: for the servers, the pipe that takes a session (``tell``). ``fuse_fd`` stays the caller's."""

    def __init__(
        self,
        fuse_fd: int,
        *,
        successors: int = SUCCESSORS,
        within: float = WITHIN,
        inherited: tuple[int, int, Session] | None = None,
    ) -> None:
        """``inherited``: reader, writer and session of another process's, to go on with."""
        self._fuse_fd = fuse_fd
        if inherited is None:
            self.reader, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        else:
            self.reader, self.writer, _ = inherited
        self._limit = successors
        self._within = within
        self._deaths: deque[float] = deque()
        self.session: Session | None = None if inherited is None else inherited[2]
        """What the next server has to go on with."""

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)

    def obstacle(self, now: float) -> str | None:
        """A server died at ``now`` (seconds). None: it may have a successor; otherwise why not."""
        obstacle = self.hindrance()
        if obstacle is not None:
            return obstacle
        while self._deaths and self._deaths[0] <= now - self._within:
            self._deaths.popleft()
        self._deaths.append(now)
        if len(self._deaths) > self._limit:
            return f"more than {self._limit} died within {self._within:g} s"
        return None

    def hindrance(self) -> str | None:
        """Why no server could follow now, whatever became of this one."""
        if self.session is None:
            self.session = self._told()
        if self.session is None:
            return "the kernel had not been answered yet"
        if not self.session.can_resend:
            return "this kernel cannot hand its requests to another one (Linux 6.9 can)"
        if not is_connected(self._fuse_fd):
            return "the mount is gone"
        return None

    def _told(self) -> Session | None:
        try:
            words = os.read(self.reader, _MOST).splitlines()
        except BlockingIOError:
            return None
        return Session.from_json(json.loads(words[-1])) if words else None


def check_formats(theirs: Mapping[str, object], ours: Mapping[str, int] = FORMATS) -> None:
    """FormatError unless they are the same."""
    for name, version in ours.items():
        if theirs.get(name) != version:
            raise FormatError(
                f"the running one has version {theirs.get(name)} of the {name} format, this program {version}",
                hint="end it and start it anew to use this program",
            )


def tell(fd: int, session: Session) -> None:
    """Of a server, before it answers INIT: a mount that is in use always has a session that is known."""
    os.write(fd, json.dumps(session.to_json()).encode() + b"\n")


def is_connected(fuse_fd: int) -> bool:
    """Whether the mount is there: not unmounted, not aborted."""
    poll = select.poll()
    poll.register(fuse_fd, select.POLLIN)
    return not any(event & select.POLLERR for _, event in poll.poll(0))
