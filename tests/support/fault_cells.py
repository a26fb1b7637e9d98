"""The cells of the fault matrix: which fault at which of a path's three objects, and what a reader gets of it when alone."""

from __future__ import annotations

import functools
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import zstandard

from tests.support.faulty_http import (
    Body,
    Drip,
    Encoded,
    Endless,
    Fault,
    FaultyServer,
    Flipped,
    RangeIgnored,
    Raw,
    Reset,
    Stall,
    Status,
    Truncated,
    Unsized,
    WrongLength,
    WrongRange,
)
from tests.support.signed_cache import SignedCache, make_path

VICTIM = make_path("victim", 1_500_001)
BYSTANDER = make_path("bystander")
LATE = 1_300_000
"""A place in the victim's NAR that comes when ``deferred`` readers have had bytes already."""
DATA = VICTIM.nar.index(VICTIM.data)
PADDING = DATA + len(VICTIM.data)

Kind = Literal["narinfo", "ls", "nar"]
Verify = Literal["strict", "deferred"]
Ending = Literal["served", "error", "absent", "reopened"]
Told = Fault | tuple[Fault, int] | Callable[[SignedCache], Fault]


@dataclass(frozen=True)
class Cell:
    """``faults``: one after the other, each for ever or for a number of answers.

    ``alone``: what the reader gets when there is no other source; ``reopened``: an error, then bytes at the next open.
    ``said``: a pattern for the story, "" when nobody has to hear of it. ``silent``: the server costs time.
    """

    kind: Kind
    name: str
    faults: tuple[Told, ...]
    alone: Ending
    said: str
    silent: bool = False
    compression: str = "none"
    sized: bool = True
    heavy: bool = False
    """In one arrangement only."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"

    def break_(self, server: FaultyServer, cache: SignedCache) -> None:
        place = cache.file("victim", self.kind)
        for told in self.faults:
            if isinstance(told, tuple):
                server.fail(place, told[0], told[1])
            elif callable(told):
                server.fail(place, told(cache))
            else:
                server.fail(place, told)
        for fault in self.faults:
            if isinstance(fault, Status) and fault.headers and "Location" in fault.headers:
                server.fail(fault.headers["Location"], fault)  # a circle


def cell(
    alone: Ending,
    kind: Kind,
    name: str,
    said: str,
    *faults: Told,
    silent: bool = False,
    compression: str = "none",
    sized: bool = True,
) -> Cell:
    return Cell(kind, name, faults, alone, said, silent, compression, sized)


error = functools.partial(cell, "error")
"""A narinfo or a NAR that cannot be had: EIO alone."""
served = functools.partial(cell, "served")
"""Alone, too, the reader gets the bytes."""


def everywhere(
    name: str, said: str, fault: Callable[[Kind], Fault], *, silent: bool = False
) -> Iterator[Cell]:
    """At all three: instead of a listing the NAR is read."""
    yield error("narinfo", name, said, fault("narinfo"), silent=silent)
    yield served("ls", name, said, fault("ls"), silent=silent)
    yield error("nar", name, said, fault("nar"), silent=silent)


def loop(kind: Kind) -> Fault:
    return Status(302, {"Location": "/again"})


FAR = "Fri, 31 Dec 2100 23:59:59 GMT"
LATE_AND_OFTEN: list[Told] = [(Truncated(LATE), 1), (Status(500), 2)] * 8
HUGE = VICTIM.nar[: DATA - 8] + (1 << 40).to_bytes(8, "little")
"""How the NAR of an endless file begins."""


def edited(pattern: str, new: str) -> Callable[[SignedCache], Fault]:
    """The victim's narinfo with one part replaced."""

    def fault(cache: SignedCache) -> Fault:
        text, count = re.subn(
            pattern, new, cache.body("victim", "narinfo").decode(), count=1, flags=re.MULTILINE
        )
        assert count
        return Body(text.encode())

    return fault


def listing_with(old: bytes, new: bytes) -> Callable[[SignedCache], Fault]:
    """The victim's listing with one part replaced by another of the same length."""

    def fault(cache: SignedCache) -> Fault:
        text = cache.body("victim", "ls")
        assert old in text and len(old) == len(new)
        return Body(text.replace(old, new))

    return fault


@functools.cache
def bomb(packer: str, size: int, start: bytes = b"") -> bytes:
    """``start`` and ``size`` zeros, packed."""
    data = start + bytes(size)
    return (
        zstandard.ZstdCompressor(level=1).compress(data)
        if packer == "zstd"
        else lzma.compress(data, preset=0)
    )


