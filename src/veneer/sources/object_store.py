"""A binary cache kept as objects: over http(s), in a directory, in S3, Google or Azure storage.

One class for all of them; what differs is the transport. Here stands what an answer means: which failures say "absent",
which are tried again (``retry``), which size is too much, and what users are told. NARs: see ``nar_stream``.

Narinfos and the cache's description may come compressed (Nix's ``narinfo-compression``): recognised by their content.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from veneer.formats import cache_info, listing, narinfo
from veneer.formats.cache_info import CacheInfo, parse_cache_info
from veneer.formats.listing import decode_listing_bytes
from veneer.formats.narinfo import parse_narinfo
from veneer.model.errors import FormatError, SourceError, SourceMissingError, UsageError, printable
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import is_hash_part

from .base import Meter, RangesUnsupportedError, unmetered
from .bodies import collected
from .credentials import Logins
from .directory import DirectoryObjects, no_answer
from .http_place import HttpPlace
from .nar_stream import NarStream, expected_size
from .options import SourceConfig, SourceOptions, without_secrets
from .pace import Pace
from .plain_http import PlainHttp
from .retry import Retry
from .stored_objects import bucket_objects, http_objects
from .transport import Fault, Patience, TransferError, Transport, too_long
from .workers import Workers

T = TypeVar("T")
_TEXT = re.compile(rb"\s*(?:[A-Za-z][A-Za-z0-9-]*:|<|$)")
"""How plain answers begin: a key, or the HTML of someone who is not a cache."""
_INLINE = 64 << 10
"""Listings up to this size (encoded) are decoded on the event loop."""


class ObjectStoreSource:
    """Implements ``sources.base.Source``."""

    def __init__(
        self,
        config: SourceConfig,
        options: SourceOptions | None = None,
        *,
        pace: Pace | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        vary: Callable[[], float] = random.random,
    ) -> None:
        """UsageError: the netrc or CA file cannot be used. Asks nothing yet."""
        self._config = config
        self._options = options = options or SourceOptions()
        self._retry = Retry(options, sleep, vary)
        self._pace = pace or Pace(config.bytes_per_second, config.requests_per_second)
        self._workers = Workers(options.in_flight, "source")
        self._transport = _open_transport(config, options, self._workers)
        self._info: CacheInfo | None = None
        self._asking_info = asyncio.Lock()

    @property
    def url(self) -> str:
        return self._config.url

    @property
    def priority(self) -> int:
        """The URL's; else the cache's own, once ``nix_cache_info`` was answered; else Nix's default."""
        if self._config.priority is not None:
            return self._config.priority
        return self._info.priority if self._info is not None else cache_info.DEFAULT_PRIORITY

    async def nix_cache_info(self) -> CacheInfo:
        async with self._asking_info:
            if self._info is None:
                name = "nix-cache-info"
                data = await self._fetch(name, cache_info.MAX_SIZE, unmetered)
                self._info = CacheInfo() if data is None else self._parse(name, data, parse_cache_info)
            self._check_store_dir()
            return self._info

    def _check_store_dir(self) -> None:
        """SourceError when the cache has said that it is of another store directory: none of its paths is ours."""
        if self._info is not None and self._info.store_dir != self._options.store_dir:
            raise SourceError(
                f"this cache is of the store directory {self._info.store_dir}, not {self._options.store_dir}",
                where=self.url,
                hint="remove it from the sources",
            )

    async def path_info(self, hash_part: str, meter: Meter = unmetered) -> UnverifiedPathInfo | None:
        self._check_store_dir()
        name = _checked(hash_part) + ".narinfo"
        data = await self._fetch(name, narinfo.MAX_SIZE, meter)
        if data is None:
            return None
        info = self._parse(name, data, lambda text: parse_narinfo(text, store_dir=self._options.store_dir))
        if info.store_path.hash_part != hash_part:
            raise FormatError(f"a narinfo of another path: {info.store_path}", where=self._where(name))
        return info

    async def listing(self, hash_part: str, meter: Meter = unmetered) -> bytes | None:
        name = _checked(hash_part) + ".ls"
        try:
            data = await self._retried(name, self._collect, name, listing.MAX_SIZE, meter)
        except SourceMissingError:
            return None
        try:
            if len(data) <= _INLINE:
                return decode_listing_bytes(data, listing.MAX_SIZE)
            return await asyncio.to_thread(decode_listing_bytes, data, listing.MAX_SIZE)
        except FormatError as error:
            raise self._placed(name, error) from error

    async def nar(self, info: UnverifiedPathInfo, meter: Meter = unmetered) -> AsyncGenerator[bytes, None]:
        name = self._nar_name(info)
        stream = NarStream(self._transport, info, name, self._where(name), self._retry, meter, self._pace)
        try:
            async with aclosing(stream.chunks()) as chunks:
                async for chunk in chunks:
                    yield chunk
        except TransferError as error:
            raise self._error(name, error, stream.tried) from None

    async def part(self, info: UnverifiedPathInfo, offset: int, size: int, meter: Meter = unmetered) -> bytes:
        whole = expected_size(info)
        if whole is None:
            raise RangesUnsupportedError
        if offset < 0 or size <= 0 or offset + size > whole:
            raise ValueError(f"[{offset}, {offset + size}) is not inside a file of {whole} bytes")
        name = self._nar_name(info)
        return await self._retried(name, self._part, name, whole, offset, size, meter)

    async def sidecar(
        self, hash_part: str, suffix: str, limit: int, meter: Meter = unmetered
    ) -> bytes | None:
        name = _checked(hash_part) + suffix
        try:
            return await self._retried(name, self._collect, name, limit, meter)
        except SourceMissingError:
            return None

    async def close(self) -> None:
        await self._transport.close()
        self._workers.close()

    async def _retried(self, name: str, once: Callable[..., Awaitable[T]], *args: object) -> T:
        """``once(*args)``, as often as the policy allows. SourceMissingError, SourceError."""
        tried = 0
        while True:
            tried += 1
            await self._pace.request()
            try:
                return await once(*args)
            except TransferError as error:
                if self._retry.is_over(error, tried):
                    raise self._error(name, error, tried) from None
                failure = error
            await self._retry.pause(failure, tried)

    async def _fetch(self, name: str, limit: int, meter: Meter) -> bytes | None:
        """A small object, plain; None when there is none."""
        try:
            data = await self._retried(name, self._fetch_once, name, limit)
        except SourceMissingError:
            return None
        meter(len(data))
        self._pace.spent(len(data))
        if _TEXT.match(data):
            return data
        try:
            return decode_listing_bytes(data, limit)
        except FormatError as error:
            raise self._placed(name, error) from error

    async def _fetch_once(self, name: str, limit: int) -> bytes:
        """On a thread. What asks servers has time limits of its own, which begin when it asks; a file system has none."""
        seconds = self._options.stall_seconds if self._config.scheme == "file" else None
        try:
            async with asyncio.timeout(seconds):
                return await self._workers.run(self._transport.fetch, name, limit)
        except TimeoutError:
            raise no_answer(self._options.stall_seconds) from None

    async def _collect(self, name: str, limit: int, meter: Meter) -> bytes:
        """A listing or another object that may be large, as it came."""
        body = await self._transport.open(name)
        try:
            if body.size is not None and body.size > limit:
                raise too_long(body.size, limit)
            return await collected(body, limit, meter, self._options, self._pace)
        finally:
            await body.close()

    async def _part(self, name: str, whole: int, offset: int, size: int, meter: Meter) -> bytes:
        """``size`` bytes of a NAR file of ``whole`` bytes."""
        try:
            body = await self._transport.open(name, offset, offset + size)
        except TransferError as error:
            if error.fault is Fault.NO_RANGES:
                raise RangesUnsupportedError from None
            raise
        try:
            if body.size not in (None, whole):
                raise TransferError(Fault.FATAL, f"wrong size: {body.size} bytes, expected {whole}")
            part = await collected(body, size, meter, self._options, self._pace)
        finally:
            await body.close()
        if len(part) < size:
            raise TransferError(Fault.PASSING, "connection closed in the middle of an answer")
        return part

    def _nar_name(self, info: UnverifiedPathInfo) -> str:
        scheme = info.url.partition("://")[0] if "://" in info.url else ""
        if scheme and not (scheme in ("http", "https") and self._config.scheme in ("http", "https")):
            raise SourceError(
                f"the narinfo of {info.store_path} points outside its cache, to {without_secrets(info.url)}",
                where=self.url,
            )
        if ".." in unquote(info.url.partition("?")[0]).split("/"):
            raise FormatError(f"not a NAR's URL: {info.url[:200]!r}", where=self.url)
        return info.url

    def _parse(self, name: str, data: bytes, parse: Callable[[bytes], T]) -> T:
        try:
            return parse(data)
        except FormatError as error:
            raise self._placed(name, error) from error

    def _placed(self, name: str, error: FormatError) -> FormatError:
        what = f"{error.where}: {error.what}" if error.where else error.what
        return type(error)(what, where=self._where(name), hint=error.hint)

    def _error(self, name: str, error: TransferError, tries: int) -> SourceError:
        times = f" after {tries} tries" if tries > 1 else ""
        kind = SourceMissingError if error.fault is Fault.MISSING else SourceError
        hint = "give credentials in a netrc file (netrc-file)" if error.status in (401, 407) else ""
        return kind(printable(f"{error.reason}{times}"), where=self._where(name), hint=hint)

    def _where(self, name: str) -> str:
        return without_secrets(name if "://" in name else f"{self.url.partition('?')[0]}/{name}")


