"""``python -m veneer.environment.successor ROLE FD``: this program takes over from another version. Started by keepers only.

ROLE ``server``: load everything, say READY, serve once there is a byte in ``go``. ROLE ``attempt``: begin as the keeper, as far as
nobody notices, say READY and end. ROLE ``keeper``: be the keeper from now on; there is no way back, its program may be gone.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from veneer.environment import keeper, serving
from veneer.environment.keeper import Servers
from veneer.environment.takeover import Handover, refusal
from veneer.mount.succession import READY


def main(role: str, file: int) -> NoReturn:
    if role == "server":
        _serve(file)
    if role == "attempt":
        _attempt(file)
    servers, handover = _resumed(file)
    keeper.go_on(servers, handover.fds["caller"])


def _serve(file: int) -> NoReturn:
    status = 1
    try:
        handover = Handover.read(file)
        fds = handover.fds
        serve = serving.mount_server(handover.content)
        os.dup2(fds["stderr"], 2)
        os.write(fds["ready"], READY)
        os.close(fds["ready"])
        if not os.read(fds["go"], 1):
            os._exit(0)
        duty = serving.Duty(
            fds["fuse"], fds["cache"], fds["report"], fds["session"], handover.number, handover.session, handover.since
        )  # fmt: skip
        serving.become_server(serve, duty)
    except BaseException as error:  # noqa: BLE001 - the process ends here; the keeper reads its last line
        os.write(2, (refusal(error).replace("\n", "; ") + "\n").encode(errors="replace"))
    finally:
        os._exit(status)


def _attempt(file: int) -> NoReturn:
    status = 1
    try:
        _, handover = _resumed(file)
        os.write(handover.fds["ready"], READY)
        status = 0
    except BaseException as error:  # noqa: BLE001 - the process ends here; the keeper reads its last line
        os.write(2, (refusal(error).replace("\n", "; ") + "\n").encode(errors="replace"))
    finally:
        os._exit(status)


def _resumed(file: int) -> tuple[Servers, Handover]:
    handover = Handover.read(file)
    for fd in (file, *handover.fds.values(), *handover.lingering):
        if fd >= 0:
            os.set_inheritable(fd, False)
    os.close(file)
    return keeper.resumed(handover), handover


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
