"""A bounded pipe of byte chunks from the event loop to one worker thread.

A NAR arrives on the loop and is decoded, hashed and written on a thread, so that neither waits for more than the other's
pace: at most ``limit`` bytes (plus one chunk) are held. Either side may end it with an error that the other then raises.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque

from veneer.model.errors import SourceError

PIPE_BYTES = 2 << 20


class ChunkPipe:
    """One producer coroutine (``put``, ``end``, ``fail``) and one reader thread (``read``, ``abandon``)."""

    def __init__(self, limit: int = PIPE_BYTES) -> None:
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Event()
        self._room.set()
        self._limit = limit
        self._held = 0
        self._chunks: deque[bytes] = deque()
        self._ended = False
        self._error: BaseException | None = None
        self._abandoned = False
        self._changed = threading.Condition()
        self._rest = memoryview(b"")

    async def put(self, chunk: bytes) -> bool:
        """Hand over a chunk when there is room. False: the reader is gone, stop."""
        await self._room.wait()
        with self._changed:
            if self._abandoned:
                return False
            self._chunks.append(chunk)
            self._held += len(chunk)
            if self._held >= self._limit:
                self._room.clear()
            self._changed.notify()
        return True

    def end(self) -> None:
        """All chunks were put."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def fail(self, error: BaseException) -> None:
        """The reader's next ``read`` raises ``error``."""
        with self._changed:
            self._error = error
            self._changed.notify()

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes (any number, when negative: one chunk); b"" at the end. Blocks; reader thread only."""
        rest = self._rest
        if not rest:
            rest = memoryview(self._next())
        if size < 0 or size >= len(rest):
            self._rest = memoryview(b"")
            return bytes(rest)
        self._rest = rest[size:]
        return bytes(rest[:size])

    def abandon(self) -> None:
        """The reader wants no more; a waiting producer is let go."""
        with self._changed:
            self._abandoned = True
            self._chunks.clear()
            self._held = 0
        self._wake()

    def _next(self) -> bytes:
        with self._changed:
            while not self._chunks:
                if self._error is not None:
                    if isinstance(self._error, Exception):
                        raise self._error
                    raise SourceError("download cancelled")
                if self._ended:
                    return b""
                self._changed.wait()
            chunk = self._chunks.popleft()
            before, self._held = self._held, self._held - len(chunk)
            wake = before >= self._limit > self._held
        if wake:
            self._wake()
        return chunk

    def _wake(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._room.set)
