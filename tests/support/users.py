"""Run programs of a test as an ordinary user without any right, with a /dev/fuse that this user may open.

As root: user and group 12345, no capabilities; where /dev/fuse is root's alone, in a private mount namespace that has
a node open to all, as udev makes it on usual machines. As anybody else: that user itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.places import ROOT

USER_ID = 12345
_OPEN_FUSE = """
mount -t tmpfs -o mode=755 none "$1"
mknod -m 666 "$1/fuse" c 10 229
mount --bind "$1/fuse" /dev/fuse
umount -l "$1"
shift
exec "$@"
"""


def fuse_is_open() -> bool:
    """Whether everybody may use /dev/fuse."""
    try:
        return Path("/dev/fuse").stat().st_mode & 0o666 == 0o666
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class OtherUser:
    """How to start commands as the unprivileged user, and where they may write."""

    home: Path
    """A directory of that user; all users may enter it."""
    prefix: tuple[str, ...]
    environment: dict[str, str]
    """PATH, HOME, PYTHONPATH, TMPDIR and the test session's mark."""
    python: str
    """An interpreter that this user may run, which can import veneer in ``environment``."""

    def command(self, *words: str | Path) -> list[str]:
        """For ``subprocess``; give ``env=user.environment`` and ``cwd=user.home`` too."""
        return [*self.prefix, *map(str, words)]

    def run(self, *words: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """The command's result, with output as text; never raises for an exit status."""
        return subprocess.run(
            self.command(*words),
            env=self.environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )

    def veneer(self, *words: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """``veneer WORDS`` of this checkout."""
        return self.run(
            self.python,
            "-c",
            "import sys; from veneer.cli.main import main; sys.exit(main())",
            *words,
            timeout=timeout,
        )


def other_user(home: Path) -> OtherUser | str:
    """The user with ``home`` (an empty directory that all may enter), or why there is none."""
    prefix: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None or shutil.which("unshare") is None:
            return "setpriv and unshare (util-linux) are not installed"
        os.chown(home, USER_ID, USER_ID)
        drop = [
            "setpriv",
            "--reuid",
            str(USER_ID),
            "--regid",
            str(USER_ID),
            "--clear-groups",
            "--inh-caps=-all",
        ]
        if not fuse_is_open():
            if not Path("/dev/fuse").exists():
                return "there is no /dev/fuse"
            node = home / ".node"
            node.mkdir()
            script = ["sh", "-ec", _OPEN_FUSE, "sh", str(node)]
            prefix = ["unshare", "--mount", "--propagation", "private", *script]
            trial = subprocess.run([*prefix, "true"], capture_output=True, text=True)
            if trial.returncode:
                return f"/dev/fuse is root's alone, and no private one can be made: {trial.stderr.strip()}"
        prefix += drop
    elif not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "this user may not open /dev/fuse"
    environment = {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": str(home),
        "TMPDIR": str(home),
        "LANG": "C.UTF-8",
    }
    environment |= {name: value for name, value in os.environ.items() if name.startswith("VENEER_")}
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    environment["PYTHONPATH"] = f"{ROOT / 'src'}:{packages}"
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    version = "import sys, veneer; print(sys.version_info[:2])"
    for python in (sys.executable, "/usr/bin/python3"):
        trial = subprocess.run(
            [*prefix, python, "-c", version], env=environment, cwd="/", capture_output=True, text=True
        )
        if trial.returncode == 0 and trial.stdout.strip() == str(sys.version_info[:2]):
            return OtherUser(home, tuple(prefix), environment, python)
    return f"user {USER_ID} can run neither {sys.executable} nor a /usr/bin/python3 of the same version with this checkout"
