"""Real Nix, from Debian's packages, on stores of its own: it never opens or creates the machine's ``/nix``.

A chroot store is a directory that holds ``nix/store`` and ``nix/var``; builds in it run in Nix's sandbox, which needs
namespaces. Standard library only.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.support.debian import fetch_program
from tests.support.places import own_directory

VERSIONS = {"trixie": "2.26.3", "sid": "2.34.8", "bookworm": "2.8.0"}
"""Debian suite -> the Nix that it has (sid and trixie move on, slowly)."""

CONFIGURATION = """\
experimental-features = nix-command
store = {store}
sandbox = true
sandbox-paths = {sandbox_paths}
build-users-group =
require-drop-supplementary-groups = false
substituters =
substitute = false
max-jobs = 2
fsync-metadata = false
"""


class NixError(Exception):
    """A Nix command failed; the text has its last words."""


def fetch_nix(suite: str = "trixie") -> Path:
    """The directory with ``nix``, ``nix-build``, ``nix-store`` …; fetched on the first call (10 s, 50 MB)."""
    target = own_directory() / f"nix-{suite}"
    fetch_program(target, suite, ["nix-bin"], ["usr/bin/nix"])
    return target / "bin"


def missing_for_builds() -> str | None:
    """Why Nix's sandbox cannot work for this user here, or None."""
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    done = subprocess.run([*unshare, "true"], capture_output=True, text=True)
    return f"no namespaces for Nix's sandbox: {done.stderr.strip()}" if done.returncode else None


class RealNix:
    """Nix's programs with a chroot store, configuration and home in ``home``."""

    def __init__(self, programs: Path, home: Path) -> None:
        self.programs = programs
        self.home = home
        self.store = home / "store"
        (home / "conf").mkdir(parents=True)
        sandbox_paths = [p for p in ("/bin", "/usr", "/lib", "/lib64") if Path(p).exists()]
        configuration = CONFIGURATION.format(store=self.store, sandbox_paths=" ".join(sandbox_paths))
        (home / "conf" / "nix.conf").write_text(configuration)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("NIX_", "XDG_"))}
        path = f"{programs}:{os.environ.get('PATH', '/usr/bin:/bin')}"
        self.environment = kept | {"NIX_CONF_DIR": str(home / "conf"), "HOME": str(home), "PATH": path}

    def run(self, program: str, *arguments: str | Path, text: str | None = None) -> str:
        """Standard output of a Nix program; NixError with its standard error. ``text`` is its standard input."""
        command = [self.programs / program, *arguments]
        done = subprocess.run(
            command, env=self.environment, cwd=self.home, input=text, capture_output=True, text=True
        )
        if done.returncode:
            raise NixError(f"{program} {' '.join(map(str, arguments))}: {done.stderr.strip()[-4000:]}")
        return done.stdout

    def build(self, expression: Path, *attributes: str) -> dict[str, str]:
        """Build all outputs of the attributes (all attributes if none is named); attribute or ``attr.output`` -> path."""
        base = f"import {expression}"
        names = attributes or json.loads(
            self.run("nix", "eval", "--impure", "--json", "--expr", f"builtins.attrNames ({base})")
        )
        paths = {}
        for name in names:
            described = (
                f'let v = ({base}).{name}; in map (o: [ o (toString (v.${{o}})) ]) (v.outputs or [ "out" ])'
            )
            self.run("nix-build", expression, "-A", name, "--no-out-link")
            for output, path in json.loads(
                self.run("nix", "eval", "--impure", "--json", "--expr", described)
            ):
                paths[name if output == "out" else f"{name}.{output}"] = path
        return paths

    def closure(self, paths: Sequence[str]) -> list[str]:
        """The paths and everything that they refer to, references first."""
        return self.run("nix-store", "--query", "--requisites", *paths).split()

    def copy(self, paths: Sequence[str], to: str) -> None:
        """``nix copy`` of the closures of ``paths`` to a store URL. Unsigned paths are fine."""
        self.run("nix", "copy", "--no-check-sigs", "--to", to, *paths)

    def make_key(self, name: str) -> tuple[Path, str]:
        """A new signing key: (file with the secret half, public half)."""
        file = self.home / f"{name}.secret"
        file.write_text(self.run("nix", "key", "generate-secret", "--key-name", name))
        return file, self.run("nix", "key", "convert-secret-to-public", text=file.read_text()).strip()

    def unpacked(self, path: str) -> Path:
        """Where a store path of the chroot store really is."""
        return self.store / path.removeprefix("/")
