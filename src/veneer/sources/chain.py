"""Several sources as one order of preference, with fail-over.

Order: priority (lower first), then position in the configuration. As in Nix a cache's own priority counts when its URL
gives none; it is learnt before the first question when there is more than one source to choose from, for at most
``learn_seconds``: a source that has not answered by then has the default priority until it does.

A source that fails rests for ``rest_seconds``, so that one dead server does not cost every question its time limits.
Meanwhile it counts as failed, not as "has none". After the rest one question tries it again while the others still pass it
over; if that goes well it is back for all. Malformed answers are failures of one path and put nobody to rest.

The chain remembers no answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from veneer.model.errors import FormatError, SourceError
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.tasks import tell_bugs

from .base import Meter, Source, unmetered

REST_SECONDS = 5.0
LEARN_SECONDS = 5.0


class RestingError(SourceError):
    """A source was passed over while it rests, and somebody was told before of the failure that it rests after."""


class SourceChain:
    """Sources in order. One event loop. ``clock``: seconds that only grow; on it the rests are measured."""

    def __init__(
        self,
        sources: Iterable[Source],
        *,
        clock: Callable[[], float],
        rest_seconds: float = REST_SECONDS,
        learn_seconds: float = LEARN_SECONDS,
    ) -> None:
        self._given = tuple(sources)
        self._clock = clock
        self._rest_seconds = rest_seconds
        self._learn_seconds = learn_seconds
        self._rests: dict[Source, tuple[float, SourceError]] = {}
        """Until when a source rests, and why."""
        self._untold: set[Source] = set()
        """Sources that rest after a failure which nobody has heard of yet."""
        self._learning: dict[Source, asyncio.Task[None]] = {}
        self._learnt: asyncio.Task[None] | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        """In order, as far as it is known."""
        return tuple(sorted(self._given, key=lambda source: source.priority))

    def resting(self) -> dict[str, str]:
        """URL and story of each source that rests now, for people."""
        now = self._clock()
        return {source.url: error.story() for source, (until, error) in self._rests.items() if until > now}

    def path_infos(self, hash_part: str, meter: Meter = unmetered) -> PathInfos:
        """Who has ``hash_part``: asked one after the other, as far as the iteration goes."""
        return PathInfos(self, hash_part, meter)

    async def close(self) -> None:
        """Close all sources; the first failure is raised when all are closed."""
        tasks = [*self._learning.values(), *([self._learnt] if self._learnt is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        results = await asyncio.gather(*(source.close() for source in self._given), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _learn(self) -> None:
        """Let the order be known, as far as that can be had in time."""
        if len(self._given) < 2:
            return
        if self._learnt is None:
            for source in self._given:
                task = asyncio.create_task(self._learn_one(source), name=f"priority of {source.url}")
                task.add_done_callback(tell_bugs)
                self._learning[source] = task
            self._learnt = asyncio.create_task(self._wait_for_order())
        if not self._learnt.done():
            await asyncio.shield(self._learnt)

    async def _wait_for_order(self) -> None:
        await asyncio.wait(self._learning.values(), timeout=self._learn_seconds)

    async def _learn_one(self, source: Source) -> None:
        """Afterwards the source's ``priority`` is its own, or the source rests, or its answer was of no use."""
        try:
            await source.nix_cache_info()
        except SourceError as error:
            self._rest(source, error)
            self._untold.add(source)
        except FormatError:
            return  # asked for path infos it will say so again, and then somebody hears it

    def _rest(self, source: Source, error: SourceError) -> None:
        self._rests[source] = (self._clock() + self._rest_seconds, error)

    async def _ask(self, source: Source, hash_part: str, meter: Meter) -> UnverifiedPathInfo | None:
        """One source's answer. SourceError also when it rests."""
        rest = self._rests.get(source)
        if rest is not None:
            until, error = rest
            if until > self._clock():
                kind = SourceError if source in self._untold else RestingError
                self._untold.discard(source)
                raise kind(f"resting after a failure: {error.what}", where=error.where, hint=error.hint)
            self._rest(source, error)  # the others wait for the outcome of this one
        try:
            info = await source.path_info(hash_part, meter)
        except SourceError as error:
            self._rest(source, error)
            raise
        except FormatError:
            self._rests.pop(source, None)  # it answered
            raise
        except asyncio.CancelledError:
            if rest is not None:
                self._rests[source] = (self._clock(), rest[1])  # no outcome: the next one may try
            raise
        self._rests.pop(source, None)
        return info


class PathInfos:
    """One question to a chain: an async iterator of (source, what it says). May be left at any time."""

    def __init__(self, chain: SourceChain, hash_part: str, meter: Meter) -> None:
        self._chain = chain
        self._hash_part = hash_part
        self._meter = meter
        self._left: list[Source] | None = None
        self.failures: list[Exception] = []
        """SourceError or FormatError of each source asked so far that gave no answer: with any of them in it, an empty
        iteration does not mean that nobody has the path."""

    def __aiter__(self) -> PathInfos:
        return self

    async def __anext__(self) -> tuple[Source, UnverifiedPathInfo]:
        if self._left is None:
            await self._chain._learn()
            self._left = list(reversed(self._chain.sources))
        while self._left:
            source = self._left.pop()
            try:
                info = await self._chain._ask(source, self._hash_part, self._meter)
            except (SourceError, FormatError) as error:
                self.failures.append(error)
                continue
            if info is not None:
                return source, info
        raise StopAsyncIteration
