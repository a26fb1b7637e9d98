"""When a session is given the rest of its closures unasked."""

from __future__ import annotations

from veneer.store.access import MIN_PATHS, wants_rest


def test_a_program_that_touches_few_paths_gets_only_those() -> None:
    assert not wants_rest(asked_paths=MIN_PATHS - 1, asked_bytes=100, closure_bytes=100)


def test_a_reader_of_small_parts_of_a_big_closure_gets_only_those() -> None:
    assert not wants_rest(asked_paths=1000, asked_bytes=49, closure_bytes=100)


def test_a_reader_of_most_of_a_closure_gets_the_rest() -> None:
    assert wants_rest(asked_paths=MIN_PATHS, asked_bytes=50, closure_bytes=100)
