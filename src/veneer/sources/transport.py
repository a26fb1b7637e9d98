"""What a source needs from a client of objects, and the one kind of failure that such a client reports.

Fulfilled by ``stored_objects`` (obstore: pooled and fast; http and buckets), ``plain_http`` (standard library, for what the
first cannot do), ``http_place`` (both together) and ``directory``. None of them retries: how often and when is decided in ``object_store``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

CHUNK = 1 << 20
"""Bytes per chunk of a body; the last one may be shorter."""


class Fault(Enum):
    MISSING = "the server says that there is no such object"
    PASSING = "may work when tried again"
    FATAL = "will not work when tried again"
    NO_RANGES = "the server sent the whole object when asked for a part"
    CHANGED = "the object is not the one that was begun"
    NO_LENGTH = "the server does not say how long the body is, which this client needs"


class TransferError(Exception):
    """One try failed. ``reason``: a few words without URLs or secrets. Never leaves this package."""

    def __init__(
        self, fault: Fault, reason: str, *, status: int | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(reason)
        self.fault = fault
        self.reason = reason
        self.status = status
        self.retry_after = retry_after
        """Seconds that the server asked us to wait."""


class Body(Protocol):
    """An object being read. To be closed by whoever opened it."""

    @property
    def size(self) -> int | None:
        """Size of the whole object (not of the part asked for); None when the server does not say."""
        ...

    @property
    def version(self) -> str:
        """A strong validator of the object's present content, "" without one."""
        ...

    def chunks(self, size: int) -> AsyncGenerator[bytes, None]:
        """The bytes in pieces of about ``size``. TransferError, also when the server ends too early."""
        ...

    async def close(self) -> None: ...


class Transport(Protocol):
    """Objects of one place. ``path``: as in a narinfo's URL, percent-encoded, relative to the place."""

    def fetch(self, path: str, limit: int) -> bytes:
        """A small object at once. Blocks: for worker threads. TransferError; more than ``limit`` bytes are FATAL."""
        ...

    async def open(self, path: str, start: int = 0, end: int | None = None, version: str = "") -> Body:
        """An object from ``start`` to ``end`` (exclusive; None: to its end), if it still is ``version``. TransferError."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Patience:
    """Time limits in seconds."""

    connect: float
    stall: float


_PASSING_STATUS = frozenset((408, 421, 425, 429))
BUSY_STATUS = frozenset((429, 503))


def status_error(status: int, retry_after: float | None = None) -> TransferError:
    """The failure that an HTTP status means (for statuses other than 2xx and followed redirects)."""
    if status in (403, 404, 410):
        fault = Fault.MISSING
    elif status in _PASSING_STATUS or status >= 500:
        fault = Fault.PASSING
    elif status == 412:
        fault = Fault.CHANGED
    else:
        fault = Fault.FATAL
    return TransferError(fault, f"HTTP status {status}", status=status, retry_after=retry_after)


def too_long(size: int | None, limit: int) -> TransferError:
    said = "more" if size is None else f"{size} bytes"
    return TransferError(Fault.FATAL, f"answer too long: {said}, limit {limit} bytes")
