"""The short run of the fuzz targets: seeds, inputs kept from long runs, and what Hypothesis makes of both.

The long run, guided by coverage, is ``./dev fuzz``.
"""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, kept, survives
from veneer.formats import listing
from veneer.formats.nar import Layout

SECONDS_FOR_ALL = 30
"""For the stored inputs of one target, some dozens of less than a kibibyte: a thousand times what they need."""


@st.composite
def changed(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed with some pieces replaced, repeated or cut out, at the places where formats have their joints."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 16)))
        piece = draw(
            st.binary(max_size=12)
            | st.sampled_from([b"\n", b":", b'"', b"{", b"}", b",", b"\0" * 8, b"\xff" * 8, b"-1", b"9" * 20])
            | st.just(bytes(data[start:end]) * 2)
        )
        data[start:end] = piece
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_accepted(name: str) -> None:
    target = TARGETS[name]
    assert target.seed_bytes()
    for seed in target.seed_bytes():
        assert survives(target, seed), seed


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_of_long_runs_are_accepted_or_refused_in_time(name: str) -> None:
    assert kept(name), "none stored: ./dev fuzz --keep"
    start = time.monotonic()
    verdicts = [survives(TARGETS[name], data) for data in kept(name)]
    assert time.monotonic() - start < SECONDS_FOR_ALL
    assert verdicts


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_input_is_accepted_or_refused(name: str, data: st.DataObject) -> None:
    target = TARGETS[name]
    survives(target, data.draw(st.binary(max_size=200) | changed(target.seed_bytes())))


def test_listings_that_both_readers_know_are_equal() -> None:
    for seed in TARGETS["listing"].seed_bytes():
        tree = listing.parse_listing(seed, nar_size=None)
        deep = listing._tree(listing._decode_deep(seed), Layout())
        assert deep == tree
