"""When a failed question is asked again."""

from __future__ import annotations

import pytest

from veneer.sources.options import SourceOptions
from veneer.sources.retry import Retry
from veneer.sources.transport import Fault, TransferError, status_error

RETRY = Retry(SourceOptions(tries=5, backoff_seconds=1, most_backoff_seconds=6), vary=lambda: 0.5)
PASSING = TransferError(Fault.PASSING, "reset")


def test_only_passing_failures_are_tried_again_and_not_for_ever() -> None:
    assert [RETRY.is_over(PASSING, tried) for tried in (1, 4, 5)] == [False, False, True]
    for fault in Fault:
        assert RETRY.is_over(TransferError(fault, ""), 1) == (fault is not Fault.PASSING)


def test_backoff_doubles_up_to_a_limit_and_varies_by_half() -> None:
    assert [RETRY.delay(PASSING, tried) for tried in (1, 2, 3, 4)] == [1, 2, 4, 6]
    for vary, delay in ((lambda: 0.0, 0.5), (lambda: 1.0, 1.5)):
        assert Retry(RETRY.options, vary=vary).delay(PASSING, 1) == delay


def test_retry_after_is_honoured_within_the_limit() -> None:
    assert RETRY.delay(status_error(503, 5.0), 1) == 5
    assert not RETRY.is_over(status_error(503, 6.0), 1)
    assert RETRY.is_over(status_error(503, 7.0), 1)


@pytest.mark.parametrize(
    ("status", "fault"),
    [
        (400, Fault.FATAL),
        (401, Fault.FATAL),
        (403, Fault.MISSING),
        (404, Fault.MISSING),
        (408, Fault.PASSING),
        (410, Fault.MISSING),
        (412, Fault.CHANGED),
        (416, Fault.FATAL),
        (429, Fault.PASSING),
        (500, Fault.PASSING),
        (503, Fault.PASSING),
        (504, Fault.PASSING),
    ],
)
def test_what_a_status_means(status: int, fault: Fault) -> None:
    assert status_error(status).fault is fault
