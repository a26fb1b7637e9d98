"""When a session is given more of its closures than it asked for."""

from __future__ import annotations

from veneer.store.access import AHEAD, MIN_PATHS, MIN_SCANNED, Evidence, allowance

BIG = 1_000_000


def asked(paths: int, size: int, closure: int) -> Evidence:
    return Evidence(paths, size, 0, 0, closure)


def test_a_program_that_touches_few_paths_gets_only_those() -> None:
    assert allowance(asked(MIN_PATHS - 1, 100, 100)) == 0


def test_a_reader_of_small_parts_of_a_big_closure_gets_only_those() -> None:
    assert allowance(asked(1000, 49, 100)) == 0


def test_a_reader_of_most_of_a_closure_gets_the_rest() -> None:
    assert allowance(asked(MIN_PATHS, 50, 100)) == 100


def test_a_scan_gets_in_proportion_to_what_it_has_read() -> None:
    scan = Evidence(MIN_SCANNED, 500, MIN_SCANNED, 500, BIG)
    assert allowance(scan) == AHEAD * 500


def test_a_few_paths_read_whole_are_no_scan() -> None:
    assert allowance(Evidence(MIN_SCANNED - 1, 500, MIN_SCANNED - 1, 500, BIG)) == 0


def test_whole_reads_of_small_paths_beside_parts_of_big_ones_are_no_scan() -> None:
    assert allowance(Evidence(MIN_SCANNED + 2, 10_000, MIN_SCANNED, 600, BIG)) == 0


def test_a_scan_that_got_half_of_a_closure_gets_all_of_it() -> None:
    size = BIG // (2 * AHEAD) + 1
    assert allowance(Evidence(MIN_SCANNED, size, MIN_SCANNED, size, BIG)) == BIG
