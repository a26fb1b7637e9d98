"""A process inside an environment that does as the test tells it: one JSON request per line in, one JSON answer out.

Sent as source text to ``python -c``, so it runs as any user and imports the standard library only. Every answer has
``seconds``; one that failed has ``error``, the errno's name. Names are bytes decoded as Latin-1.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

_PIECE = 1 << 20

Row = list[Any]
"""[kind and mode, size (not of directories), digest or target, mtime in ns]."""


def census(top: str) -> dict[str, Row]:
    """All that a NAR keeps of the tree at ``top``, and the modes and times that Nix gives it. Reads everything."""
    rows: dict[str, Row] = {}
    waiting = [os.fsencode(top)]
    while waiting:
        path = waiting.pop()
        found = os.lstat(path)
        size, content = found.st_size, ""
        if stat.S_ISDIR(found.st_mode):
            size = 0
            waiting += [path + b"/" + name for name in os.listdir(path)]  # noqa: PTH208 (names are bytes)
        elif stat.S_ISLNK(found.st_mode):
            content = os.readlink(path).decode("latin-1")  # noqa: PTH115
        else:
            content = read(path.decode("latin-1"))["digest"]
        name = path[len(os.fsencode(top)) :].decode("latin-1")
        rows[name] = [stat.filemode(found.st_mode), size, content, found.st_mtime_ns]
    return rows


def read(path: str, offset: int = 0, size: int | None = None, *, cold: bool = False) -> dict[str, Any]:
    """``cold``: the kernel forgets the file's pages first. ``size`` counts what was read, also before an error."""
    digest, count, last, failed = hashlib.sha256(), 0, b"", {}
    with open(path.encode("latin-1"), "rb", buffering=0) as file:
        if cold:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(offset)
        try:
            while (size is None or count < size) and (piece := file.read(min(_PIECE, size or _PIECE))):
                digest.update(piece)
                count += len(piece)
                last = piece
        except OSError as error:
            failed = _failure(error)
    return {"digest": digest.hexdigest(), "size": count, "last": last[-64:].decode("latin-1"), **failed}


def crowd(path: str, count: int) -> dict[str, Any]:
    """``count`` processes read the file; all begin when the last one is ready. Their digests, each once."""
    gate, go = os.pipe()
    words = ["sh", "-c", 'read -r go; sha256sum < "$1" | cut -d" " -f1', "sh", path]
    crew = [subprocess.Popen(words, stdin=gate, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    os.close(gate)
    os.write(go, b"\n" * count)  # one byte each: the shell reads no further than its line
    os.close(go)
    answers = [process.communicate()[0].strip() for process in crew]
    return {"digests": sorted(set(answers)), "readers": len(answers)}


def look(path: str) -> dict[str, Any]:
    found = os.lstat(path.encode("latin-1"))
    return {"mode": stat.filemode(found.st_mode), "size": found.st_size, "uid": found.st_uid}


ACTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "census": lambda tops: {"trees": {top: census(top) for top in tops}},
    "read": read,
    "crowd": crowd,
    "look": look,
    "list": lambda path: {"names": [entry.name for entry in os.scandir(path)]},
}


def _failure(error: OSError) -> dict[str, Any]:
    return {"error": errno.errorcode.get(error.errno or 0, str(error))}


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        began = time.monotonic()
        try:
            answer = ACTIONS[request.pop("do")](**request)
        except OSError as error:
            answer = _failure(error)
        answer["seconds"] = time.monotonic() - began
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
