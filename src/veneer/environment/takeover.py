"""How another program becomes the mount server, and then the keeper, of a mount that goes on.

T1: the new program has begun as a keeper, in a process of its own that then ends, and its server has loaded everything and
    understood what it takes over, before the old one is told to end; until then nothing has changed, and every failure is
    the new one's alone.
T2: the keeper becomes the new program only when the new server has answered the kernel; until then the old program can start a
    server of its own again. From then on there may be nothing to go back to: the new files may lie where the old ones did.
T3: what is handed over has a version; another version than its own makes the new one refuse.

The new program gets one descriptor: a memory file with ``Handover`` in JSON, which names the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from veneer.environment.serving import Content
from veneer.model.errors import VeneerError, printable
from veneer.model.program import Program
from veneer.mount import succession
from veneer.mount.session import Session
from veneer.mount.succession import READY

FORMAT = 1
"""Of ``Handover``, of the channel to the supervisor and of the figures."""
FORMATS = {"hand-over": FORMAT, **succession.FORMATS}
SUCCESSOR = "veneer.environment.successor"
LOAD_SECONDS = 20.0
"""How long a new program may take until it could serve."""
ANSWER_SECONDS = 5.0
"""How long a new server may take for its first answer."""
_ANSWERED = b"y"
_MOST = 1 << 20
_SAID = 4096


@dataclass(frozen=True, slots=True)
class Handover:
    """``fds``: by what they are for. ``pids``: of the children, by the same names. ``lingering``: as of the keeper's.
    ``number``: of the server that runs, or is about to. ``mounted_on``: as the keeper sees it."""

    content: Content
    session: Session
    number: int
    since: float
    about: Mapping[str, Any]
    mounted_on: str
    fds: Mapping[str, int]
    pids: Mapping[str, int]
    lingering: Mapping[int, int]

    def file(self) -> int:
        """A memory file that holds it."""
        document = {
            "formats": FORMATS,
            "content": self.content.to_json(),
            "session": self.session.to_json(),
            "number": self.number,
            "since": self.since,
            "about": dict(self.about),
            "mounted_on": self.mounted_on,
            "fds": dict(self.fds),
            "pids": dict(self.pids),
            "lingering": {str(fd): pid for fd, pid in self.lingering.items()},
        }
        fd = os.memfd_create("veneer-hand-over")
        os.write(fd, json.dumps(document).encode())
        os.lseek(fd, 0, os.SEEK_SET)
        return fd

    @classmethod
    def read(cls, fd: int) -> Handover:
        """VeneerError: of another version. ValueError, KeyError, TypeError: not one."""
        document = json.loads(os.pread(fd, _MOST, 0))
        succession.check_formats(document["formats"], FORMATS)
        return cls(
            Content.from_json(document["content"]),
            Session.from_json(document["session"]),
            document["number"],
            document["since"],
            document["about"],
            document["mounted_on"],
            document["fds"],
            document["pids"],
            {int(number): pid for number, pid in document["lingering"].items()},
        )


def become(program: Program, role: str, handover: Handover, inherited: Sequence[int]) -> NoReturn:
    """Replace this process's program. OSError when it cannot be executed."""
    file = handover.file()
    kept = [fd for fd in (file, *inherited) if fd >= 0]
    try:
        for fd in kept:
            os.set_inheritable(fd, True)
        os.execve(program.python, program.command(SUCCESSOR, role, str(file)), program.environ(os.environ))
    finally:
        for fd in kept:
            os.set_inheritable(fd, False)
        os.close(file)


class Heir:
    """A process of another program, which loads and says that it could serve; a server does when it is told to."""

    def __init__(self, pid: int, ready_fd: int, go_fd: int, said_fd: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self._ready = ready_fd
        self._go = go_fd
        self._said = said_fd

    def obstacle(self, others: Sequence[int], seconds: float = LOAD_SECONDS) -> str | None:
        """Wait until it could serve: None. Else why not; "" when one of ``others`` became readable before."""
        poll = select.poll()
        for fd in (self._ready, *(other for other in others if other >= 0)):
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(1000 * seconds)}
        if self._ready in ready:
            if os.read(self._ready, len(READY)) == READY:
                return None
            return self.last_words() or "it ended without a word"
        return "" if ready else f"it was not ready after {seconds:g} s"

    def go(self) -> None:
        """BrokenPipeError: it has ended."""
        os.write(self._go, b"!")

    def last_words(self) -> str:
        said = os.pread(self._said, _MOST, 0)[-_SAID:].decode(errors="replace").strip()
        return printable(said.splitlines()[-1]) if said else ""

    def close(self) -> None:
        for fd in (self._ready, self._go, self._said):
            os.close(fd)

    def dismiss(self) -> None:
        """It never served: end it."""
        self.close()
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)


def answers(path: str, server: int, seconds: float = ANSWER_SECONDS) -> bool:
    """Whether ``server`` (a pidfd) answers for what is mounted on ``path``; where this cannot be told, whether it lives.

    Another process asks, by statfs(2), which the kernel always passes on: this one must never wait for a mount. Nor for
    the one that asks: once a server has read its question nothing ends it but an answer, perhaps of the next server. So it
    is nobody's child, and keeps nothing open.
    """
    told, teller = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            if os.fork() == 0:
                _ask(path, teller)
        finally:
            os._exit(0)
    os.close(teller)
    os.waitpid(pid, 0)
    poll = select.poll()
    for fd in (told, server):
        poll.register(fd, select.POLLIN)
    ready = {fd for fd, _ in poll.poll(1000 * seconds)}
    answered = told in ready and os.read(told, 1) == _ANSWERED
    os.close(told)
    return answered and server not in ready


def has_ended(pid: int, name: str = "") -> bool:
    """Whether no more is left of a server than threads that the kernel does not let go, until a page's READ is answered perhaps.

    Only a successor can do that. False where /proc does not show it, or shows something that is not called ``name``.
    """
    try:
        before, _, after = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")
    except OSError:
        return False
    return after.split()[0] == "Z" and (not name or before.endswith(f"({name}"))


def _ask(path: str, teller: int) -> NoReturn:
    try:
        os.closerange(0, teller)
        os.closerange(teller + 1, os.sysconf("SC_OPEN_MAX"))
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        with contextlib.suppress(FileNotFoundError, PermissionError):  # it is out of sight
            os.statvfs(path)
        os.write(teller, _ANSWERED)
    finally:
        os._exit(0)


def refusal(error: BaseException) -> str:
    """One line for whoever asked."""
    if isinstance(error, VeneerError):
        return error.story()
    return printable(f"{type(error).__name__}: {error}")
