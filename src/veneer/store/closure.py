"""The closure of store paths: everything they refer to, asked in parallel, each once ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from veneer.model.path_info import PathInfo
from veneer.model.store_path import StorePath

from .account import Account
from .resolve import Resolver
from .views import View

PARALLEL_REQUESTS = 64


async def resolve_closure(
    resolver: Resolver,
    view: View,
    roots: Iterable[StorePath],
    account: Account,
    *,
    parallel: int = PARALLEL_REQUESTS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[StorePath, PathInfo]:
    """Path info of ``roots`` and all that they refer to, in the order of discovery.

    At most ``parallel`` questions are open at once. ``progress`` is told (paths resolved, paths known). The first failure
    cancels the rest and is raised: a closure with a hole is no closure.
    """
    found: dict[StorePath, PathInfo] = {}
    queue: asyncio.Queue[StorePath | None] = asyncio.Queue()
    seen = dict.fromkeys(roots)
    for root in seen:
        queue.put_nowait(root)

    async def worker() -> None:
        while (path := await queue.get()) is not None:
            await resolver.bundled(view, path)
            info = await resolver.path_info(view, path, account)
            found[path] = info
            for reference in info.info.references:
                if reference not in seen:
                    seen[reference] = None
                    queue.put_nowait(reference)
            if progress is not None:
                progress(len(found), len(seen))
            if len(found) == len(seen):
                for _ in range(parallel):
                    queue.put_nowait(None)

    if not seen:
        return found
    for root in seen:
        resolver.want_closure(view, root, account)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(parallel):
                group.create_task(worker())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return found
