"""Tasks that may end without anybody who waits for them."""

from __future__ import annotations

import asyncio
from typing import Any

from .errors import VeneerError


def is_cancelled() -> bool:
    """Whether the CancelledError that was just caught is this task's own, and not of a shared one that it waited for.

    The latter is a failure like others: whoever asked has to be told.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def tell_bugs(task: asyncio.Task[Any], *expected: type[Exception]) -> None:
    """Done-callback: a VeneerError (or ``expected``) is whoever waits's affair, and of nobody when nobody does.

    Anything else is a bug and goes to the event loop's exception handler now, whether somebody waits or not: asyncio itself
    would say it only when nobody ever looked, and when the task is collected.
    """
    if task.cancelled():
        return
    error = task.exception()
    if error is not None and not isinstance(error, (VeneerError, *expected)):
        task.get_loop().call_exception_handler(
            {"message": f"unexpected failure: {task.get_name()}", "exception": error, "task": task}
        )
