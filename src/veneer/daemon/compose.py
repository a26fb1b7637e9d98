"""The only place that builds the daemon's object graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from veneer.cache.cache import Cache
from veneer.sources.base import Source
from veneer.sources.chain import SourceChain
from veneer.sources.opening import Tell, open_source, unheard
from veneer.sources.options import SourceOptions, parse_source_url
from veneer.sources.pace import Paces
from veneer.sources.store_directory import is_trusted
from veneer.store.closure import PARALLEL_REQUESTS
from veneer.store.remembered import RememberedSource
from veneer.store.store import Limits, Notices, Store
from veneer.store.views import View, ViewConfig, open_view

Clock = Callable[[], float]


def open_cache(
    root: Path, clock: Clock, *, max_bytes: int | None, shared: bool, lock_seconds: float = 0
) -> Cache:
    return Cache.open(root, clock=clock, max_bytes=max_bytes, shared=shared, lock_seconds=lock_seconds)


def build_store(cache: Cache, clock: Clock, notices: Notices, limits: Limits) -> Store:
    return Store(cache, clock, notices, limits)


def build_view(
    config: ViewConfig,
    cache: Cache,
    clock: Clock,
    tell: Tell = unheard,
    *,
    paces: Paces | None = None,
    parallel_requests: int = PARALLEL_REQUESTS,
) -> View:
    """A view's sources, caches behind our cache's memory. FormatError, UsageError: the configuration is wrong.

    ``paces``: of all views of the daemon. ``parallel_requests``: narinfos asked of each source at once.
    ``clock``: seconds since the epoch, kept with answers over restarts; rests are measured on one that never jumps.
    """
    netrc = Path(config.netrc) if config.netrc else None
    ca_file = Path(config.ca_file) if config.ca_file else None
    options = SourceOptions(
        netrc=netrc, ca_file=ca_file, store_dir=config.store_dir, in_flight=parallel_requests
    )
    paces = paces or Paces()

    def make_source(url: str) -> tuple[Source, bool]:
        parsed = parse_source_url(url)
        inner = open_source(parsed, options, tell, paces.of(parsed))
        if parsed.scheme == "local":  # what it has may go, and come back with another content
            return inner, is_trusted(parsed)
        remembered = RememberedSource(
            inner, cache.index, clock, negative_ttl=config.negative_ttl, store_dir=config.store_dir, tell=tell
        )
        return remembered, parsed.trusted

    return open_view(config, make_source, lambda sources: SourceChain(sources, clock=time.monotonic))
