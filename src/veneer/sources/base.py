"""The contract of a source: a configured place that store paths come from.

``tests/conformance/test_source.py`` runs over every implementation. All answers are unverified: a source is never
trusted here, only bounded (sizes, times). Times and retries are the implementation's; callers may cancel any await.

Errors: ``SourceMissingError`` when something promised is not there (404, 410, 403), ``SourceError`` for every other
failure of the source, ``FormatError`` (with the URL in ``where``) for answers that do not follow their format.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from veneer.formats.cache_info import CacheInfo
from veneer.model.path_info import UnverifiedPathInfo

Meter = Callable[[int], None]
"""Told the number of bytes of each body chunk as it came over the wire (encoded, without headers)."""


def unmetered(_: int) -> None:
    """A ``Meter`` for callers who do not count."""


class RangesUnsupportedError(Exception):
    """This source gives no parts of a NAR's file; read ``nar`` whole. Control flow, never shown to users."""


class Source(Protocol):
    """One place. Safe for concurrent use from one event loop."""

    @property
    def url(self) -> str:
        """Identity, for people and for the index; without credentials."""
        ...

    @property
    def priority(self) -> int:
        """Lower is asked first. The URL's, else the cache's own once ``nix_cache_info`` was answered, else 50."""
        ...

    async def nix_cache_info(self) -> CacheInfo:
        """The cache's own description; defaults when the cache has none."""
        ...

    async def path_info(self, hash_part: str, meter: Meter = unmetered) -> UnverifiedPathInfo | None:
        """The narinfo of a hash part; None when the source answered that it has none. At most 1 MiB."""
        ...

    async def listing(self, hash_part: str, meter: Meter = unmetered) -> bytes | None:
        """The ``.ls`` as plain JSON bytes (any content encoding undone); None when there is none. At most 256 MiB."""
        ...

    def nar(self, info: UnverifiedPathInfo, meter: Meter = unmetered) -> AsyncGenerator[bytes, None]:
        """The NAR's bytes as stored (encoded as ``info.compression`` says), in chunks of about 1 MiB, at least 1 byte.

        Resumes by range after a broken connection where the server allows it. Ends only after the whole file; a short
        body is a SourceError. Close it when it is left early: a connection hangs on it.
        """
        ...

    async def part(self, info: UnverifiedPathInfo, offset: int, size: int, meter: Meter = unmetered) -> bytes:
        """``size`` bytes of the NAR's file as stored, from ``offset``. RangesUnsupportedError where it must be read whole.

        The caller bounds ``size``: it is held in memory. ValueError when the narinfo says that the file is shorter.
        """
        ...

    async def sidecar(
        self, hash_part: str, suffix: str, limit: int, meter: Meter = unmetered
    ) -> bytes | None:
        """The object ``<hash part><suffix>`` of at most ``limit`` bytes, as stored; None when there is none."""
        ...

    async def close(self) -> None: ...
