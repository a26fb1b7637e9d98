"""The ``[limits]`` table of the configuration: what bounds the daemon and the mount server, and how it reaches them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from veneer.cli.output import parse_size
from veneer.model.errors import UsageError

if TYPE_CHECKING:
    from veneer.store.store import Limits


@dataclass(frozen=True, slots=True)
class Limit:
    """One key. ``flag``: of ``python -m veneer.daemon``; "" for what is not the daemon's. ``is_size``: takes ``128M`` as well."""

    name: str
    default: str
    least: int
    most: int
    purpose: str
    flag: str = ""
    is_size: bool = False


LIMITS = (
    Limit(
        "parallel-downloads",
        "8",
        1,
        256,
        "NARs that are downloaded at once; two of the places are kept for readers.",
        "--parallel-downloads",
    ),
    Limit(
        "parallel-requests",
        "64",
        1,
        1024,
        "Narinfos that are asked for at once, of each source.",
        "--parallel-requests",
    ),
    Limit(
        "memory",
        "128M",
        32 << 20,
        1 << 40,
        "Bytes under way that downloads hold, encoded and decoded, besides the tables of decompressors.",
        "--memory",
        is_size=True,
    ),
    Limit(
        "answer-seconds",
        "30",
        1,
        86400,
        "How long Nix waits for the answer about one path before it gets an error.",
        "--answer-seconds",
    ),
    Limit(
        "parked-requests",
        "65536",
        16,
        1 << 20,
        "Requests of the kernel that may wait in one mount; those beyond fail with EIO.",
    ),
)
"""Seconds are whole here, so that all limits are integers."""


def parse_limits(table: object, where: str) -> dict[str, int]:
    """The limits that were given, by name. UsageError names the one that is wrong."""
    if not isinstance(table, Mapping):
        raise UsageError("limits must be a table", where=where, hint="write [limits]")
    known = {limit.name: limit for limit in LIMITS}
    found = {}
    for name, value in table.items():
        limit = known.get(name)
        if limit is None:
            raise UsageError(
                f"unknown limit {str(name)[:100]!r}", where=where, hint=f"known limits: {', '.join(known)}"
            )
        if limit.is_size and isinstance(value, str):
            value = parse_size(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise UsageError(f"{name} must be {'a size' if limit.is_size else 'a whole number'}", where=where)
        if not limit.least <= value <= limit.most:
            raise UsageError(f"{name} must be from {limit.least} to {limit.most}, not {value}", where=where)
        found[limit.name] = value
    return found


def daemon_flags(given: Mapping[str, int]) -> list[str]:
    """Those of ``python -m veneer.daemon``; nothing for what was not given, so that other versions understand it."""
    return [
        word
        for limit in LIMITS
        if limit.flag and limit.name in given
        for word in (limit.flag, str(given[limit.name]))
    ]


def store_limits(given: Mapping[str, int]) -> Limits:
    """For a daemon in this process."""
    from veneer.store.store import Limits

    usual = Limits()
    return Limits(
        given.get("parallel-requests", usual.parallel_requests),
        given.get("parallel-downloads", usual.parallel_downloads),
        memory=given.get("memory", usual.memory),
    )
