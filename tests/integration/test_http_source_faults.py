"""HTTP servers that fail, stall, cheat or want something: what an HTTP source makes of each."""

from __future__ import annotations

import asyncio
import base64
import datetime
import ipaddress
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support import raw_http
from tests.support.faulty_http import (
    FaultyServer,
    RangeIgnored,
    Reset,
    Stall,
    Status,
    Truncated,
    WrongLength,
    WrongRange,
)
from tests.support.raw_http import RawServer, Request, chunked, response
from tests.support.source_cache import Entry, entry, write_cache
from veneer.formats.narinfo import write_narinfo
from veneer.model.errors import FormatError, SourceError, SourceMissingError, UsageError
from veneer.sources.base import RangesUnsupportedError
from veneer.sources.object_store import ObjectStoreSource
from veneer.sources.options import SourceOptions, parse_source_url

OPTIONS = SourceOptions(connect_seconds=2, stall_seconds=0.5, tries=3, backoff_seconds=0.01)
PATIENT = SourceOptions(connect_seconds=5, stall_seconds=10, tries=3, backoff_seconds=0.01)
SMALL = entry(1)
BIG = entry(2, 5_000_000)
T = TypeVar("T")


@pytest.fixture
def server(tmp_path: Path, faulty_http: Callable[[Path], FaultyServer]) -> FaultyServer:
    return faulty_http(write_cache(tmp_path / "cache", SMALL, BIG))


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "NIX_SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def ask(
    url: str, body: Callable[[ObjectStoreSource], Awaitable[T]], options: SourceOptions = PATIENT
) -> tuple[T, list[float]]:
    """``body(source)`` and the pauses between tries, which are not really made."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    async def main() -> T:
        source = ObjectStoreSource(parse_source_url(url), options, sleep=sleep, vary=lambda: 0.5)
        try:
            return await body(source)
        finally:
            await source.close()

    return asyncio.run(asyncio.wait_for(main(), 30)), pauses


def ask_error(
    url: str, body: Callable[[ObjectStoreSource], Awaitable[object]], options: SourceOptions = PATIENT
) -> SourceError:
    with pytest.raises(SourceError) as caught:
        ask(url, body, options)
    return caught.value


async def path_info(source: ObjectStoreSource) -> object:
    return await source.path_info(SMALL.hash_part)


async def listing(source: ObjectStoreSource) -> object:
    return await source.listing(SMALL.hash_part)


def nar(wanted: Entry = BIG) -> Callable[[ObjectStoreSource], Awaitable[bytes]]:
    async def body(source: ObjectStoreSource) -> bytes:
        return b"".join([chunk async for chunk in source.nar(wanted.info)])

    return body


# --- questions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [Status(500), Status(502), Status(408), Reset(), Truncated(10), Reset(10)])
@pytest.mark.parametrize("question", [path_info, listing])
def test_passing_failures_are_tried_again(
    server: FaultyServer, fault: Status, question: Callable[[ObjectStoreSource], Awaitable[object]]
) -> None:
    server.fail("/*", fault, times=2)
    answer, pauses = ask(server.url, question)
    assert answer
    assert pauses == [0.01, 0.02]
    assert server.count() == 3


@pytest.mark.parametrize("question", [path_info, listing, nar()])
def test_an_error_counts_the_tries(
    server: FaultyServer, question: Callable[[ObjectStoreSource], Awaitable[object]]
) -> None:
    server.fail("/*", Status(500))
    error = ask_error(server.url, question)
    assert error.what == "HTTP status 500 after 3 tries"
    assert error.where.startswith(server.url)
    assert server.count() == 3


@pytest.mark.parametrize("status", [403, 404, 410])
def test_absence_is_not_tried_again(server: FaultyServer, status: int) -> None:
    server.fail("/*", Status(status))
    assert ask(server.url, path_info) == (None, [])
    assert ask(server.url, listing) == (None, [])
    assert server.count() == 2
    with pytest.raises(SourceMissingError, match=f"HTTP status {status}"):
        ask(server.url, nar())


def test_missing_credentials_are_told_with_a_hint(server: FaultyServer) -> None:
    server.fail("/*", Status(401))
    error = ask_error(server.url, path_info)
    assert "401" in error.what
    assert "netrc" in error.hint
    assert server.count() == 1


def test_refused_connection_is_told(server: FaultyServer) -> None:
    server.refuse()
    for question in (path_info, listing, nar()):
        assert ask_error(server.url, question).what == "Connection refused after 3 tries"
    server.accept()
    assert ask(server.url, path_info)[0] == SMALL.info


def test_unknown_host_is_told() -> None:
    assert ask_error("http://host.invalid", path_info).what == "host name not found after 3 tries"


@pytest.mark.parametrize("fault", [Stall(), Stall(10)])
@pytest.mark.parametrize("question", [path_info, listing, nar()])
def test_a_stall_is_given_up(
    server: FaultyServer, fault: Stall, question: Callable[[ObjectStoreSource], Awaitable[object]]
) -> None:
    server.fail("/*", fault)
    error = ask_error(server.url, question, OPTIONS)
    assert error.what.endswith("after 3 tries")
    assert "0.5 s" in error.what


def test_a_drip_is_given_up() -> None:
    server: RawServer

    def answer(request: Request) -> Iterator[bytes]:
        size = len(BIG.file) if "/nar/" in request.target else 1000
        yield b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size
        while not server.ended.wait(0.1):
            yield b"x"

    options = SourceOptions(
        connect_seconds=2, stall_seconds=0.4, tries=2, backoff_seconds=0.01, least_rate=10**9
    )
    with RawServer(answer) as server:
        assert "0.4 s" in ask_error(server.url, path_info, options).what
        assert "per second" in ask_error(server.url, nar(), options).what


@pytest.mark.parametrize(
    ("begun", "drip", "question"),
    [
        (b"Content-Type: ", b"x", nar(entry(5, url="nar/5.nar?hash=abc"))),
        (b"Transfer-Encoding: chunked\r\n\r\n", b"0", path_info),
    ],
    ids=["head", "size-of-a-chunk"],
)
def test_what_drips_before_the_body_is_given_up_by_the_plain_client(
    begun: bytes, drip: bytes, question: Callable[[ObjectStoreSource], Awaitable[object]]
) -> None:
    server: RawServer

    def answer(request: Request) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\n" + begun
        while not server.ended.wait(0.1):
            yield drip

    options = SourceOptions(connect_seconds=0.2, stall_seconds=0.4, tries=2, backoff_seconds=0.01)
    with RawServer(answer) as server:
        assert "no data for 0.4 s" in ask_error(server.url, question, options).what


def test_what_is_not_http_is_told() -> None:
    with RawServer(lambda request: [b"220 mail.example ESMTP\r\n"]) as server:
        assert "not HTTP" in ask_error(server.url, path_info).what


def test_the_declared_size_is_checked_before_the_body() -> None:
    declared = [b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\nStorePath: "]
    with RawServer(lambda request: declared) as server:
        for question in (path_info, listing):
            assert "too long" in ask_error(server.url, question).what
        assert "wrong size: 999999999999 bytes" in ask_error(server.url, nar()).what
        assert len(server.seen) == 3


def test_an_endless_answer_is_cut_off() -> None:
    server: RawServer

    def answer(request: Request) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        piece = b"StorePath: " * 10_000
        while not server.ended.is_set():
            yield b"%x\r\n%s\r\n" % (len(piece), piece)

    with RawServer(answer) as server:
        assert "too long" in ask_error(server.url, path_info).what
        assert "wrong size" in ask_error(server.url, nar()).what
        unsized = entry(3, compression="xz", sized=False)
        assert "wrong size" in ask_error(server.url, nar(unsized)).what


def test_a_login_page_is_no_cache() -> None:
    page = b"<!DOCTYPE html><html><body>Welcome to the hotel</body></html>\n"
    with RawServer(lambda request: [response(page)]) as server:
        with pytest.raises(FormatError) as caught:
            ask(server.url, path_info)
        assert server.url in caught.value.where
        with pytest.raises(FormatError, match="not a cache"):
            ask(server.url, lambda source: source.nix_cache_info())


# --- busy servers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("question", [path_info, nar(SMALL)])
def test_retry_after_is_honoured(
    server: FaultyServer, status: int, question: Callable[[ObjectStoreSource], Awaitable[object]]
) -> None:
    server.fail("/*", Status(status, {"Retry-After": "7"}), times=2)
    answer, pauses = ask(server.url, question)
    assert answer
    assert pauses == [0.01, 7.0]  # the first one is not visible through the fast client
    assert server.count() == 3


def test_a_server_that_wants_a_long_rest_has_failed(server: FaultyServer) -> None:
    server.fail("/*", Status(503, {"Retry-After": "3600"}))
    error = ask_error(server.url, path_info)
    assert error.what == "HTTP status 503 after 2 tries"


# --- NARs ---------------------------------------------------------------------------------------------------------


def test_a_reset_nar_is_read_to_its_end(server: FaultyServer) -> None:
    server.fail("/nar/*", Reset(2_500_000), times=2)  # a reset may throw away what was sent before it
    assert ask(server.url, nar())[0] == BIG.file


@pytest.mark.parametrize("fault", [Truncated(2_500_000), Stall(2_500_000)])
def test_an_interrupted_nar_goes_on_by_range(server: FaultyServer, fault: Truncated) -> None:
    server.fail("/nar/*", fault, times=1)
    counted: list[int] = []

    async def body(source: ObjectStoreSource) -> bytes:
        return b"".join([chunk async for chunk in source.nar(BIG.info, counted.append)])

    assert ask(server.url, body, OPTIONS)[0] == BIG.file
    first, second = server.seen
    assert first.range == ""
    assert second.range.startswith("bytes=") and second.range not in ("bytes=0-", "")
    assert sum(counted) == len(BIG.file)


def test_an_interrupted_nar_is_read_anew_where_there_are_no_ranges(server: FaultyServer) -> None:
    server.fail("/nar/*", Truncated(2_500_000), times=1)
    server.fail("/nar/*", RangeIgnored())
    assert ask(server.url, nar())[0] == BIG.file
    assert [bool(seen.range) for seen in server.seen] == [False, True, False]


def test_a_line_that_breaks_often_still_gets_on(server: FaultyServer) -> None:
    for _ in range(30):
        server.fail("/nar/*", Truncated(400_000), times=1)
    assert ask(server.url, nar())[0] == BIG.file


def test_a_nar_that_never_gets_on_fails(server: FaultyServer) -> None:
    server.fail("/nar/*", Truncated(1000))
    error = ask_error(server.url, nar())
    assert error.what == "connection closed in the middle of an answer after 3 tries"


def test_a_nar_that_changes_underway_is_not_mixed() -> None:
    other = entry(9, len(BIG.file))

    def answer(request: Request) -> Iterator[bytes]:
        if "range" not in request.headers:
            yield response(BIG.file, ETag='"old"')[:2_500_000]
        elif request.headers.get("if-match") == '"old"':
            yield response(status="412 Precondition Failed")
        else:
            yield response(other.file)

    with RawServer(answer) as server:
        assert "412" in ask_error(server.url, nar()).what


@pytest.mark.parametrize("fault", [WrongRange(), WrongRange(by=-1)])
def test_a_wrong_range_is_refused(server: FaultyServer, fault: WrongRange) -> None:
    server.fail("/nar/*", fault)

    async def body(source: ObjectStoreSource) -> bytes:
        return await source.part(BIG.info, 1000, 2000)

    assert "another range" in ask_error(server.url, body).what


def test_ignored_ranges_are_told_to_the_caller(server: FaultyServer) -> None:
    server.fail("/nar/*", RangeIgnored())

    async def body(source: ObjectStoreSource) -> None:
        with pytest.raises(RangesUnsupportedError):
            await source.part(BIG.info, 1000, 2000)

    ask(server.url, body)


def test_an_interrupted_range_is_tried_again(server: FaultyServer) -> None:
    server.fail("/nar/*", Truncated(100), times=2)

    async def body(source: ObjectStoreSource) -> bytes:
        return await source.part(BIG.info, 1000, 2000)

    assert ask(server.url, body)[0] == BIG.file[1000:3000]


@pytest.mark.parametrize("by", [-1, 1])
def test_a_nar_of_another_length_than_its_narinfo_says_is_refused(server: FaultyServer, by: int) -> None:
    server.fail("/nar/*", WrongLength(by))
    assert "wrong size" in ask_error(server.url, nar(SMALL)).what
    assert server.count() == 1


def test_leaving_a_nar_ends_its_connection() -> None:
    server: RawServer
    gone = threading.Event()

    def answer(request: Request) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nContent-Length: 5000000\r\n\r\n" + BIG.file[:2_000_000]
        try:
            while not server.ended.wait(0.01):
                yield BIG.file[2_000_000:2_000_001]
        finally:
            gone.set()

    async def body(source: ObjectStoreSource) -> bool:
        chunks = source.nar(BIG.info)
        await anext(chunks)
        await chunks.aclose()
        return await asyncio.to_thread(gone.wait, 10)

    with RawServer(answer) as server:
        assert ask(server.url, body)[0]


# --- servers that need the plain client ---------------------------------------------------------------------------


def test_a_nar_without_declared_length_is_read_and_its_end_checked() -> None:
    whole = chunked(BIG.file, 65536)
    tries = iter(range(100))

    def answer(request: Request) -> Iterator[bytes]:
        # The first one only shows that there is no length; the next two are cut.
        yield whole[:-70_000] if next(tries) in (1, 2) else whole

    with RawServer(answer) as lengthless:
        assert ask(lengthless.url, nar())[0] == BIG.file
        assert len(lengthless.seen) == 4


def test_urls_with_a_query_are_asked_as_they_are() -> None:
    dynamic = entry(5, url="nar/5.nar?hash=abc%20d&x=1")

    def answer(request: Request) -> Iterator[bytes]:
        yield response(dynamic.file if request.target == "/base/nar/5.nar?hash=abc%20d&x=1" else b"")

    with RawServer(answer) as server:
        assert ask(f"{server.url}/base", nar(dynamic))[0] == dynamic.file


def test_interrupted_urls_with_a_query_go_on_by_range() -> None:
    dynamic = entry(5, 3_000_000, url="nar/5.nar?hash=abc")

    def answer(request: Request) -> Iterator[bytes]:
        asked = request.headers.get("range")
        if asked is None:
            yield response(dynamic.file)[:2_000_000]
        else:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            span = f"bytes {start}-{len(dynamic.file) - 1}/{len(dynamic.file)}"
            yield response(dynamic.file[start:], "206 Partial Content", Content_Range=span)

    with RawServer(answer) as server:
        assert ask(server.url, nar(dynamic))[0] == dynamic.file
        assert len(server.seen) == 2


def test_absolute_nar_urls_are_followed_without_credentials(server: FaultyServer) -> None:
    def answer(request: Request) -> Iterator[bytes]:
        assert "authorization" not in request.headers
        yield response(SMALL.file)

    with RawServer(answer) as elsewhere:
        away = entry(1, url=f"{elsewhere.url}/files/1.nar")
        secret = server.url.replace("://", "://me:secret@")
        assert ask(secret, nar(away))[0] == SMALL.file
        assert elsewhere.targets == ["/files/1.nar"]


# --- redirects ----------------------------------------------------------------------------------------------------


def redirects(to: Callable[[], str], *, plain: bool) -> Callable[[Request], Iterator[bytes]]:
    """Sends every request on. ``plain``: the first answer makes the source take its plain client."""
    seen: list[str] = []

    def answer(request: Request) -> Iterator[bytes]:
        seen.append(request.target)
        if plain and len(seen) == 1:
            yield chunked(b"")
        else:
            yield response(status="302 Found", Location=to())

    return answer


@pytest.mark.parametrize("plain", [False, True])
def test_redirects_are_followed_but_credentials_stay(
    server: FaultyServer, plain: bool, tmp_path: Path
) -> None:
    with RawServer(lambda request: [response(write_narinfo(SMALL.info))]) as other:
        with RawServer(redirects(lambda: f"{other.url}/x", plain=plain)) as first:
            secret = first.url.replace("://", "://me:secret@")
            assert ask(secret, path_info)[0] == SMALL.info
            assert all("authorization" in request.headers for request in first.seen)
        assert ["authorization" in request.headers for request in other.seen] == [False]


@pytest.mark.parametrize("plain", [False, True])
def test_endless_redirects_are_given_up(plain: bool) -> None:
    with RawServer(redirects(lambda: "/again", plain=plain)) as circle:
        assert "redirects" in ask_error(circle.url, path_info).what
        assert len(circle.seen) <= 13


@pytest.mark.parametrize("plain", [False, True])
def test_redirects_lead_only_to_http(plain: bool) -> None:
    with RawServer(redirects(lambda: "file:///etc/passwd", plain=plain)) as server:
        assert ask_error(server.url, path_info).what


# --- credentials and proxies --------------------------------------------------------------------------------------


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize("lengths", [True, False])
def test_netrc_credentials_are_sent_to_their_host(tmp_path: Path, lengths: bool) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(
        "machine 127.0.0.1 login me password s3cret\nmachine elsewhere login you password other\n"
    )
    text = write_narinfo(SMALL.info)
    with RawServer(lambda request: [response(text) if lengths else chunked(text)]) as server:
        options = SourceOptions(netrc=netrc)
        assert ask(server.url, path_info, options)[0] == SMALL.info
        assert {request.headers.get("authorization") for request in server.seen} == {basic("me", "s3cret")}


def test_credentials_of_the_url_are_sent_and_never_shown(server: FaultyServer) -> None:
    with RawServer(lambda request: [response(status="500 no")]) as refusing:
        url = refusing.url.replace("://", "://me:p%40ss-word@")
        for question in (path_info, listing, nar(), nar(entry(3, url="nar/3.nar?token=hidden"))):
            error = ask_error(url, question)
            assert "word" not in f"{error} {error!r} {error.__cause__} {error.story()}"
            assert "hidden" not in str(error)
        assert {request.headers.get("authorization") for request in refusing.seen} == {
            basic("me", "p@ss-word")
        }
        config = parse_source_url(url)
        assert "word" not in repr(config)
        assert config.url == refusing.url


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"])
@pytest.mark.parametrize("lengths", [True, False])
def test_proxies_of_the_environment_are_used(
    monkeypatch: pytest.MonkeyPatch, variable: str, lengths: bool
) -> None:
    text = write_narinfo(SMALL.info)
    with RawServer(lambda request: [response(text) if lengths else chunked(text)]) as proxy:
        monkeypatch.setenv(variable, proxy.url.replace("://", "://user:word@"))
        assert ask("http://cache.invalid/base", path_info)[0] == SMALL.info
        assert set(proxy.targets) == {f"http://cache.invalid/base/{SMALL.hash_part}.narinfo"}
        assert {r.headers.get("proxy-authorization") for r in proxy.seen} == {basic("user", "word")}
        assert {r.headers.get("host") for r in proxy.seen} == {"cache.invalid"}


@pytest.mark.parametrize("lengths", [True, False])
def test_no_proxy_is_honoured(monkeypatch: pytest.MonkeyPatch, lengths: bool) -> None:
    text = write_narinfo(SMALL.info)
    with (
        RawServer(lambda request: [response(status="500 no")]) as proxy,
        RawServer(lambda request: [response(text) if lengths else chunked(text)]) as server,
    ):
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1,elsewhere")
        assert ask(server.url, path_info)[0] == SMALL.info
        assert not proxy.seen


# --- TLS ----------------------------------------------------------------------------------------------------------


class Authority:
    """A certificate authority of our own, and a server certificate for 127.0.0.1."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.ca_file = directory / "ca.pem"
        now = datetime.datetime.now(datetime.UTC)
        ca_key = ec.generate_private_key(ec.SECP256R1())
        ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        begin, end = now - datetime.timedelta(days=1), now + datetime.timedelta(days=1)
        ca = (
            x509.CertificateBuilder(
                ca_name, ca_name, ca_key.public_key(), x509.random_serial_number(), begin, end
            )
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        self.ca_file.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
        certificate = (
            x509.CertificateBuilder(ca_name, name, key.public_key(), x509.random_serial_number(), begin, end)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
                critical=False,
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
            )
            .add_extension(x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        chain = directory / "server.pem"
        chain.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(chain)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture(params=[True, False], ids=["fast client", "plain client"])
def tls_server(request: pytest.FixtureRequest, authority: Authority) -> Iterator[RawServer]:
    """Serves SMALL's narinfo and NAR."""

    def answer(asked: Request) -> Iterator[bytes]:
        body = write_narinfo(SMALL.info) if asked.target.endswith(".narinfo") else SMALL.file
        yield response(body) if request.param else chunked(body)

    with RawServer(answer, authority.context) as server:
        yield server


def test_a_ca_file_is_trusted(tls_server: RawServer, authority: Authority) -> None:
    options = SourceOptions(ca_file=authority.ca_file)
    assert ask(tls_server.url, path_info, options)[0] == SMALL.info
    assert ask(tls_server.url, nar(SMALL), options)[0] == SMALL.file


def test_nix_ssl_cert_file_is_trusted(
    tls_server: RawServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIX_SSL_CERT_FILE", str(authority.ca_file))
    assert ask(tls_server.url, path_info)[0] == SMALL.info


def test_an_unknown_authority_is_refused_at_once(tls_server: RawServer) -> None:
    for question in (path_info, nar(SMALL), nar(entry(1, url="nar/1.nar?plain"))):
        assert "certificate" in ask_error(tls_server.url, question).what


def test_ssl_cert_file_of_the_process_is_trusted(tls_server: RawServer, authority: Authority) -> None:
    """It is read once per process, by the TLS libraries themselves."""
    script = (
        "import asyncio, sys\n"
        "from veneer.sources.object_store import ObjectStoreSource\n"
        "from veneer.sources.options import parse_source_url\n"
        "source = ObjectStoreSource(parse_source_url(sys.argv[1]))\n"
        "print(asyncio.run(source.path_info(sys.argv[2])).nar_size)\n"
    )
    environment = {**os.environ, "SSL_CERT_FILE": str(authority.ca_file)}
    command = [sys.executable, "-c", script, tls_server.url, SMALL.hash_part]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == f"{SMALL.info.nar_size}\n", done.stderr


def test_https_goes_through_a_proxy_as_a_tunnel(
    tls_server: RawServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raw_http.TunnelProxy(tls_server.port) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        options = SourceOptions(ca_file=authority.ca_file)
        assert ask(tls_server.url, path_info, options)[0] == SMALL.info
        assert {line.rpartition(" ")[0] for line in proxy.asked} == {f"CONNECT 127.0.0.1:{tls_server.port}"}


def test_an_unusable_ca_file_is_told(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    for file in (empty, tmp_path / "absent.pem"):
        with pytest.raises(UsageError) as caught:
            ObjectStoreSource(parse_source_url("https://127.0.0.1"), SourceOptions(ca_file=file))
        assert caught.value.where == str(file)
