"""An HTTP place: each question goes to the client that can answer it.

obstore's client (``stored_objects``) is asked first, for speed. The plain client (``plain_http``) gets absolute URLs of
other places, URLs with a query, objects that turned out to have no declared length (and their like from then on), and
everything while the server says that it is busy, because only that client sees for how long.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from urllib.parse import urlsplit

from .plain_http import PlainHttp
from .stored_objects import StoredObjects
from .transport import BUSY_STATUS, Body, Fault, TransferError


class HttpPlace:
    """``transport.Transport`` below one http(s) URL."""

    def __init__(self, address: str, stored: StoredObjects, plain: PlainHttp) -> None:
        self._address = address
        self._stored = stored
        self._plain = plain
        self._no_length: set[str] = set()
        """Kinds of objects (``narinfo``, ``nar``, ...) whose length this server does not declare."""
        self._busy = False

    def fetch(self, path: str, limit: int) -> bytes:
        path = path.removeprefix(self._address + "/")
        if not self._is_plain(path):
            try:
                return self._stored.fetch(path, limit)
            except TransferError as error:
                if not self._noted(path, error):
                    raise
        body = self._plain.fetch(self._url(path), limit)
        self._busy = False
        return body

    async def open(self, path: str, start: int = 0, end: int | None = None, version: str = "") -> Body:
        path = path.removeprefix(self._address + "/")
        if not self._is_plain(path):
            try:
                return await self._stored.open(path, start, end, version)
            except TransferError as error:
                if not self._noted(path, error):
                    raise
        body = await self._plain.open(self._url(path), start, end, version)
        self._busy = False
        return body

    async def close(self) -> None:
        await self._stored.close()
        await self._plain.close()

    def _is_plain(self, path: str) -> bool:
        return self._busy or "?" in path or "://" in path or "//" in path or _kind(path) in self._no_length

    def _noted(self, path: str, error: TransferError) -> bool:
        """Whether the plain client should try at once."""
        if error.status in BUSY_STATUS:
            self._busy = True
        if error.fault is Fault.NO_LENGTH:
            self._no_length.add(_kind(path))
            return True
        return False

    def _url(self, path: str) -> str:
        if "://" in path:
            return path
        base = urlsplit(self._address)
        return f"{base.scheme}://{base.netloc}{base.path.rstrip('/')}/{path.lstrip('/')}"


def _kind(path: str) -> str:
    return PurePosixPath(path).suffix if "/" not in path else path.partition("/")[0]
