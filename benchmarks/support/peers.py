"""Other FUSE servers to compare ours with: a minimal one in C, and one on pyfuse3. Made when needed, left out with the reason.

All serve the same tree: ``write_manifest`` lays its entries out for them (the format is in peers/floor.c), contents
come from one packed file.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.places import own_directory
from veneer.model.tree import Directory, Node, RegularFile
from veneer.mount import device

SOURCES = Path(__file__).resolve().parents[1] / "peers"
MOUNT_SECONDS = 20
BUILD_SECONDS = 300


class NotHereError(Exception):
    """This peer cannot be made on this machine; the text says why."""


def floor() -> list[str]:
    """The command of the C server, compiled now if it is older than its source. NotHereError."""
    compiler = shutil.which("cc")
    if compiler is None or shutil.which("pkg-config") is None:
        raise NotHereError("needs cc and pkg-config")
    try:
        flags = _output(["pkg-config", "--cflags", "--libs", "fuse3"]).split()
    except NotHereError as error:
        raise NotHereError(f"needs libfuse3's headers (libfuse3-dev): {error}") from error
    source, program = SOURCES / "floor.c", _place() / "floor"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        _output([compiler, "-O2", "-Wall", "-o", str(program), str(source), *flags])
    return [str(program)]


def instant_lower() -> list[str]:
    """The command of the C lower store for Nix; arguments to add: socket, table. NotHereError."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise NotHereError("needs cc")
    source, program = SOURCES / "instant_lower.c", _place() / "instant_lower"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        _output([compiler, "-O2", "-Wall", "-o", str(program), str(source)])
    return [str(program)]


def pyfuse3() -> list[str]:
    """The command of the pyfuse3 server, in a virtual environment of its own. NotHereError."""
    home = _place() / "pyfuse3"
    python = home / "bin" / "python"
    works = [str(python), "-c", "import pyfuse3, trio"]
    if not python.exists() or subprocess.run(works, capture_output=True).returncode:
        shutil.rmtree(home, ignore_errors=True)
        _output([sys.executable, "-m", "venv", str(home)])
        _output([str(python), "-m", "pip", "install", "--quiet", "pyfuse3"])
        _output(works)
    return [str(python), str(SOURCES / "pyfuse3_server.py")]


PEERS: dict[str, Callable[[], list[str]]] = {"C floor": floor, "pyfuse3": pyfuse3}
"""How to get each one's command; arguments to add: manifest, content, mount point."""


@contextlib.contextmanager
def served(command: list[str], manifest: Path, content: Path, mountpoint: Path) -> Iterator[Path]:
    """``command`` serving at ``mountpoint`` (made here), with the read-ahead that our mount gets."""
    mountpoint.mkdir()
    process = subprocess.Popen([*command, str(manifest), str(content), str(mountpoint)])
    try:
        _wait_until_mounted(str(mountpoint), process)
        list(mountpoint.iterdir())  # after this INIT is over, which sets a read-ahead too
        device.raise_read_ahead(str(mountpoint))
        yield mountpoint
    finally:
        with contextlib.suppress(Exception):
            device.umount(str(mountpoint), detach=True)
        process.kill()
        process.wait()


def write_manifest(path: Path, node: Node, contents_in: bytes) -> None:
    """``node``, which has offsets, as the one child named ``contents_in`` of the mount's root."""
    waiting: deque[tuple[int, bytes, Node]] = deque([(0, b"/", Directory(((contents_in, node),)))])
    with open(path, "wb") as out:
        number = 0
        while waiting:
            parent, name, node = waiting.popleft()
            if isinstance(node, Directory):
                waiting.extend((number, child_name, child) for child_name, child in node.entries)
                out.write(b"%d d 0 0 %s\n" % (parent, name))
            elif isinstance(node, RegularFile):
                kind = b"x" if node.executable else b"f"
                out.write(b"%d %s %d %d %s\n" % (parent, kind, node.offset, node.size, name))
            else:
                raise ValueError("the peers know no symbolic links")
            number += 1


def _wait_until_mounted(mountpoint: str, process: subprocess.Popen[bytes]) -> None:
    """The kernel says when the table of mounts changes."""
    with open("/proc/self/mountinfo", "rb") as mounts, open(os.pidfd_open(process.pid), "rb") as ended:
        waiter = select.poll()
        waiter.register(mounts, select.POLLPRI)
        waiter.register(ended, select.POLLIN)
        while device.device_number(mountpoint) is None:
            if not waiter.poll(MOUNT_SECONDS * 1000) or process.poll() is not None:
                raise NotHereError(f"{process.args!r} did not mount (status {process.poll()})")


def _place() -> Path:
    place = own_directory() / "bench"
    place.mkdir(exist_ok=True)
    return place


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotHereError(str(error)) from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise NotHereError(f"{' '.join(command[:4])} …: {' '.join(last)}")
    return done.stdout
