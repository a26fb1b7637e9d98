"""A store that is worth reading, its readers (``readers.py``), and how to find the mount servers that are to be killed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.support.callers import Caller, eventually, read_line
from tests.support.signed_cache import MadePath, SignedCache
from veneer.formats.nar import nar_of, tree_of_nar
from veneer.model.store_path import DEFAULT_STORE_DIR, StorePath
from veneer.model.tree import Directory, RegularFile

READERS = Path(__file__).with_name("readers.py")
FILES = 8


@dataclass(frozen=True, slots=True)
class Readable:
    """``digests``: SHA-256 of the files, by path below the store."""

    cache: SignedCache
    digests: dict[str, str]
    tops: list[str]
    programs: list[str]

    def plan(self, store: str = DEFAULT_STORE_DIR) -> str:
        """What ``readers.py`` is told when the store is at ``store``."""
        files = {f"{store}/{path}": digest for path, digest in self.digests.items()}
        tops, programs = ([f"{store}/{name}" for name in names] for names in (self.tops, self.programs))
        return json.dumps({"files": files, "tops": tops, "programs": programs})


def make_readable(directory: Path, paths: int) -> Readable:
    """Store paths with files of up to 600 kB and a real program."""
    program = Path(shutil.which("echo") or "/bin/echo").read_bytes()
    made: list[MadePath] = []
    digests: dict[str, str] = {}
    for which in range(paths):
        name = f"storm-{which}"
        seed = hashlib.sha256(name.encode()).digest()
        contents = {len(program): program}
        for n in range(FILES):
            size = 1000 + n * 80_000 + which
            contents[size] = hashlib.shake_256(seed + bytes([n])).digest(size)
        entries = [
            (b"echo" if data is program else b"file-%d" % size, RegularFile(size, data is program, 0))
            for size, data in contents.items()
        ]
        tree = Directory(tuple(sorted(entries)))
        nar = b"".join(nar_of(tree, lambda file, contents=contents: [contents[file.size]]))  # type: ignore[misc]
        path = StorePath(seed.hex()[:32].replace("e", "z"), name)
        made.append(MadePath(path, nar, tree_of_nar([nar]), b""))
        for entry, file in entries:
            data = contents[file.size]
            digests[f"{path.basename}/{entry.decode()}"] = hashlib.sha256(data).hexdigest()
    tops = [each.path.basename for each in made]
    return Readable(SignedCache(directory, made), digests, tops, [f"{top}/echo" for top in tops])


@dataclass(frozen=True, slots=True)
class Reading:
    """``readers.py`` at work in ``process``."""

    process: subprocess.Popen[str]

    def result(self) -> dict[str, Any]:
        """What the readers found, who end now, and ``said``: what the process wrote to standard error."""
        out, said = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, said
        found = json.loads(out.splitlines()[-1])
        assert isinstance(found, dict)
        return {**found, "said": said}

    def check(self, more_than: int = 0) -> str:
        """The readers end; they noticed nothing, in more than so many reads. What the process said."""
        found = self.result()
        assert found["errors"] == []
        assert found["wrong"] == []
        assert found["reads"] > more_than
        print(f"{found['reads']} reads, longest {found['longest']:.2f} s")
        return str(found["said"])


@contextlib.contextmanager
def reading_in_run(caller: Caller, readable: Readable, *options: str) -> Iterator[Reading]:
    """Readers in a ``veneer run`` with ``options``, whose process is the one of the reading."""
    words = [caller.python, "-c", READERS.read_text(), readable.plan()]
    with _reading(caller.popen(caller.words("run", *options, "--", *words))) as reading:
        yield reading


@contextlib.contextmanager
def reading_below(target: Path, caller: Caller, readable: Readable) -> Iterator[Reading]:
    """Readers of the store that is mounted at ``target``."""
    words = [caller.python, "-c", READERS.read_text(), readable.plan(str(target))]
    with _reading(caller.popen(words)) as reading:
        yield reading


@contextlib.contextmanager
def _reading(process: subprocess.Popen[str]) -> Iterator[Reading]:
    try:
        assert process.stdout is not None
        assert read_line(process.stdout, 60) == "reading\n"
        yield Reading(process)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@contextlib.contextmanager
def mounted(caller: Caller) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A ``veneer mount`` and where it is. If it still runs after the block, it ends well; it is unmounted in any case."""
    target = caller.home / "mnt"
    target.mkdir()
    mount = caller.popen(caller.words("mount", target), stdin=subprocess.DEVNULL)
    try:
        assert mount.stderr is not None
        assert "mounted on" in read_line(mount.stderr)
        yield mount, target
        if mount.poll() is None:
            mount.terminate()
            assert mount.wait(30) == 0
    finally:
        if mount.poll() is None:
            mount.terminate()
        mount.wait(30)
        for pipe in (mount.stdout, mount.stderr):
            if pipe is not None:
                pipe.close()
    assert str(target) not in Path("/proc/self/mountinfo").read_text()


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def server_of_run(run: int) -> int:
    """The mount server of a ``veneer run``; 0: there is none now."""
    keepers = [pid for pid in children(run) if _name(pid) == "veneer-keeper"]
    return next((pid for keeper in keepers for pid in children(keeper) if _name(pid) == "veneer-mount"), 0)


def server_of_mount(mount: int) -> int:
    """The same of a ``veneer mount``."""
    return next((pid for pid in children(mount) if b"veneer.mount\0" in _line(pid)), 0)


def kill_server(find: Callable[[], int], ended: Callable[[], object] = lambda: False) -> None:
    """Kill the server that ``find`` gives, as soon as there is one; it is gone then. Unless ``ended``, meanwhile."""
    pid = int(eventually(lambda: find() or (-1 if ended() else 0)))
    if pid > 0:
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: find() != pid)


def kill_at_random(
    kills: int, kill: Callable[[], None], random: Random, seconds: tuple[float, float] = (0.05, 0.4)
) -> None:
    """``kills`` times, each some time within ``seconds`` after the one before."""
    clock = threading.Event()
    for _ in range(kills):
        clock.wait(random.uniform(*seconds))
        kill()


def kill_daemon(caller: Caller) -> None:
    pid = caller.daemon_pid()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: _holder(caller) not in (0, pid))


def _holder(caller: Caller) -> int:
    return int((caller.cache / "lock").read_text() or "0")


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