def _open_transport(config: SourceConfig, options: SourceOptions, workers: Workers) -> Transport:
    patience = Patience(options.connect_seconds, options.stall_seconds)
    if config.scheme == "file":
        return DirectoryObjects(Path(config.address), workers, options.stall_seconds)
    ca_pem = read_ca(options.ca_file)
    if config.scheme in ("s3", "gs", "az"):
        return bucket_objects(config, patience, ca_pem)
    logins = Logins(config, options.netrc)
    stored = http_objects(config.address, patience, logins.authorization(config.address), ca_pem)
    return HttpPlace(config.address, stored, PlainHttp(patience, logins, ca_pem, workers))


def read_ca(path: Path | None) -> bytes | None:
    """CA certificates of ``path``, else of what NIX_SSL_CERT_FILE names. UsageError."""
    if path is None:
        named = os.environ.get("NIX_SSL_CERT_FILE")
        if not named:
            return None
        path = Path(named)
    try:
        pem = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the CA certificates: {error.strerror}", where=str(path)) from error
    if b"-----BEGIN CERTIFICATE-----" not in pem and b"-----BEGIN TRUSTED CERTIFICATE-----" not in pem:
        raise UsageError("no CA certificates in this file", where=str(path))
    return pem


def _checked(hash_part: str) -> str:
    if not is_hash_part(hash_part):
        raise ValueError(f"not a hash part: {hash_part[:100]!r}")
    return hash_part
