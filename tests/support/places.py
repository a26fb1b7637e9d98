"""Where downloads and other lasting files of a contributor go. Standard library only (``./dev`` imports it)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class NoPlaceError(Exception):
    """Nothing can be written where it should be; the text says what to set."""


def own_directory() -> Path:
    """``.dev`` of the checkout; for users who may not write there, a directory of their own."""
    inside = ROOT / ".dev"
    with contextlib.suppress(OSError):
        inside.mkdir(exist_ok=True)
    if os.access(inside, os.W_OK | os.X_OK):
        return inside
    cache = os.environ.get("XDG_CACHE_HOME")
    mine = (Path(cache) if cache else Path.home() / ".cache") / "veneer-dev" / digest(str(ROOT))[:16]
    try:
        mine.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = "set XDG_CACHE_HOME to a directory of yours"
        raise NoPlaceError(
            f"neither {inside} nor {mine} can be written ({error.strerror}): {hint}"
        ) from error
    return mine


def digest(value: object) -> str:
    """SHA-256 of a JSON value, in hex."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
