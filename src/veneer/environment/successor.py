"""``python -m veneer.environment.successor ROLE FD``: this program takes over from another version. Started by keepers only.

ROLE ``server``: load everything, say READY, serve once there is a byte in ``go``. ROLE ``keeper``: be the keeper from now on; a
failure on the way goes back to the program before, as ``last-keeper``, from which there is no way back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from typing import NoReturn

from veneer.environment import keeper, serving
from veneer.environment.takeover import SUCCESSOR, Handover, refusal
from veneer.mount.succession import READY


def main(role: str, file: int) -> NoReturn:
    if role == "server":
        _serve(file)
    _keep(file, final=role == "last-keeper")


def _serve(file: int) -> NoReturn:
    status = 1
    try:
        handover = Handover.read(file)
        fds = handover.fds
        load = serving.mount_server(handover.content)
        serve = load()
        os.dup2(fds["stderr"], 2)
        os.write(fds["ready"], READY)
        os.close(fds["ready"])
        if not os.read(fds["go"], 1):
            os._exit(0)
        duty = serving.Duty(
            fds["fuse"], fds["cache"], fds["report"], fds["session"], handover.number, handover.session, handover.since
        )  # fmt: skip
        serving.become_server(lambda: serve, duty)
    except BaseException as error:  # noqa: BLE001 - the process ends here; the keeper reads its last line
        os.write(2, (refusal(error).replace("\n", "; ") + "\n").encode(errors="replace"))
    finally:
        os._exit(status)


def _keep(file: int, *, final: bool) -> NoReturn:
    try:
        handover = Handover.read(file)
        for fd in (file, *handover.fds.values(), *handover.lingering):
            if fd >= 0:
                os.set_inheritable(fd, False)
        servers = keeper.resumed(handover)
        os.close(file)
    except BaseException:  # the environment must not end with a keeper that cannot begin
        if final:
            raise
        _go_back(file)
    keeper.go_on(servers)


def _go_back(file: int) -> NoReturn:
    """The program before was a keeper of this environment, so it understands what it left."""
    import json

    document = json.loads(os.pread(file, 1 << 20, 0))
    before, fds = document["before"], document["fds"]
    for fd in (file, *fds.values(), *map(int, document["lingering"])):
        if fd >= 0:
            os.set_inheritable(fd, True)
    with contextlib.suppress(OSError):
        caller = socket.socket(fileno=os.dup(fds["caller"]))
        caller.send(b'{"error": "the new keeper cannot begin; the one before goes on", "again": false}')
        caller.close()
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    words = [before["python"], "-P", "-m", SUCCESSOR, "last-keeper", str(file)]
    os.execve(before["python"], words, {**os.environ, "PYTHONPATH": before["path"]})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
