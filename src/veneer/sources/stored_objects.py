"""Objects through obstore: http(s), S3, Google and Azure storage.

What obstore does by itself (0.12): pooled connections, system and given CA certificates, http_proxy, https_proxy,
all_proxy and no_proxy, at most 10 redirects (credentials are dropped when they lead to another host), Range requests
whose answer is checked. What it hides: response headers such as Retry-After, and statuses except as text. What it
refuses: HTTP bodies of undeclared length (``Fault.NO_LENGTH``) and URLs with a query. Its own retries are off.

Two clients per place: one for small objects, whose requests are limited as a whole, and one for bodies of any size,
which are only limited from chunk to chunk. An exception of obstore holds whole URLs and server texts: nothing of it is
passed on but what ``_reason`` recognises.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Callable
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import obstore
from obstore.exceptions import BaseError, NotSupportedError, PermissionDeniedError, PreconditionError
from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

from .credentials import read_aws_profile
from .options import SourceConfig
from .transport import Body, Fault, Patience, TransferError, status_error, too_long

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

    StoreMaker = Callable[[ClientConfig, RetryConfig], ObjectStore]

_FOREVER = timedelta(days=3650)
_STATUS = re.compile(r"status code: (\d{3})|Client error with status (\d{3})")
_OBSTORE_ERRORS = (BaseError, OSError, ValueError)
"""All that obstore raises (OSError: FileNotFoundError; ValueError: paths it cannot express)."""


class StoredObjects:
    """``transport.Transport`` over one obstore place."""

    def __init__(self, make: StoreMaker, patience: Patience, client: ClientConfig) -> None:
        self._make = make
        self._patience = patience
        self._client = client

    def fetch(self, path: str, limit: int) -> bytes:
        try:
            answer = obstore.get(self._small, _object_name(path))
            size = answer.meta["size"]
            if size > limit:
                raise too_long(size, limit)
            return bytes(answer.bytes())
        except _OBSTORE_ERRORS as error:
            raise self._failure(error) from None

    async def open(self, path: str, start: int = 0, end: int | None = None, version: str = "") -> Body:
        options: GetOptions = {}
        if end is not None:
            options["range"] = (start, end)
        elif start:
            options["range"] = {"offset": start}
        if version:
            options["if_match"] = version
        try:
            async with asyncio.timeout(self._patience.connect + self._patience.stall):
                answer = await obstore.get_async(self._large, _object_name(path), options=options)
        except TimeoutError:
            raise TransferError(Fault.PASSING, "no answer in time") from None
        except _OBSTORE_ERRORS as error:
            raise self._failure(error) from None
        return _StoredBody(answer, self._failure)

    async def close(self) -> None:
        self.__dict__.pop("_small", None)
        self.__dict__.pop("_large", None)

    @cached_property
    def _small(self) -> ObjectStore:
        return self._make({**self._client, "timeout": _seconds(self._patience.stall)}, {"max_retries": 0})

    @cached_property
    def _large(self) -> ObjectStore:
        stall = _seconds(self._patience.stall)
        return self._make(
            {**self._client, "http1_only": True, "timeout": _FOREVER, "read_timeout": stall},
            {"max_retries": 0},
        )

    def _failure(self, error: Exception) -> TransferError:
        return _classify(error, self._patience)


class _StoredBody:
    def __init__(self, answer: GetResult, failure: Callable[[Exception], TransferError]) -> None:
        self._answer: GetResult | None = answer
        self._failure = failure
        meta = answer.meta
        self.size: int | None = meta["size"]
        tag = meta["e_tag"] or ""
        self.version = "" if tag.startswith("W/") else tag

    async def chunks(self, size: int) -> AsyncGenerator[bytes, None]:
        assert self._answer is not None
        stream = self._answer.stream(size)
        self._answer = None
        while True:
            try:
                chunk = await anext(stream)
            except StopAsyncIteration:
                return
            except _OBSTORE_ERRORS as error:
                raise self._failure(error) from None
            if chunk:
                yield chunk

    async def close(self) -> None:
        self._answer = None  # dropping it closes the connection


def http_objects(
    address: str, patience: Patience, authorization: str | None, ca_pem: bytes | None
) -> StoredObjects:
    """An HTTP place. ``ca_pem``: CA certificates trusted besides the system's."""
    client = _client(patience, ca_pem)
    if authorization is not None:
        client["default_headers"] = {"authorization": authorization}

    def make(options: ClientConfig, retry: RetryConfig) -> ObjectStore:
        return HTTPStore(address, client_options=options, retry_config=retry)

    return StoredObjects(make, patience, client)


def bucket_objects(config: SourceConfig, patience: Patience, ca_pem: bytes | None) -> StoredObjects:
    """An s3, gs or az place. Credentials come from the environment as each vendor's tools read it."""
    return StoredObjects(_bucket_maker(config), patience, _client(patience, ca_pem))


def open_bucket(config: SourceConfig, patience: Patience, ca_pem: bytes | None) -> ObjectStore:
    """An s3, gs or az place for whoever writes to it: obstore's own, which tries again what may work later."""
    client = _client(patience, ca_pem)
    stall = _seconds(patience.stall)
    return _bucket_maker(config)({**client, "timeout": _FOREVER, "read_timeout": stall}, {"max_retries": 3})


