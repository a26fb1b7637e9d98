"""``nix-cache-info``: what a binary cache says about itself.

Source: the Nix manual ("Serving a Nix store via HTTP") and what ``nix copy`` writes (tests/golden).

    file  = { line LF }
    line  = key ":" value        value with spaces around it ignored
    keys  = StoreDir (absolute path), WantMassQuery ("1" means yes), Priority (decimal integer)

Missing keys have Nix's defaults: StoreDir /nix/store, WantMassQuery no, Priority 50. ``nix copy`` writes StoreDir alone.
Limit: 64 KiB, enforced here; a source should stop reading there. That StoreDir is the store we serve is checked by
whoever uses the source, not here.

In the wild: unknown keys, lines without a colon, CRLF, no final newline: accepted, as Nix does. Unlike Nix, a body that
is not empty and has none of the three keys is refused: it is a login page or an error page with status 200, not a cache.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from veneer.model.errors import FormatError, LimitError
from veneer.model.store_path import DEFAULT_STORE_DIR

MAX_SIZE = 64 << 10
DEFAULT_PRIORITY = 50
_WHERE = "nix-cache-info"
_INTEGER = re.compile(r"[+-]?[0-9]{1,10}")


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """A cache's own description. A lower ``priority`` is asked first."""

    store_dir: str = DEFAULT_STORE_DIR
    want_mass_query: bool = False
    priority: int = DEFAULT_PRIORITY


def parse_cache_info(data: bytes) -> CacheInfo:
    """The description in ``data``; the last of several equal keys wins. FormatError, LimitError."""
    if len(data) > MAX_SIZE:
        raise LimitError(f"{len(data)} bytes, limit {MAX_SIZE}", where=_WHERE)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("not UTF-8", where=_WHERE) from error
    fields: dict[str, str] = {}
    for line in text.split("\n"):
        key, colon, value = line.partition(":")
        if colon:
            fields[key] = value.strip()
    if data.strip() and not fields.keys() & {"StoreDir", "WantMassQuery", "Priority"}:
        raise FormatError(
            "none of StoreDir, WantMassQuery, Priority: not a cache's description",
            where=_WHERE,
            hint="is this the URL of a binary cache? A proxy or login page may have answered instead",
        )
    return CacheInfo(
        store_dir=_store_dir(fields.get("StoreDir", DEFAULT_STORE_DIR)),
        want_mass_query=fields.get("WantMassQuery", "") == "1",
        priority=_priority(fields.get("Priority")),
    )


def write_cache_info(info: CacheInfo) -> bytes:
    """The file's bytes. Keys with default values are left out, StoreDir excepted, as ``nix copy`` does."""
    text = f"StoreDir: {_store_dir(info.store_dir)}\n"
    if info.want_mass_query:
        text += "WantMassQuery: 1\n"
    if info.priority != DEFAULT_PRIORITY:
        text += f"Priority: {info.priority}\n"
    return text.encode("utf-8")


def _store_dir(text: str) -> str:
    if not text.startswith("/") or not text.isprintable():
        raise FormatError(f"StoreDir is not an absolute path: {text[:200]!r}", where=_WHERE)
    return text.rstrip("/") or "/"


def _priority(text: str | None) -> int:
    if text is None:
        return DEFAULT_PRIORITY
    if _INTEGER.fullmatch(text) is None:
        raise FormatError(f"Priority is not a number: {text[:200]!r}", where=_WHERE)
    return int(text)
