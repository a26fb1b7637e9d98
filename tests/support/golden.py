"""The binary caches that real Nix wrote (``tests/golden``): what they hold, and copies of them to be spoilt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from veneer.model.store_path import StorePath

GOLDEN = Path(__file__).parents[1] / "golden"
KEY = (GOLDEN / "key.public").read_text().strip()
FOREIGN = "other-1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
"""A key that signed none of it."""
PATHS = {
    name: StorePath.parse_absolute(path)
    for name, path in json.loads((GOLDEN / "paths.json").read_text()).items()
}


def url(name: str) -> str:
    return f"file://{GOLDEN / name}"


def copy_of(name: str, to: Path) -> Path:
    shutil.copytree(GOLDEN / name, to)
    return to
