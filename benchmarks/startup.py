"""How long ``veneer run`` takes when everything is there already.

::

    ./dev bench startup [--rounds N] [--import-times]

``veneer run true`` from its start to its end, and ``veneer run cat FILE`` from its start to the first byte of a file whose
path is in the cache; as root and as a user without rights, with a daemon that is up and with none (a private one is
started and ends). ``--import-times`` shows instead which imports cost most, as ``python -X importtime`` says.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.support.results import Table, in_turns
from benchmarks.support.stage import BenchError, daemon_ended, remove, veneer_command
from tests.support.users import other_user
from veneer.cli.demo_cache import File, add_path, store_path, write_header
from veneer.formats.signature import SecretKey

SECONDS = 0.3
"""The target."""
_TARGET = "target"
_TRUE, _CAT = "veneer run true: end", "veneer run cat FILE: first byte"
_ALONE, _SHARED = "no daemon", "daemon"
_PROBE = """
import subprocess, sys, time
began = time.monotonic()
with subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0) as run:
    run.stdout.read(1)
    first = time.monotonic()
    run.stdout.read()
print(first - began, time.monotonic() - began)
sys.exit(run.returncode)
"""
"""Runs as the user, so that becoming that user is not measured. Prints seconds to the first byte and to the end."""
_ABSENT = f"/nix/store/{'0' * 32}-absent"
_STAY = f"test -e {_ABSENT}; echo; read end"
"""Keeps its daemon; says so when the daemon has answered."""
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Who:
    """How to start ``python`` and ``veneer`` as some user, with a cache directory that has ``file``'s store path."""

    name: str
    python: list[str]
    veneer: list[str]
    environment: dict[str, str]
    home: Path
    options: list[str]
    file: str

    @property
    def cache_dir(self) -> Path:
        return self.home / "cache"

    def start(self, *words: str, **more: object) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
        return subprocess.Popen(words, env=self.environment, cwd=self.home, text=True, **pipes)  # type: ignore[call-overload,no-any-return]

    def run(self, *words: str) -> tuple[str, str]:
        """Standard output and error of a command that succeeds."""
        process = self.start(*words, stdin=subprocess.DEVNULL)
        output, errors = process.communicate(timeout=60)
        if process.returncode:
            raise BenchError(f"{' '.join(words)[-300:]}: status {process.returncode}: {errors.strip()}")
        return output, errors

    def veneer_run(self, *command: str) -> list[str]:
        return [*self.veneer, "run", "--quiet", *self.options, "--", *command]

    def seconds(self, *command: str) -> tuple[float, float]:
        """To the first byte and to the end of ``veneer run COMMAND``."""
        output, _ = self.run(*self.python, "-c", _PROBE, *self.veneer_run(*command))
        first, end = map(float, output.split())
        return first, end


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11, help="how often each is measured [11]")
    parser.add_argument("--import-times", action="store_true", help="show the most expensive imports instead")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        users = _users(stack)
        if options.import_times:
            print(_import_times(users[0]))
            return
        columns = [f"{who.name}, {daemon}" for who in users for daemon in (_ALONE, _SHARED)]
        table = Table("Start of an environment, everything cached", [_TARGET, *columns])
        measure(users, _ALONE, table, options.rounds, before=_alone)
        with contextlib.ExitStack() as others:
            for who in users:
                others.enter_context(_other_environment(who))
            measure(users, _SHARED, table, options.rounds, before=lambda who: None)
    print(table.markdown())


def measure(users: list[Who], daemon: str, table: Table, rounds: int, before: Callable[[Who], None]) -> None:
    """Fill the columns of one state of the daemon. ``before`` is called, unmeasured, before each run."""
    ways: dict[str, Callable[[], float]] = {}
    cells: dict[str, tuple[str, str]] = {}

    def add(who: Who, work: str, command: list[str]) -> None:
        def once() -> float:
            before(who)
            first, end = who.seconds(*command)
            return end if work == _TRUE else first

        once()  # files are in the page cache from now on
        name, column = f"{who.name} {work}", f"{who.name}, {daemon}"
        ways[name], cells[name] = once, (work, column)
        table.add(work, _TARGET, SECONDS)
        table.target(work, column, 1.0)

    for who in users:
        add(who, _TRUE, ["true"])
        add(who, _CAT, ["cat", who.file])
    in_turns(rounds, ways, lambda name, value: table.add(*cells[name], value))


