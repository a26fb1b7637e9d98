"""The worker protocol: what is sent comes back, cut anywhere; any bytes give events or one documented refusal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.support.worker_client import client_hello, encode_request
from veneer.formats import worker_wire as wire
from veneer.formats.worker_wire import Event, Field, Greeted, Kind, Malformed, Operation, Request, Value

TEXTS = st.binary(max_size=40).map(lambda data: data.decode("utf-8", "surrogateescape"))
VALUES: dict[Kind, st.SearchStrategy[Value]] = {
    Kind.U64: st.integers(0, 2**64 - 1),
    Kind.STRING: TEXTS,
    Kind.STRINGS: st.lists(TEXTS, max_size=5),
    Kind.PAIRS: st.lists(st.tuples(TEXTS, TEXTS), max_size=5),
}
VERSIONS = st.integers(wire.OLDEST, wire.VERSION)


def values(fields: tuple[Field, ...]) -> st.SearchStrategy[tuple[Value, ...]]:
    return st.tuples(*(VALUES[field.kind] for field in fields))


REQUESTS = st.sampled_from(sorted(wire.OPERATIONS)).flatmap(
    lambda number: st.tuples(st.just(wire.OPERATIONS[number]), values(wire.OPERATIONS[number].request))
)


def fed(stream: bytes, sizes: list[int]) -> list[Event]:
    """Every event when the stream comes in pieces of these sizes, over and over."""
    decoder, events, at, turn = wire.RequestDecoder(), [], 0, 0
    while at < len(stream):
        size = sizes[turn % len(sizes)]
        events += decoder.feed(stream[at : at + size])
        at += size
        turn += 1
    return events


def seen(events: list[Event]) -> list[object]:
    """Comparable: errors by their text."""
    return [str(event.error) if isinstance(event, Malformed) else event for event in events]


SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=5)


@given(VERSIONS, st.lists(REQUESTS, max_size=5), SIZES)
def test_requests_come_back_as_they_went_however_they_are_cut(
    version: int, requests: list[tuple[Operation, tuple[Value, ...]]], sizes: list[int]
) -> None:
    requests = [(operation, given) for operation, given in requests if operation.since <= version]
    stream = client_hello(version) + b"".join(encode_request(*request, version) for request in requests)
    events = fed(stream, sizes)
    assert events.count(Greeted(version)) == 1
    assert [event for event in events if isinstance(event, Request)] == [
        Request(
            operation,
            tuple(
                value if field.since <= version else 0
                for field, value in zip(operation.request, given, strict=True)
            ),
        )
        for operation, given in requests
    ]


@given(st.one_of(st.just(b""), VERSIONS.map(client_hello)), st.binary(max_size=300), SIZES)
def test_any_bytes_give_the_same_events_however_they_are_cut(
    begin: bytes, noise: bytes, sizes: list[int]
) -> None:
    whole = wire.RequestDecoder().feed(begin + noise)
    assert seen(fed(begin + noise, sizes)) == seen(whole)
    final = [event for event in whole if isinstance(event, wire.Malformed | wire.Refused | wire.TooOld)]
    assert len(final) <= 1
    if final:
        assert whole[-1] is final[0]


@given(st.text(max_size=100), VERSIONS)
def test_every_message_can_be_said_as_an_error(message: str, version: int) -> None:
    said = wire.error_reply(version, message)
    assert len(said) % 8 == 0
    assert b"is not valid" not in said
