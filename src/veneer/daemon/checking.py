"""The check of the whole cache beside everything else that a daemon does: files are read in a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from veneer.cache.checking import Finding, Notices, check
from veneer.model.errors import CacheError
from veneer.model.tasks import tell_bugs
from veneer.store.store import Store

from .sessions import Sessions

PROGRESS_SECONDS = 0.25


class _StoppedError(Exception):
    """Ends the reading thread of a check that nobody waits for any more."""


async def run_check(
    store: Store,
    sessions: Sessions,
    clock: Callable[[], float],
    *,
    drop: bool,
    progress: Callable[[dict[str, object]], None],
) -> dict[str, object]:
    """The report's document. Mount servers are told of what goes, ``status`` has a story of each. CacheError."""
    cache = store.cache
    stopped = False
    done = 0

    def read(size: int) -> None:  # reading thread
        nonlocal done
        if stopped:
            raise _StoppedError
        done += size

    def tell(finding: Finding) -> None:
        what = f"{finding.kind}: {finding.fault}"
        text = f"{what}, {finding.reason}" if finding.reason else what
        store.stories.add(str(finding.store_path), CacheError(f"dropped, {text}", where=finding.name))

    def dropped(finding: Finding) -> None:
        tell(finding)
        if finding.kind != "tree":
            store.parts.forget(finding.number)
            sessions.dropped(finding.number)

    def condemned(finding: Finding) -> None:
        tell(finding)
        assert finding.store_path is not None
        store.parts.forget(finding.number)
        sessions.condemned(finding.number, finding.store_path)

    steps = check(
        cache.root,
        cache.index,
        drop=drop,
        clock=clock,
        busy=lambda: store.busy,
        read=read,
        notices=Notices(dropped, condemned),
    )
    totals = cache.index.totals()
    result: Any = None
    try:
        while True:
            try:
                work = steps.send(result)
            except StopIteration as end:
                document: dict[str, object] = end.value.document()
                return document
            working = asyncio.create_task(asyncio.to_thread(work), name="check of the cache")
            working.add_done_callback(lambda task: tell_bugs(task, _StoppedError))
            while not (await asyncio.wait({working}, timeout=PROGRESS_SECONDS))[0]:
                progress({"bytes_done": done, "bytes": totals.nar_bytes + totals.tree_bytes})
            result = working.result()
    finally:
        stopped = True
