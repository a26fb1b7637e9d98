"""A file system of a few bytes, so that it is soon full."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[None]:
    """A tmpfs of ``size`` ("4m") at ``place``, an empty directory. The test is skipped where root may not mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "veneer-test", str(place)]
    if subprocess.run(mount, capture_output=True, timeout=30).returncode:
        pytest.skip("needs the right to mount (CAP_SYS_ADMIN)")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=30)
