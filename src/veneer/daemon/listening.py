"""Unix sockets at paths of any length, taken over from dead daemons."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

DEFAULT_NAME = "nix.sock"
"""The worker socket of a daemon's default view, in the cache directory."""
DIRECTORY = "nix"
"""Of the sessions' worker sockets."""


def answers(path: Path) -> bool:
    """Whether somebody listens on the socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            _connect(probe, path)
        except BlockingIOError:
            return True  # more wait for it already than its queue holds
        except OSError:
            return False
        return True


def connected(path: Path) -> socket.socket:
    """A connection to who listens on the socket. OSError: nobody does."""
    made = socket.socket(socket.AF_UNIX)
    try:
        _connect(made, path)
    except OSError:
        made.close()
        raise
    return made


def _connect(sock: socket.socket, path: Path) -> None:
    """Connect through the directory's descriptor: a socket's path may not exceed 107 bytes."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        sock.connect(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)


def listen(path: Path, shared: bool) -> socket.socket:
    """A listening socket in place of a dead one; we hold the cache's lock, so nobody alive listens there.

    ``shared``: mode 0666 instead of 0600.
    """
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    sock = socket.socket(socket.AF_UNIX)
    try:
        with suppress(FileNotFoundError):
            path.unlink()
        os.fchmod(sock.fileno(), 0o600)  # the file gets it at once; umask would be every thread's
        place = f"/proc/self/fd/{directory}/{path.name}"
        sock.bind(place)
        if shared:
            Path(place).chmod(0o666)
        sock.listen(256)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    finally:
        os.close(directory)
    return sock