CUT = "closed in the middle|connection failed"
GONE = "reset|closed|failed|not HTTP|cut|Disconnected"
SLOW = "no data|no answer|per second|no whole"
BROKEN = [
    *everywhere("reset at once", GONE, lambda kind: Reset()),
    *everywhere("reset in the body", GONE, lambda kind: Reset(20)),
    *everywhere("cut body", CUT, lambda kind: Truncated(20)),
    *everywhere("hung up", GONE, lambda kind: Raw(b"", hang_up=True)),
    *everywhere("cut headers", GONE, lambda kind: Raw(b"HTTP/1.1 200 OK\r\nCont", hang_up=True)),
    *everywhere("length too large", f"{CUT}|wrong size", lambda kind: WrongLength(5)),
    *everywhere("not HTTP", "not HTTP", lambda kind: Raw(b"220 mail ESMTP\r\n", hang_up=True)),
    *everywhere("500", "HTTP status 500 after 2 tries", lambda kind: Status(500)),
    *everywhere("502", "HTTP status 502 after 2 tries", lambda kind: Status(502)),
    *everywhere("503 for an hour", "HTTP status 503", lambda kind: Status(503, {"Retry-After": "3600"})),
    *everywhere("503 until a date", "HTTP status 503", lambda kind: Status(503, {"Retry-After": FAR})),
    *everywhere("429 for ever", "HTTP status 429", lambda kind: Status(429, {"Retry-After": "1"})),
    *everywhere("401", "HTTP status 401", lambda kind: Status(401)),
    *everywhere("redirect loop", "redirects", loop),
    *everywhere("redirect to a file", ".", lambda kind: Status(302, {"Location": "file:///etc/passwd"})),
    *everywhere("endless, chunked", "too long|wrong size|not a NAR", lambda kind: Endless()),
    *everywhere("endless, declared", "too long|wrong size", lambda kind: Endless(1 << 62)),
    *everywhere("empty", "narinfo|listing|wrong size", lambda kind: Body(b"")),
    *everywhere("a web page", "narinfo|listing|wrong size", lambda kind: Body(b"<!DOCTYPE html><p>Log in")),
]
BROKEN = [replace(case, heavy=True) if str(case) == "ls: endless, chunked" else case for case in BROKEN]
SILENT = [
    *everywhere("silence", SLOW, lambda kind: Stall(), silent=True),
    *everywhere("stall in headers", SLOW, lambda kind: Raw(b"HTTP/1.1 200 OK\r\nCont"), silent=True),
    *everywhere("stall in body", SLOW, lambda kind: Stall(20), silent=True),
    *everywhere("headers byte by byte", SLOW, lambda kind: Drip(headers=True), silent=True),
    *everywhere("body byte by byte", SLOW, lambda kind: Drip(), silent=True),
]
DENIED = [
    made
    for status in (403, 404, 410)
    for made in (
        cell("absent", "narinfo", f"{status}", "", Status(status)),
        served("ls", f"{status}", "", Status(status)),
        error("nar", f"{status}", f"HTTP status {status}", Status(status)),
    )
]
NARINFOS = [
    error("narinfo", "first byte", "narinfo", Flipped(0)),
    error("narinfo", "last byte", "narinfo", Flipped(-2)),
    error("narinfo", "length too small", "narinfo|no valid signature", WrongLength(-5)),
    error("narinfo", "cut without a length", "narinfo", Unsized(20)),
    error("narinfo", "signature", "no valid signature", edited("Sig: made-1:.", "Sig: made-1:_")),
    error("narinfo", "other signature", "no valid signature", edited("Sig: made-1:....", "Sig: made-1:abcd")),
    error("narinfo", "no signature", "no valid signature", edited("Sig: .*\n", "")),
    error("narinfo", "NAR hash", "no valid signature", edited("(NarHash: sha256:.)..", r"\g<1>00")),
    error("narinfo", "NAR size", "no valid signature|narinfo", edited(r"NarSize: \d", "NarSize: 9")),
    error(
        "narinfo",
        "references",
        "no valid signature",
        edited("References:.*", f"References: {BYSTANDER.path}"),
    ),
    error("narinfo", "file size", "wrong size", edited(r"FileSize: \d", "FileSize: 3")),
    error("narinfo", "URL", "HTTP status 404", edited("URL: nar/.", "URL: nar/!")),
    error("narinfo", "URL upwards", "URL", edited("URL: nar/", "URL: ../nar/")),
    error("narinfo", "URL elsewhere", "points outside its cache", edited("URL: nar/", "URL: file:///etc/")),
    error(
        "narinfo",
        "URL of another path",
        "wrong size",
        edited("URL: .*", f"URL: nar/{BYSTANDER.path.hash_part}.nar"),
    ),
    error("narinfo", "compression", "zstd", edited("Compression: none", "Compression: zstd")),
    error("narinfo", "unknown compression", "compression", edited("Compression: none", "Compression: nope")),
    error(
        "narinfo", "another path's", "another path", lambda cache: Body(cache.body("bystander", "narinfo"))
    ),
    error("narinfo", "zstd bomb", "narinfo", lambda cache: Body(bomb("zstd", 64 << 20))),
    error("narinfo", "xz bomb", "narinfo", lambda cache: Body(bomb("xz", 16 << 20))),
    cell("absent", "narinfo", "another name", "", edited(r"(StorePath: \S*)m$", r"\1n")),
    served("narinfo", "wrong encoding header", "", Encoded("identity")),
]
LISTINGS = [
    served("ls", "first byte", "listing|ls", Flipped(0)),
    served("ls", "length too small", "listing|ls", WrongLength(-5)),
    served("ls", "cut without a length", "listing|ls", Unsized(20)),
    served("ls", "another path's", "listing", lambda cache: Body(cache.body("bystander", "ls"))),
    replace(served("ls", "zstd bomb", "ls", lambda cache: Body(bomb("zstd", 300 << 20))), heavy=True),
    replace(served("ls", "xz bomb", "listing", lambda cache: Body(bomb("xz", 16 << 20))), heavy=True),
    served(
        "ls",
        "depth bomb",
        "ls|listing",
        Body(b'{"version":1,"root":' + b'{"type":"directory","entries":{"a":' * 100_000),
    ),
    cell("reopened", "ls", "a name that is another", "listing", listing_with(b'"data":', b'"dat4":')),
    cell(
        "reopened",
        "ls",
        "a link that leads elsewhere",
        "listing",
        listing_with(b'"target":"data"', b'"target":"/etc"'),
    ),
]
NARS = [
    error("nar", "flipped header", "NAR of", Flipped(9)),
    error("nar", "flipped size of a file", "NAR of", Flipped(DATA - 8)),
    error("nar", "flipped content", "NAR of", Flipped(DATA + 5)),
    error("nar", "flipped late content", "NAR of", Flipped(LATE)),
    error("nar", "flipped padding", "NAR of", Flipped(PADDING)),
    error("nar", "flipped tail", "NAR of", Flipped(-1)),
    error("nar", "flipped in zstd", "NAR of", Flipped(LATE), compression="zstd"),
    error("nar", "flipped end of zstd", "NAR of", Flipped(-1), compression="zstd"),
    error("nar", "flipped in xz", "NAR of", Flipped(LATE), compression="xz"),
    error("nar", "flipped end of xz", "NAR of", Flipped(-1), compression="xz"),
    error("nar", "too short", "wrong size", Body(VICTIM.nar[:-9])),
    error("nar", "too long", "wrong size", Body(VICTIM.nar + b"x")),
    error("nar", "length too small", "wrong size", WrongLength(-5)),
    error("nar", "another of this size", "NAR of", Body(bytes(len(VICTIM.nar)))),
    error(
        "nar",
        "zstd bomb",
        "longer than its signed",
        lambda cache: Body(bomb("zstd", 64 << 20, HUGE)),
        compression="zstd",
        sized=False,
    ),
    error(
        "nar",
        "xz bomb",
        "longer than its signed",
        lambda cache: Body(bomb("xz", 64 << 20, HUGE)),
        compression="xz",
        sized=False,
    ),
    error(
        "nar",
        "zstd with garbage behind",
        "NAR of",
        lambda cache: Body(cache.body("victim", "nar") + b"x"),
        compression="zstd",
        sized=False,
    ),
    error(
        "nar",
        "cut zstd of unknown size",
        "ended early",
        lambda cache: Body(cache.body("victim", "nar")[:LATE]),
        compression="zstd",
        sized=False,
    ),
    error("nar", "endless of unknown size", "wrong size|NAR of", Endless(), compression="zstd", sized=False),
    served("nar", "without a length", "", Unsized()),
    served("nar", "cut without a length", "", Unsized(LATE)),
    served("nar", "cut late, then resumed", "", (Truncated(LATE), 1)),
    served("nar", "reset late, then resumed", "", (Reset(LATE), 1)),
    served("nar", "stalled late, then resumed", "", (Stall(LATE), 1), silent=True),
    served("nar", "resumed without ranges", "", (Truncated(LATE), 1), RangeIgnored()),
    error("nar", "resumed with another range", "another range", (Truncated(LATE), 1), WrongRange()),
    error("nar", "resumed with another range, hidden", ".", (Truncated(LATE), 1), WrongRange(hidden=True)),
    error("nar", "resumed and gone", "HTTP status 404", (Truncated(LATE), 1), Status(404)),
    error("nar", "resumed and refused a range", ".", (Truncated(LATE), 1), Status(416)),
    error("nar", "late failure each time", "HTTP status 500", *LATE_AND_OFTEN),
    served("nar", "wrong encoding header", "", Encoded("identity")),
]
ENCODED = [
    served("narinfo", "called gzip", "", Encoded("gzip")),
    served("ls", "called gzip", "", Encoded("gzip")),
    served("nar", "called gzip", "", Encoded("gzip")),
]

CELLS = [*BROKEN, *SILENT, *DENIED, *NARINFOS, *LISTINGS, *NARS, *ENCODED]
