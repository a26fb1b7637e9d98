"""One NAR file read to its end through interruptions.

- The body must have the narinfo's FileSize (NarSize, where nothing is compressed). Where that is unknown, it must have the
  size that the server declares, or end by itself before it is longer than any compression of the NAR could be.
- After an interruption it goes on by range from the last chunk given out, if the object is still the same one (strong
  ETag, or else its size); without ranges it is read from the start again and the known part thrown away.
- A chunk that arrived makes all tries available again; after failures chunks are smaller, so that a line that breaks
  every few hundred KiB still gets on.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from veneer.model.errors import SourceError
from veneer.model.path_info import UnverifiedPathInfo

from .base import Meter
from .bodies import paced
from .pace import Pace
from .retry import Retry
from .transport import CHUNK, Body, Fault, TransferError, Transport


class NarStream:
    """A download under way. After a TransferError, ``tried`` says how many tries it took."""

    def __init__(
        self,
        transport: Transport,
        info: UnverifiedPathInfo,
        name: str,
        where: str,
        retry: Retry,
        meter: Meter,
        pace: Pace,
    ) -> None:
        self._transport = transport
        self._info = info
        self._name = name
        self._where = where
        self._retry = retry
        self._meter = meter
        self._pace = pace
        self._size = expected_size(info)
        self._version = ""
        self._ranges = True
        self._sent = 0
        self.tried = 0

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The file's bytes. TransferError when no try is left, SourceError for a wrong size."""
        while True:
            await self._pace.request()
            try:
                body = await self._open()
                try:
                    async with aclosing(self._rest(body)) as chunks:
                        async for chunk in chunks:
                            self.tried = 0
                            yield chunk
                finally:
                    await body.close()
                if self._size is None and self._sent:
                    return
                if self._sent == self._size:
                    return
                raise TransferError(Fault.PASSING, "connection closed in the middle of an answer")
            except TransferError as error:
                if error.fault is Fault.NO_RANGES and self._ranges and self._sent:
                    self._ranges = False
                    continue
                self.tried += 1
                if self._retry.is_over(error, self.tried):
                    raise
                failure = error
            await self._retry.pause(failure, self.tried)

    async def _open(self) -> Body:
        """The body from ``_sent`` on, or from 0 when the server has no ranges."""
        if not self._sent:
            body = await self._transport.open(self._name)
            try:
                self._agree(body.size)
            except SourceError:
                await body.close()
                raise
            self._version = body.version
            return body
        start = self._sent if self._ranges else 0
        body = await self._transport.open(self._name, start, None, self._version)
        if body.size is not None and self._size is not None and body.size != self._size:
            await body.close()
            raise TransferError(Fault.CHANGED, "the object changed while it was read")
        return body

    async def _rest(self, body: Body) -> AsyncGenerator[bytes, None]:
        """What of the body was not given out yet."""
        skip = 0 if self._ranges else self._sent
        most = most_bytes(self._info) if self._size is None else self._size
        size = CHUNK >> (2 * min(self.tried, 3))
        async with aclosing(paced(body, size, self._retry.options, self._pace)) as chunks:
            async for chunk in chunks:
                self._meter(len(chunk))
                if skip:
                    skip, chunk = max(0, skip - len(chunk)), chunk[skip:]
                    if not chunk:
                        continue
                if self._sent + len(chunk) > most:
                    raise self._wrong(f"more than {most} bytes")
                self._sent += len(chunk)
                yield chunk

    def _agree(self, declared: int | None) -> None:
        """Take the server's size where the narinfo has none. SourceError when they differ."""
        if declared is None or declared == self._size:
            return
        if self._size is not None or not 0 < declared <= most_bytes(self._info):
            raise self._wrong(f"{declared} bytes")
        self._size = declared

    def _wrong(self, found: str) -> SourceError:
        size = expected_size(self._info)
        expected = f"at most {most_bytes(self._info)}" if size is None else str(size)
        return SourceError(
            f"the NAR file of {self._info.store_path} has the wrong size: {found}, expected {expected}",
            where=self._where,
        )


def expected_size(info: UnverifiedPathInfo) -> int | None:
    """Bytes of the NAR file, where the narinfo tells."""
    if info.file_size is not None:
        return info.file_size
    return info.nar_size if info.compression == "none" else None


def most_bytes(info: UnverifiedPathInfo) -> int:
    """A NAR file of unknown size is not much longer than the NAR: formats add a few bytes per block."""
    return info.nar_size + info.nar_size // 8 + (1 << 20)
