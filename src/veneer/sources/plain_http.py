"""Objects over HTTP/1.1 with the standard library: for servers and URLs that obstore cannot do.

That is: bodies of undeclared length (caches that compress or pack while they send), URLs with a query, absolute NAR URLs
on other hosts, and servers that say when to come back (Retry-After). One connection per request, blocking, on worker threads.

Redirects: at most 10, to http(s) only, each asked with the credentials of its own origin and never with another's.
Proxies: http_proxy, https_proxy, all_proxy (http:// proxies) and no_proxy as the standard library reads them.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import http.client
import io
import socket
import ssl
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from .credentials import Logins
from .transport import Body, Fault, Patience, TransferError, status_error, too_long
from .workers import Workers

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MOST_REDIRECTS = 10
_NETWORK_ERRORS = (OSError, http.client.HTTPException, EOFError)


class PlainHttp:
    """``transport.Transport``, except that ``path`` is an absolute URL."""

    def __init__(self, patience: Patience, logins: Logins, ca_pem: bytes | None, workers: Workers) -> None:
        self._patience = patience
        self._logins = logins
        self._ca_pem = ca_pem
        self._workers = workers
        self._tls: ssl.SSLContext | None = None

    def fetch(self, path: str, limit: int) -> bytes:
        deadline = time.monotonic() + self._patience.connect + self._patience.stall
        sock, response = self._get(path, {})
        response.received.deadline = deadline
        try:
            if response.length is not None and response.length > limit:
                raise too_long(response.length, limit)
            parts: list[bytes] = []
            received = 0
            while part := response.read1(64 << 10):
                parts.append(part)
                received += len(part)
                if received > limit:
                    raise too_long(None, limit)
                if time.monotonic() > deadline:
                    raise TransferError(Fault.PASSING, f"no whole answer within {self._patience.stall:g} s")
            if response.length:
                raise _cut()
        except _NETWORK_ERRORS as error:
            raise self._failure(error) from None
        finally:
            _shut(sock, response)
        return b"".join(parts)

    async def open(self, path: str, start: int = 0, end: int | None = None, version: str = "") -> Body:
        headers = {}
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        if version:
            headers["If-Match"] = version
        return await self._workers.run(self._open, path, headers, start, end, dispose=_PlainBody.shut)

    async def close(self) -> None: ...

    def _open(self, url: str, headers: dict[str, str], start: int, end: int | None) -> _PlainBody:
        sock, response = self._get(url, headers)
        response.received.deadline = None  # who reads the body looks at its pace
        size: int | None = response.length
        if "Range" in headers:
            try:
                size = _check_range(response, start, end)
            except TransferError:
                _shut(sock, response)
                raise
        return _PlainBody(self, sock, response, size, self._workers)

    def _get(self, url: str, headers: dict[str, str]) -> tuple[socket.socket, _Response]:
        """The answer, redirects followed, with a 2xx status."""
        for _ in range(MOST_REDIRECTS + 1):
            sock, response = self._ask(url, headers)
            if response.status in (200, 206):
                return sock, response
            location = response.headers.get("Location")
            after = _retry_after(response.headers.get("Retry-After"))
            _shut(sock, response)
            if response.status not in (301, 302, 303, 307, 308) or location is None:
                raise status_error(response.status, after)
            try:
                url = urljoin(url, location)
                parts = urlsplit(url)
            except ValueError:
                parts = urlsplit("")
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise TransferError(Fault.FATAL, "redirected to something that is not HTTP")
        raise TransferError(Fault.FATAL, f"more than {MOST_REDIRECTS} redirects")

    def _ask(self, url: str, headers: dict[str, str]) -> tuple[socket.socket, _Response]:
        """One request. The socket is given as well, because the connection forgets it when the server will close it."""
        sock: socket.socket | None = None
        try:
            connection, target, proxy_headers = self._connect(url)
            sock = connection.sock
            sock.settimeout(self._patience.stall)
            own = {
                "User-Agent": "veneer",
                "Accept": "*/*",
                "Accept-Encoding": "identity",
                "Connection": "close",
            }
            authorization = self._logins.authorization(url)
            if authorization is not None:
                own["Authorization"] = authorization
            connection.request("GET", target, headers={**own, **proxy_headers, **headers})
            return sock, cast(_Response, connection.getresponse())
        except (*_NETWORK_ERRORS, ValueError) as error:
            if sock is not None:
                _shut(sock)
            raise self._failure(error) from None

    def _connect(self, url: str) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
        """(connected, what to ask for, headers for a proxy)."""
        parts = urlsplit(url)
        host, port, secure = parts.hostname or "", parts.port, parts.scheme == "https"
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        proxies = getproxies()
        proxy = proxies.get(parts.scheme) or proxies.get("all")
        headers: dict[str, str] = {}
        place = (host, port)
        if proxy and not proxy_bypass(host, proxies):
            via = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            if via.scheme != "http" or not via.hostname:
                raise TransferError(Fault.FATAL, f"proxies of this kind are not supported: {via.scheme}")
            place = (via.hostname, via.port or 80)
            if via.username is not None:
                login = f"{unquote(via.username)}:{unquote(via.password or '')}".encode()
                headers["Proxy-Authorization"] = "Basic " + base64.b64encode(login).decode("ascii")
        else:
            proxy = None
        connection: http.client.HTTPConnection
        if secure:
            connection = http.client.HTTPSConnection(
                *place, timeout=self._patience.connect, context=self._context()
            )
        else:
            connection = http.client.HTTPConnection(*place, timeout=self._patience.connect)
        connection.response_class = _Response
        if proxy and secure:
            connection.set_tunnel(host, port or 443, headers)
            headers = {}
        elif proxy:
            target = f"http://{parts.netloc.rpartition('@')[2]}{target}"
            headers["Host"] = parts.netloc.rpartition("@")[2]
        connection.connect()
        return connection, target, headers

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            context = ssl.create_default_context()
            if self._ca_pem is not None:
                context.load_verify_locations(cadata=self._ca_pem.decode("ascii", "ignore"))
            self._tls = context
        return self._tls

    def _failure(self, error: Exception) -> TransferError:
        if isinstance(error, TransferError):
            return error
        if isinstance(error, TimeoutError):
            return TransferError(Fault.PASSING, f"no data for {self._patience.stall:g} s")
        if isinstance(error, ssl.SSLCertVerificationError):
            return TransferError(Fault.FATAL, f"TLS certificate refused: {error.verify_message}")
        if isinstance(error, socket.gaierror):
            return TransferError(Fault.PASSING, "host name not found")
        if isinstance(error, OSError) and error.strerror:
            return TransferError(Fault.PASSING, error.strerror)
        if isinstance(error, http.client.IncompleteRead | EOFError):
            return _cut()
        if isinstance(error, ValueError):
            return TransferError(Fault.FATAL, "not a URL that can be asked for")
        return TransferError(Fault.PASSING, "the answer is not HTTP")


class _Received(io.RawIOBase):
    """What comes on a socket: each piece within the socket's time limit, all of it until ``deadline`` (monotonic; None: for ever)."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase) -> None:
        self._sock = sock
        self._raw = raw
        self._seconds = sock.gettimeout() or 0.0
        self.deadline: float | None = time.monotonic() + self._seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        left = self._seconds if self.deadline is None else self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(min(self._seconds, left))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """One whose head as a whole, also a proxy's, comes within the socket's time limit: a byte now and then is not enough."""

    def __init__(self, sock: socket.socket, *args: Any, **named: Any) -> None:
        super().__init__(sock, *args, **named)
        self.received = _Received(sock, self.fp.detach())
        self.fp = io.BufferedReader(self.received)


