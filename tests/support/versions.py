"""Copies of the package that are other versions of it: what an upgrade installs, beside the running one or over it."""

from __future__ import annotations

import compileall
import dataclasses
import os
import shutil
from importlib.util import cache_from_source
from pathlib import Path

import veneer
from tests.support.callers import Caller


def copied_program(place: Path, version: str) -> Path:
    """A copy in ``place`` that says it is ``version``; the package's directory."""
    package = place / "veneer"
    shutil.copytree(Path(veneer.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    edit(package / "__init__.py", f'__version__ = "{veneer.__version__}"', f'__version__ = "{version}"')
    compileall.compile_dir(package, quiet=1)  # who may not write there would compile it each time
    return package


def edit(path: Path, old: str, new: str) -> None:
    """Install another module over ``path``."""
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    Path(cache_from_source(path)).unlink(missing_ok=True)  # which may seem as new, and as long


def of_program(caller: Caller, place: Path) -> Caller:
    """The same user with the copy in ``place``."""
    path = os.pathsep.join([str(place), *filter(None, [caller.environment.get("PYTHONPATH", "")])])
    return dataclasses.replace(caller, environment={**caller.environment, "PYTHONPATH": path})
