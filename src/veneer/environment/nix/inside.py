"""What has to be done for Nix inside the environment before the command starts: by init, which sees the merged store."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from veneer.environment import syscalls
from veneer.environment.nix.settings import LOGS, STATE, STATE_HOME
from veneer.environment.spec import NixSpec
from veneer.model.errors import MachineError, printable
from veneer.model.store_path import DEFAULT_STORE_DIR, HASH_PART_LENGTH, is_hash_part

PROGRAM = "nix-daemon"
SOCKET = f"{STATE}/daemon-socket/socket"
_ROOT_CHANNELS = "profiles/per-user/root/channels"
LOG = f"{LOGS}/nix-daemon.log"
_FIRST_INHERITED = 3
"""As in socket activation: the listening socket is this descriptor."""


def prepare(nix: NixSpec, daemon_environ: Mapping[str, str]) -> int:
    """Fill the database, or start the nix-daemon, as ``nix.mode`` says; the nix-daemon's pid, or 0.

    VeneerError when the database cannot be filled, MachineError when there is no nix-daemon.
    """
    show_channels(daemon_environ, Path(STATE), Path(STATE_HOME))
    if nix.mode == "filled":
        from veneer.environment.nix import database

        database.fill(Path(STATE), nix.registered, now=int(time.time()))
    if nix.mode != "daemon":
        return 0
    place = Path(SOCKET).parent
    place.mkdir(parents=True, exist_ok=True)
    Path(LOGS).mkdir(parents=True, exist_ok=True)
    if not any(
        os.access(Path(directory, PROGRAM), os.X_OK) for directory in os.get_exec_path(daemon_environ)
    ):
        raise MachineError(
            f"{PROGRAM} is not in PATH",
            where=printable(daemon_environ.get("PATH", "")),
            hint="use --nix overlay",
        )
    with socket.socket(socket.AF_UNIX) as listening:
        Path(SOCKET).unlink(missing_ok=True)
        listening.bind(SOCKET)
        Path(SOCKET).chmod(0o666)
        # It listens from now on: whoever connects before the daemon is up waits for it.
        listening.listen(64)
        pid = os.fork()
        if pid == 0:
            _become_daemon(listening, daemon_environ)
    return pid


def show_channels(
    environ: Mapping[str, str], state: Path, state_home: Path, host_state: Path = Path("/nix/var/nix")
) -> None:
    """Link the host's channels, the user's and root's, to where Nix looks for them in ``state`` and ``state_home``.

    What Nix itself made there (``nix-channel --update``) is left alone; an error leaves the environment without channels.
    """
    links = [(state / _ROOT_CHANNELS, [host_state / _ROOT_CHANNELS])]
    home = environ.get("HOME") or _home()
    if home:
        state_of_user = environ.get("XDG_STATE_HOME") or f"{home}/.local/state"
        links.append(
            (state_home / "defexpr", [Path(home, ".nix-defexpr"), Path(state_of_user, "nix/defexpr")])
        )
    for link, places in links:
        target = next((place for place in places if os.path.lexists(place)), None)
        with contextlib.suppress(OSError):
            if link.is_symlink() and link.readlink() in places:
                link.unlink()  # of an earlier start
            if target is not None:
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(target)


def _home() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return ""


def hold_host_paths(store: Path) -> int:
    """Have the environment's garbage collector leave the host's own paths alone; a descriptor that must stay open.

    They are below, and unlike those of caches they are listed, so the collector takes them for garbage of its own. Nix
    keeps what a file in ``temproots`` names, as long as somebody holds a shared lock on it. OSError.
    """
    place = Path(STATE) / "temproots"
    place.mkdir(parents=True, exist_ok=True)
    file = os.open(place / str(os.getpid()), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(file, fcntl.LOCK_SH)
    os.ftruncate(file, 0)
    with os.scandir(store) as entries, open(file, "wb", closefd=False) as out:
        for entry in entries:
            if is_hash_part(entry.name[:HASH_PART_LENGTH]):
                out.write(os.fsencode(f"{DEFAULT_STORE_DIR}/{entry.name}") + b"\0")
    return file


def _become_daemon(listening: socket.socket, environ: Mapping[str, str]) -> NoReturn:
    try:
        os.setsid()
        syscalls.reset_signal_handlers()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        null = os.open(os.devnull, os.O_RDWR)
        log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        inherited = os.dup(listening.fileno())  # out of the way of what is put in its place
        for fd, target in ((null, 0), (log, 1), (log, 2), (inherited, _FIRST_INHERITED)):
            os.dup2(fd, target)
        os.closerange(_FIRST_INHERITED + 1, os.sysconf("SC_OPEN_MAX"))
        made = {**environ, "LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
        os.execvpe(PROGRAM, [PROGRAM], made)
    except OSError as error:
        os.write(2, f"veneer: {PROGRAM}: {error.strerror}\n".encode())
    finally:
        os._exit(127)
