"""From a source's URL, taken apart, to the source."""

from __future__ import annotations

from .base import Source
from .object_store import ObjectStoreSource
from .options import SourceConfig, SourceOptions
from .pace import Pace
from .store_directory import StoreDirectory, Tell, unheard

__all__ = ["Tell", "open_source", "unheard"]


def open_source(
    config: SourceConfig, options: SourceOptions, tell: Tell = unheard, pace: Pace | None = None
) -> Source:
    """UsageError: it cannot be used with these options. Asks nothing yet. ``tell``: failures that stop nothing; any thread.

    ``pace``: shared with others; without it, one of its own with the limits of ``config``.
    """
    if config.scheme == "local":
        return StoreDirectory(config, options, tell=tell)
    return ObjectStoreSource(config, options, pace=pace)
