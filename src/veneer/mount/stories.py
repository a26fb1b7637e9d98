"""No errno without a story: exceptions become errno here, and nowhere else, and what happened is remembered."""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypedDict

from veneer.model.errors import VeneerError, printable

KEPT = 256
"""Last stories kept for the report; older ones are only counted."""

Events = Callable[[str, dict[str, object]], None]
"""Where events go: (name, fields). Called from any thread; must not block and must not raise."""


class Story(TypedDict):
    at: float
    """Seconds since the epoch."""
    errno: str
    where: str
    why: str


def no_events(name: str, fields: dict[str, object]) -> None:
    """Events for nobody."""


def errno_of(error: BaseException) -> int:
    """What the reader gets. Our own files' OSErrors are EIO: their ENOENT is not the reader's."""
    return error.errno if isinstance(error, VeneerError) else errno.EIO


class Stories:
    """The last failures that readers met. Threads may share it."""

    def __init__(self, events: Events = no_events) -> None:
        self._events = events
        self._lock = threading.Lock()
        self._stories: deque[Story] = deque(maxlen=KEPT)
        self.count = 0

    def tell(self, code: int, where: str, why: str) -> int:
        """Records one failure; returns ``code``, so that it can stand where the errno is needed."""
        name = errno.errorcode.get(code, str(code))
        story: Story = {"at": time.time(), "errno": name, "where": printable(where), "why": printable(why)}
        with self._lock:
            self.count += 1
            self._stories.append(story)
        self._events("failed", dict(story))
        return code

    def event(self, name: str, **fields: object) -> None:
        """Something that is no failure, for whoever listens."""
        self._events(name, fields)

    def tell_error(self, error: BaseException, where: str) -> int:
        why = error.story() if isinstance(error, VeneerError) else f"{type(error).__name__}: {error}"
        return self.tell(errno_of(error), where, why)

    def recent(self) -> list[Story]:
        with self._lock:
            return list(self._stories)
