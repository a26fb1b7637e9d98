"""The worker protocol's bytes: against what real Nix sends, and refused before they cost anything."""

from __future__ import annotations

import struct

import pytest

from tests.support.worker_client import client_hello, encode_request
from veneer.formats import worker_wire as wire
from veneer.formats.worker_wire import (
    Event,
    Features,
    Greeted,
    Hello,
    Malformed,
    Refused,
    Request,
    RequestDecoder,
    TooOld,
)
from veneer.model.errors import FormatError, LimitError

PATH = "/nix/store/013gljz5pd7s826qp7lm2k0vbmbdhg0p-text.txt"

FROM_NIX_2_26 = (
    "63 78 69 6e 00 00 00 00  26 01 00 00 00 00 00 00"  # magic, 1.38
    "00 00 00 00 00 00 00 00"  # no features
    "00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00"  # affinity, reserve space
)


def integers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def greeted(version: int = wire.VERSION) -> RequestDecoder:
    decoder = RequestDecoder()
    assert decoder.feed(client_hello(version))[-1] == Greeted(version)
    return decoder


def refusal(events: list[Event]) -> FormatError:
    assert isinstance(events[-1], Malformed)
    return events[-1].error


def test_a_current_client_introduces_itself_as_nix_does() -> None:
    data = bytes.fromhex(FROM_NIX_2_26)
    assert data == client_hello()
    assert RequestDecoder().feed(data) == [Hello(), Features(()), Greeted(0x126)]


def test_an_older_client_gets_its_answer_before_it_tells_its_version() -> None:
    decoder = RequestDecoder()
    assert decoder.feed(integers(wire.CLIENT_MAGIC)) == [Hello()]
    assert decoder.feed(integers(0x122, 0, 0)) == [Greeted(0x122)]
    assert decoder.version == 0x122


def test_a_newer_client_is_spoken_to_in_our_version() -> None:
    assert RequestDecoder().feed(client_hello(0x130))[-1] == Greeted(0x126)


def test_the_affinity_of_old_clients_is_skipped() -> None:
    decoder = RequestDecoder()
    assert decoder.feed(integers(wire.CLIENT_MAGIC, 0x115, 1, 7, 0))[-1] == Greeted(0x115)


@pytest.mark.parametrize("version", [0x10A, 0x114])
def test_a_client_before_nix_2_3_is_told_so(version: int) -> None:
    assert RequestDecoder().feed(integers(wire.CLIENT_MAGIC, version)) == [Hello(), TooOld(version)]


def test_another_protocol_is_refused_at_its_first_word() -> None:
    assert "does not speak" in str(refusal(RequestDecoder().feed(b"GET / HTTP/1.1\r\n")))
    assert "2.0" in str(refusal(RequestDecoder().feed(integers(wire.CLIENT_MAGIC, 0x200))))


def test_the_server_says_what_each_version_can_read() -> None:
    assert wire.server_hello() == integers(0x6478696F, 0x126)
    assert wire.greeting(0x120, "veneer", trusted=False) == integers(wire.LAST)
    assert wire.greeting(0x121, "veneer", trusted=False) == integers(6) + b"veneer\0\0" + integers(wire.LAST)
    assert wire.greeting(0x123, "", trusted=False) == integers(0, 2, wire.LAST)
    assert wire.greeting(0x123, "", trusted=True) == integers(0, 1, wire.LAST)
    assert wire.features() == integers(0)


def test_a_field_that_a_version_does_not_have_reads_as_zero() -> None:
    for version, substitute in ((0x11A, 0), (0x11B, 1)):
        data = encode_request(wire.QUERY_VALID_PATHS, ([PATH], 1), version)
        assert len(data) == 8 + 8 + 8 + 56 + (8 if version >= 0x11B else 0)
        assert greeted(version).feed(data) == [Request(wire.QUERY_VALID_PATHS, ([PATH], substitute))]


def test_options_of_nix_are_read_whole() -> None:
    options = [*range(12), [("cores", "2"), ("substituters", "")]]
    data = encode_request(wire.SET_OPTIONS, options, wire.VERSION)
    decoder = greeted()
    assert decoder.feed(data) == [Request(wire.SET_OPTIONS, tuple(options))]
    assert decoder.feed(encode_request(wire.IS_VALID_PATH, (PATH,), wire.VERSION)) == [
        Request(wire.IS_VALID_PATH, (PATH,))
    ]


def test_an_operation_of_a_later_version_is_refused() -> None:
    assert greeted(0x11A).feed(integers(43)) == [Refused(43)]


@pytest.mark.parametrize("number", [*wire.REFUSED_NAMES, 0, 48, 2**64 - 1])
def test_what_would_change_the_store_is_refused_and_nothing_after_it_is_read(number: int) -> None:
    decoder = greeted()
    assert decoder.feed(integers(number) + encode_request(wire.IS_VALID_PATH, (PATH,), wire.VERSION)) == [
        Refused(number)
    ]
    assert decoder.feed(bytes(1 << 20)) == []
    assert decoder.held == 0


def test_no_operation_is_both_served_and_refused() -> None:
    assert not wire.OPERATIONS.keys() & wire.REFUSED_NAMES.keys()
    assert {number: row.number for number, row in wire.OPERATIONS.items()} == {n: n for n in wire.OPERATIONS}


@pytest.mark.parametrize(
    "body",
    [
        integers(1, wire.MAX_STRING + 1),
        integers(1, 2**64 - 1),
        integers(31, wire.MAX_ITEMS + 1),
        integers(19, *range(12), wire.MAX_ITEMS + 1),
    ],
)
def test_announced_sizes_over_the_limit_are_refused_before_the_body_comes(body: bytes) -> None:
    assert isinstance(refusal(greeted().feed(body)), LimitError)


def test_a_request_of_many_long_strings_is_refused_when_it_announces_too_much() -> None:
    decoder = greeted()
    decoder.feed(integers(31, wire.MAX_ITEMS))
    string = integers(wire.MAX_STRING) + bytes(wire.MAX_STRING)
    events: list[Event] = []
    for sent in range(wire.MAX_REQUEST // wire.MAX_STRING + 1):
        events = decoder.feed(string)
        if events:
            break
        assert decoder.held <= wire.MAX_REQUEST + sent
    assert isinstance(refusal(events), LimitError)
    assert decoder.held == 0


def test_padding_that_hides_bytes_is_refused() -> None:
    assert "padding" in str(refusal(greeted().feed(integers(1, 3) + b"abc\0\0\0\0\1")))


def test_errors_are_written_as_the_version_reads_them() -> None:
    text = integers(2) + b"no" + bytes(6)
    error = integers(5) + b"Error\0\0\0"
    assert wire.error_reply(0x119, "no") == integers(wire.ERROR) + text + integers(1)
    assert wire.error_reply(0x11A, "no") == (
        integers(wire.ERROR) + error + integers(0) + error + text + integers(0, 0)
    )


def test_an_error_never_says_the_words_that_nix_takes_for_absence() -> None:
    for version in (0x115, 0x126):
        assert b"is not valid" not in wire.error_reply(version, "the key is not valid, is not valid")


def test_an_endless_message_is_cut() -> None:
    assert len(wire.error_reply(wire.VERSION, "x" * 10_000_000)) < wire.MAX_STRING
