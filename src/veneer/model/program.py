"""Which veneer to start as another process: an interpreter, where it finds the package, and its version."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import veneer


@dataclass(frozen=True, slots=True)
class Program:
    """``python``: absolute. ``path``: its PYTHONPATH. ``version``: what it says of itself."""

    python: str
    path: str
    version: str

    def command(self, module: str, *words: str) -> list[str]:
        """``-P``: the package is never looked for in the current directory."""
        return [self.python, "-P", "-m", module, *words]

    def environ(self, base: Mapping[str, str]) -> dict[str, str]:
        return {**base, "PYTHONPATH": self.path}

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, object]) -> Program:
        """ValueError."""
        values = [fields.get(name) for name in ("python", "path", "version")]
        python, path, version = (value if isinstance(value, str) else "" for value in values)
        if not python.startswith("/") or not path or "\0" in python + path:
            raise ValueError("not a program")
        return cls(python, path, version)


def this_program() -> Program:
    """The one that runs."""
    package = str(Path(veneer.__file__).resolve().parent.parent)
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    path = os.pathsep.join([package, *(str(Path(entry).absolute()) for entry in given if entry != package)])
    return Program(sys.executable, path, veneer.__version__)