class _PlainBody:
    def __init__(
        self,
        client: PlainHttp,
        sock: socket.socket,
        response: http.client.HTTPResponse,
        size: int | None,
        workers: Workers,
    ) -> None:
        self._client = client
        self._sock = sock
        self._response = response
        self._workers = workers
        self.size = size
        tag = response.headers.get("ETag", "")
        self.version = "" if tag.startswith("W/") else tag

    async def chunks(self, size: int) -> AsyncGenerator[bytes, None]:
        while chunk := await self._workers.run(self._read, size):
            yield chunk

    async def close(self) -> None:
        self.shut()

    def shut(self) -> None:
        """A thread that still reads from it gets an error."""
        _shut(self._sock, self._response)

    def _read(self, size: int) -> bytes:
        try:
            chunk = self._response.read(size)
        except _NETWORK_ERRORS as error:
            raise self._client._failure(error) from None
        if not chunk and self._response.length:
            raise _cut()
        return chunk


def _check_range(response: http.client.HTTPResponse, start: int, end: int | None) -> int | None:
    """The object's whole size, after checking that the answer is the part that was asked for."""
    if response.status != 206:
        raise TransferError(Fault.NO_RANGES, "ranges are not supported")
    unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
    span, _, whole = rest.partition("/")
    first, _, last = span.partition("-")
    if (
        unit != "bytes"
        or not (first.isdecimal() and last.isdecimal())
        or not (whole.isdecimal() or whole == "*")
    ):
        raise TransferError(Fault.FATAL, "the server sent a range without saying which")
    size = int(whole) if whole != "*" else None
    if int(first) != start or (end is not None and int(last) != min(end, size or end) - 1):
        raise TransferError(Fault.FATAL, "the server sent another range than asked for")
    return size


def _retry_after(text: str | None) -> float | None:
    """Seconds, from a number or a date."""
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text.strip()[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _cut() -> TransferError:
    return TransferError(Fault.PASSING, "connection closed in the middle of an answer")


def _shut(sock: socket.socket, response: http.client.HTTPResponse | None = None) -> None:
    """Close, and wake a thread that waits for data on it."""
    with contextlib.suppress(OSError):  # not connected any more
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
    if response is not None:
        response.close()
