"""What the doctor looks at, where nothing is out of order."""

from __future__ import annotations

import os
from pathlib import Path

from veneer.doctor.finding import Subject
from veneer.model.store_path import StorePath


def make_subject(
    home: Path, *sources: str, keys: tuple[str, ...] = (), paths: tuple[StorePath, ...] = ()
) -> Subject:
    return Subject(
        environ={},
        uid=os.geteuid(),
        cache_dir=home / "cache",
        environments_dir=home / "environments",
        max_bytes=None,
        sources=sources,
        keys=keys,
        require_signatures=True,
        netrc=None,
        ca_file=None,
        nix={},
        nix_error="",
        status=lambda: None,
        memory=lambda names: {},
        paths=paths,
    )