def _users(stack: contextlib.ExitStack) -> list[Who]:
    """This user; for root an ordinary one too, where that can be had."""
    home = _home(stack)
    found = [_with_cache(getpass.getuser(), [sys.executable], veneer_command(), dict(os.environ), home)]
    if os.geteuid() == 0:
        home = _home(stack)
        user = other_user(home)
        if isinstance(user, str):
            print(f"without another user: {user}", file=sys.stderr)
        else:
            # The probe is that user already: veneer needs no prefix.
            python = [*user.prefix, user.python]
            veneer = [user.python, "-c", "from veneer.cli.main import main; main()"]
            found.append(_with_cache("user", python, veneer, user.environment, user.home))
    return found


def _home(stack: contextlib.ExitStack) -> Path:
    made = Path(tempfile.mkdtemp())
    stack.callback(remove, made)
    made.chmod(0o755)
    return made


def _with_cache(
    name: str, python: list[str], veneer: list[str], environment: dict[str, str], home: Path
) -> Who:
    key, path = SecretKey.generate("startup-1"), store_path("startup")
    write_header(home / "source")
    add_path(home / "source", path, {"file": File(b"x" * 1000)}, [], key)
    file = f"/nix/store/{path.basename}/file"
    options = ["--cache", f"file://{home}/source", "--trusted-public-key", str(key.public_key())]
    options += ["--cache-dir", str(home / "cache")]
    who = Who(name, python, veneer, environment, home, options, file)
    who.seconds("cat", file)
    return who


def _alone(who: Who) -> None:
    with daemon_ended(who.cache_dir):
        return


@contextlib.contextmanager
def _other_environment(who: Who) -> Iterator[None]:
    """While it runs, its daemon serves the cache directory."""
    _alone(who)
    as_user = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
    with who.start(*who.python, "-c", as_user, *who.veneer_run("sh", "-c", _STAY), stderr=None) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        if not other.stdout.readline():
            raise BenchError("veneer run ended early")
        yield
        print("end", file=other.stdin, flush=True)


def _import_times(who: Who) -> str:
    """What ``veneer run true`` imports in its own processes, and what its daemon does."""
    _alone(who)
    log = who.cache_dir / "daemon.log"
    start = log.stat().st_size
    environment = who.environment | {"PYTHONPROFILEIMPORTTIME": "1"}
    command = who.veneer_run("true")
    done = subprocess.run(command, env=environment, cwd=who.home, capture_output=True, text=True, check=True)
    _alone(who)
    return "\n".join([_summary("veneer run", done.stderr), _summary("its daemon", log.read_text()[start:])])


def _summary(process: str, text: str) -> str:
    rows = [
        (int(own), int(all_of_it), name)
        for own, all_of_it, name in re.findall(
            r"^import time:\s+(\d+) \|\s+(\d+) \| +(\S+)$", text, re.MULTILINE
        )
    ]
    lines = [f"{process}: {len(rows)} modules, {sum(own for own, _, _ in rows) / 1000:.0f} ms", ""]
    lines += ["      own   with its own imports (ms)"]
    for own, all_of_it, name in sorted(rows, reverse=True)[:_SHOWN]:
        lines.append(f"{own / 1000:9.1f} {all_of_it / 1000:9.1f}  {name}")
    lines += ["", "      of which whole packages", ""]
    for own, all_of_it, name in sorted(rows, key=lambda row: -row[1])[:_SHOWN]:
        lines.append(f"{own / 1000:9.1f} {all_of_it / 1000:9.1f}  {name}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