def reason_of(error: Exception, patience: Patience) -> str:
    """A few words without URLs or secrets about an exception of obstore."""
    return _classify(error, patience).reason


def _bucket_maker(config: SourceConfig) -> StoreMaker:
    bucket, _, prefix = config.address.partition("/")

    def make(options: ClientConfig, retry: RetryConfig) -> ObjectStore:
        if config.scheme == "gs":
            return GCSStore(bucket, prefix=prefix or None, client_options=options, retry_config=retry)
        if config.scheme == "az":
            return AzureStore.from_url(f"az://{config.address}", client_options=options, retry_config=retry)
        settings = s3_settings(config)
        return S3Store(
            bucket, prefix=prefix or None, config=settings, client_options=options, retry_config=retry
        )

    return make


def s3_settings(config: SourceConfig) -> Any:
    """obstore's S3 configuration for Nix's keys. Without any credentials an own endpoint is asked anonymously."""
    keys = dict(config.s3)
    environ = os.environ
    profile = read_aws_profile(keys.get("profile") or environ.get("AWS_PROFILE") or "default", environ)
    region = (
        keys.get("region") or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or profile.region
    )
    settings: dict[str, Any] = {"region": region or "us-east-1"}
    if endpoint := keys.get("endpoint"):
        if "://" not in endpoint:
            endpoint = f"{keys.get('scheme', 'https')}://{endpoint}"
        settings["endpoint"] = endpoint
        settings["virtual_hosted_style_request"] = False
    in_environment = "AWS_ACCESS_KEY_ID" in environ and "profile" not in keys
    if not in_environment and profile.key_id:
        settings["access_key_id"] = profile.key_id
        settings["secret_access_key"] = profile.secret
        if profile.token:
            settings["session_token"] = profile.token
    elif (
        not in_environment
        and endpoint
        and not any(key.startswith(("AWS_WEB_", "AWS_CONTAINER_")) for key in environ)
    ):
        settings["skip_signature"] = True
    return settings


def _client(patience: Patience, ca_pem: bytes | None) -> ClientConfig:
    client: ClientConfig = {
        "allow_http": True,
        "connect_timeout": _seconds(patience.connect),
        "http1_only": False,
        "user_agent": "veneer",
    }
    if ca_pem is not None:
        client["root_certificate"] = ca_pem
    return client


def _seconds(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)


def _object_name(path: str) -> str:
    """obstore encodes names by itself."""
    return unquote(path).strip("/")


def _classify(error: Exception, patience: Patience) -> TransferError:
    text = str(error)
    if isinstance(error, ValueError):
        return TransferError(Fault.FATAL, "not a name that can be asked for")
    if isinstance(error, NotSupportedError):
        return TransferError(Fault.NO_RANGES, "ranges are not supported")
    if isinstance(error, PreconditionError):
        return status_error(412)
    if "Content-Length Header missing" in text:
        return TransferError(Fault.NO_LENGTH, "no Content-Length")
    if found := _STATUS.search(text):
        return status_error(int(found[1] or found[2]))
    if isinstance(error, FileNotFoundError):
        return TransferError(Fault.MISSING, "no such object")
    if isinstance(error, PermissionDeniedError) or "PermissionDenied" in text:
        return TransferError(Fault.FATAL, "permission denied")
    return _reason(text, patience)


def _reason(text: str, patience: Patience) -> TransferError:
    """From the text of a failure below HTTP. Order matters: the text nests causes."""
    squeezed = re.sub(r"\s+", "", text)
    if found := re.search(r"InvalidCertificate\((\w+)", squeezed):
        return TransferError(Fault.FATAL, f"TLS certificate refused: {found[1]}")
    if "dnserror" in squeezed:
        return TransferError(Fault.PASSING, "host name not found")
    if "TimedOut" in squeezed or "kind:Timeout" in squeezed:
        if "Connect" in squeezed:
            return TransferError(Fault.PASSING, f"no connection within {patience.connect:g} s")
        return TransferError(Fault.PASSING, f"no data for {patience.stall:g} s")
    if found := re.search(r"Os\{.*?message:\"([^\"]{1,100})\"", text, re.DOTALL) or re.search(
        r'message: "([^"]{1,100})"', text
    ):
        return TransferError(Fault.PASSING, found[1])
    if "followingredirect" in squeezed or "Redirect" in squeezed:
        return TransferError(Fault.FATAL, "too many or impossible redirects")
    if "IncompleteBody" in squeezed or "UnexpectedEof" in squeezed or "IncompleteMessage" in squeezed:
        return TransferError(Fault.PASSING, "connection closed in the middle of an answer")
    if "UnexpectedRange" in squeezed or "InvalidRange" in squeezed or "NoContentRange" in squeezed:
        return TransferError(Fault.FATAL, "the server sent another range than asked for")
    if "Credential" in text or "credential" in text:
        return TransferError(Fault.FATAL, "no usable credentials")
    return TransferError(Fault.PASSING, "the connection failed or the answer is not HTTP")
