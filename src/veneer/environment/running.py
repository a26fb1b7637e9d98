"""What runs now, and how to speak to it: each keeper listens on a socket in ``environments_root/.running``.

One packet of JSON there, one back, then the end. Only the owner, and root, may enter the directory. ``{"do": "about"}`` gives
what ``About`` holds; ``{"do": "upgrade", "program": {...}}`` gives ``{"version": v}``, or ``{"error": why, "again": bool}``: then
everything runs on as before; ``again``: it may succeed at once. ``{"do": "adopt", "program": {...}}``, answered by ``{}``: the next
store daemon is to be this program.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from veneer.model.errors import VeneerError
from veneer.model.program import Program

DIRECTORY = ".running"
ASK_SECONDS = 5.0
CALLER_SECONDS = 1.0
"""How long a caller may take to say what it wants, and to take the answer."""
_LIMIT = 1 << 16
_TRIES = 10
_SHOWN = 200

Kind = Literal["environment", "mount"]
Answer = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Listening:
    """A keeper's socket; ``path`` is to be removed by whoever made it."""

    socket: socket.socket
    path: Path

    def close(self) -> None:
        self.socket.close()

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()
            self.path.parent.rmdir()  # when it is the last


@dataclass(frozen=True, slots=True)
class About:
    """``name``: of an environment that has one. ``place``: where a mount is. ``version``: of the program that serves.
    ``wire``: version of the request protocol that it speaks."""

    path: Path
    pid: int
    kind: Kind
    name: str | None
    place: str | None
    command: str
    cache_root: str
    version: str
    wire: int

    @property
    def label(self) -> str:
        if self.kind == "mount":
            return f"mount {self.place}"
        return self.name or f"run {self.command or self.pid}"


def describe(
    kind: Kind, *, cache_root: Path, name: str | None = None, place: str | None = None, command: str = ""
) -> dict[str, Any]:
    """What stays the same of an ``About``."""
    return {
        "kind": kind,
        "name": name,
        "place": place,
        "command": command[:_SHOWN],
        "cache_root": str(cache_root),
    }


def listen(root: Path) -> Listening | None:
    """None when nothing can be written below ``root``: then nobody can speak to the keeper."""
    directory = root / DIRECTORY
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = directory / f"{os.getpid()}-{os.urandom(4).hex()}.sock"
    for _ in range(_TRIES):
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _sweep(directory)
            with _entered(directory) as there:
                bound.bind(f"{there}/{path.stem}.new")  # one that does not listen yet looks left behind
                bound.listen(4)
            path.with_suffix(".new").rename(path)
            bound.setblocking(False)
            return Listening(bound, path)
        except FileNotFoundError:  # somebody was the last there, and removed it
            continue
        except OSError:
            break
    bound.close()
    return None


def _sweep(directory: Path) -> None:
    """Remove what killed processes left."""
    for path in directory.glob("*.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller, contextlib.suppress(OSError):
            caller.setblocking(False)
            try:
                with _entered(directory) as there:
                    caller.connect(f"{there}/{path.name}")
            except ConnectionRefusedError:
                path.unlink()


def find(root: Path) -> list[About]:
    """Everything that runs, and answers, by process id. Leftovers of killed processes are removed."""
    found = []
    try:
        names = [entry.name for entry in (root / DIRECTORY).iterdir() if entry.name.endswith(".sock")]
    except OSError:
        return []
    for name in names:
        path = root / DIRECTORY / name
        try:
            answer = ask(path, {"do": "about"}, ASK_SECONDS)
            found.append(About(path, **answer))
        except ConnectionRefusedError:
            with contextlib.suppress(OSError):
                path.unlink()
        except (OSError, ValueError, TypeError):
            continue  # it has just ended, or is of another version
    return sorted(found, key=lambda about: about.pid)


def upgrade(about: About, program: Program, seconds: float) -> Answer:
    """Have ``program`` take over. OSError when it ended or does not answer."""
    return ask(about.path, {"do": "upgrade", "program": program.to_json()}, seconds)


def adopt(about: About, program: Program) -> None:
    """Have it start ``program`` when the store daemon ends. OSError when it ended or does not answer."""
    ask(about.path, {"do": "adopt", "program": program.to_json()}, ASK_SECONDS)


def ask(path: Path, request: Mapping[str, Any], seconds: float) -> Answer:
    """OSError; ValueError: it answers something else."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
        caller.settimeout(seconds)
        with _entered(path.parent) as there:
            caller.connect(f"{there}/{path.name}")
        caller.send(json.dumps(request).encode())
        answer = json.loads(caller.recv(_LIMIT) or b"null")
    if not isinstance(answer, dict):
        raise ValueError("it ended without an answer")
    return answer


def answer_one(
    listening: socket.socket,
    about: Callable[[], Answer],
    upgrade: Callable[[Program, socket.socket], Answer],
    adopt: Callable[[Program], None],
) -> None:
    """Take one caller and answer it. Whatever is wrong with it concerns nobody else."""
    with contextlib.suppress(OSError):
        caller, _ = listening.accept()
        with caller:
            caller.settimeout(CALLER_SECONDS)
            try:
                request = json.loads(caller.recv(_LIMIT))
                if request["do"] == "about":
                    answer = about()
                elif request["do"] == "upgrade":
                    answer = upgrade(Program.from_json(request["program"]), caller)
                elif request["do"] == "adopt":
                    adopt(Program.from_json(request["program"]))
                    answer = {}
                else:
                    answer = {"error": "it cannot do that", "again": False}
            except (ValueError, KeyError, TypeError):
                answer = {"error": "it was asked something that it does not understand", "again": False}
            except VeneerError as error:
                answer = {"error": error.story(), "again": False}
            reply(caller, answer)


def reply(caller: socket.socket, answer: Answer) -> None:
    with contextlib.suppress(OSError):
        caller.send(json.dumps(answer).encode())


@contextlib.contextmanager
def _entered(directory: Path) -> Any:
    """A short name for it: socket addresses end at 107 bytes."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
