"""Which Nix an environment's command will meet.

``nix --version`` prints ``NAME (FAMILY) VERSION``, seen in the wild:

    nix (Nix) 2.8.0        nix-store (Nix) 2.3.16        nix (Nix) 2.19.0pre20231020_0e1c1b8
    nix (Lix, like Nix) 2.91.1        nix (Determinate Nix 3.6.2) 2.29.0

Forks number on from where they left, so a version says something only together with its family.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from veneer.model.errors import FormatError, MachineError, UsageError, printable

PROGRAMS = ("nix", "nix-store")
_FIRST_LOCAL_OVERLAY = (2, 22, 0)
_WITH_LOCAL_OVERLAY = re.compile(r"Nix|Determinate Nix( [\w.+-]+)?")
"""Families that are Nix itself. Any other may have left before the feature came."""
_VERSION = re.compile(r"[\w.+-]+ \(([^()\n]{1,100})\) (\d{1,4})\.(\d{1,4})(?:\.(\d{1,9}))?([\w.+-]{0,100})")


@dataclass(frozen=True, slots=True)
class NixVersion:
    """``family``: the words in parentheses; ``numbers``: major, minor, patch (0 if not said); ``suffix``: what follows,
    "pre20231020_0e1c1b8" or "-rc1", "" for a release."""

    family: str
    numbers: tuple[int, int, int]
    suffix: str = ""

    @classmethod
    def parse(cls, text: str) -> NixVersion:
        """From the first line with a version in the output of ``--version``. FormatError when there is none."""
        for line in text.splitlines():
            match = _VERSION.fullmatch(line.strip())
            if match:
                numbers = (int(match[2]), int(match[3]), int(match[4] or 0))
                return cls(match[1], numbers, match[5])
        raise FormatError(f"not a version of Nix: {text[:100]!r}", where="nix --version")

    @property
    def has_local_overlay(self) -> bool:
        """Whether it has local-overlay stores: Nix 2.22 and later. What came before the release of 2.22 and forks count as without."""
        if not _WITH_LOCAL_OVERLAY.fullmatch(self.family):
            return False
        return self.numbers > _FIRST_LOCAL_OVERLAY or (
            self.numbers == _FIRST_LOCAL_OVERLAY and not self.suffix
        )

    def __str__(self) -> str:
        return f"{self.family} {'.'.join(map(str, self.numbers))}{self.suffix}"


def detect(program: str | None, environ: Mapping[str, str], seconds: float) -> NixVersion | None:
    """What ``program --version`` says; None: ``nix`` or ``nix-store``, whichever is found first in ``environ``'s PATH.

    None when the answer is no version that we understand. UsageError when there is no program, MachineError when it cannot
    be run, fails, or has said nothing for ``seconds``. Opens no store.
    """
    names = PROGRAMS if program is None else (program,)
    path = environ.get("PATH", os.defpath)
    found = next((place for name in names if (place := shutil.which(name, path=path))), None)
    if found is None:
        hint = "install Nix, or add the directory of its programs to PATH"
        raise UsageError(f"{' or '.join(names)} is not in PATH", where=printable(path), hint=hint)
    output = _ask(found, environ, seconds)
    try:
        return NixVersion.parse(output)
    except FormatError:
        return None


def _ask(program: str, environ: Mapping[str, str], seconds: float) -> str:
    command = [program, "--version"]
    try:
        process = subprocess.Popen(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise MachineError(f"Nix cannot be run: {error.strerror}", where=program) from error
    with process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)  # with its children, which may hold the pipes
            raise MachineError(f"Nix did not say its version in {seconds:g} s", where=program) from error
    if process.returncode != 0:
        said = printable(errors.decode("utf-8", "replace").strip()[-300:])
        raise MachineError(f"Nix did not say its version: {said}", where=program)
    return output.decode("utf-8", "replace")
