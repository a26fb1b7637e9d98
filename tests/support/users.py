"""Run programs of a test as an ordinary user without any right, with a /dev/fuse that this user may open.

As root: user and group 12345 without capabilities, in a private mount namespace where /dev/fuse is open to all, as udev
makes it on usual machines, and where the checkout can be read even if it lies in a private home. As anybody else: that
user itself.
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
_PREPARE = """
home=$1 checkout=$2 packages=$3 barrier=$4
shift 4
umask 022
mkdir -p "$home/checkout" "$home/packages" "$home/node"
mount --bind "$packages" "$home/packages"
if [ -n "$barrier" ]; then
  mount --bind "$checkout" "$home/checkout"
  mount -t tmpfs -o mode=755 none "$barrier"
  mkdir -p "$checkout"
  mount --bind "$home/checkout" "$checkout"
fi
if [ "$(stat -c %a /dev/fuse)" != 666 ]; then
  mount -t tmpfs -o mode=755 none "$home/node"
  mknod -m 666 "$home/node/fuse" c 10 229
  mount --bind "$home/node/fuse" /dev/fuse
  umount -l "$home/node"
fi
exec "$@"
"""


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
    packages = Path(next(path for path in sys.path if path.endswith("site-packages")))
    if not Path("/dev/fuse").exists():
        return "there is no /dev/fuse"
    prefix: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None or shutil.which("unshare") is None:
            return "setpriv and unshare (util-linux) are not installed"
        os.chown(home, USER_ID, USER_ID)
        script = ["sh", "-euc", _PREPARE, "sh", str(home), str(ROOT), str(packages), _barrier(ROOT)]
        prefix = ["unshare", "--mount", "--propagation", "private", *script]
        prefix += [
            "setpriv",
            "--reuid",
            str(USER_ID),
            "--regid",
            str(USER_ID),
            "--clear-groups",
            "--inh-caps=-all",
        ]
        trial = subprocess.run([*prefix, "true"], capture_output=True, text=True)
        if trial.returncode:
            return f"no private mounts for an ordinary user can be made here: {trial.stderr.strip()}"
        packages = home / "packages"
    elif not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "this user may not open /dev/fuse"
    environment = {name: value for name, value in os.environ.items() if name.startswith("VENEER_")}
    environment |= {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LANG": "C.UTF-8"}
    environment |= {"HOME": str(home), "TMPDIR": str(home)}
    environment |= {"PYTHONPATH": f"{ROOT / 'src'}:{packages}", "PYTHONDONTWRITEBYTECODE": "1"}
    # setpriv still has its rights when it executes the interpreter; what that starts itself has not.
    version = "import subprocess, sys, veneer; subprocess.run([sys.executable, '-c', '']); print(sys.version_info[:2])"
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            trial = subprocess.run(
                [*prefix, python, "-c", version], env=environment, cwd="/", capture_output=True, text=True
            )
        except OSError:
            continue
        if trial.returncode == 0 and trial.stdout.strip() == str(sys.version_info[:2]):
            return OtherUser(home, tuple(prefix), environment, python)
    return f"an ordinary user can run neither {sys.executable} nor a /usr/bin/python3 of the same version"


def _barrier(directory: Path) -> str:
    """The highest parent that other users may not enter, or ""."""
    closed = [parent for parent in reversed(directory.parents) if not parent.stat().st_mode & 0o001]
    return str(closed[0]) if closed else ""
