"""What several mount servers tell is added up, whatever was cut off when one was killed."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from veneer.environment.figures import Figures, Words, last_word


def row(size: int, name: str = "a", first: float | None = 1.0) -> dict[str, Any]:
    return {
        "name": name,
        "first_touch": first,
        "reads": 1,
        "bytes_read": size,
        "waits": 0,
        "wait_seconds": 0.0,
    }


def report(paths: dict[int, Any], failures: int = 0) -> dict[str, Any]:
    return {"paths": paths, "failures": ["x"] * failures, "failure_count": failures, "waiting": 0}


def fed(data: bytes) -> Figures:
    figures = Figures()
    figures.feed(data)
    return figures


def test_a_later_word_of_a_server_replaces_its_earlier_ones() -> None:
    words = Words(1)
    data = words.news(report({1: row(5)})) + words.news(report({1: row(9), 2: row(1)}))
    assert fed(data).report()["paths"] == {"1": row(9), "2": row(1)}


def test_only_what_has_changed_is_told() -> None:
    words = Words(1)
    words.news(report({1: row(5), 2: row(6)}))
    assert words.news(report({1: row(5), 2: row(6)})) == b""
    assert b'"1"' not in words.news(report({1: row(5), 2: row(7)}))


def test_servers_are_added_up_and_a_name_known_to_one_is_kept() -> None:
    data = Words(1).news(report({1: row(5, first=2.0)}, 1)) + last_word(2, report({1: row(7, "", None)}, 2))
    found = fed(data).report()
    assert found["paths"]["1"] == row(12, "a", 2.0) | {"reads": 2}
    assert (found["failure_count"], len(found["failures"])) == (3, 3)


def test_a_word_cut_off_by_a_kill_costs_itself_only() -> None:
    whole, cut = Words(1).news(report({1: row(5)})), Words(1).news(report({1: row(6)}))
    for at in range(len(cut)):
        figures = fed(whole + cut[:at] + last_word(2, report({1: row(7)})))
        assert figures.report()["paths"]["1"]["bytes_read"] in (12, 13)
        assert figures.ended


def test_without_a_last_word_it_is_known_that_some_is_missing() -> None:
    assert not fed(Words(1).news(report({1: row(5)}))).ended
    assert fed(b"").ended


@given(st.lists(st.integers(1, 40)))
def test_pieces_do_not_matter(sizes: list[int]) -> None:
    data = Words(1).news(report({1: row(5)})) + last_word(2, report({1: row(7)}))
    figures, at = Figures(), 0
    for size in [*sizes, len(data)]:
        figures.feed(data[at : at + size])
        at += size
    assert figures.report() == fed(data).report()
