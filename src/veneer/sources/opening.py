"""From a source's URL, taken apart, to the source."""

from __future__ import annotations

from .base import Source
from .object_store import ObjectStoreSource
from .options import SourceConfig, SourceOptions
from .store_directory import StoreDirectory


def open_source(config: SourceConfig, options: SourceOptions) -> Source:
    """UsageError: it cannot be used with these options. Asks nothing yet."""
    if config.scheme == "local":
        return StoreDirectory(config, options)
    return ObjectStoreSource(config, options)
