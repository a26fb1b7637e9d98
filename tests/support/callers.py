"""Who calls veneer in end-to-end tests: root or an ordinary user, each with a home, a cache directory and a configuration."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.users import OtherUser

PROBE = Path(__file__).with_name("probe.py")
SECONDS = 60
_TICK = threading.Event()
_LOST = (
    "exception was never retrieved",
    "was destroyed but it is pending",
    "was never awaited",
    "unexpected failure:",
    "Unhandled exception in",
    "Exception in callback",
    "exception calling callback",
)


def eventually(holds: Callable[[], Any], seconds: float = 20) -> Any:
    """What ``holds`` gives as soon as it is true; AssertionError after ``seconds``. For states that nobody announces."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"it did not come true within {seconds} s"
        _TICK.wait(0.05)
    return found


def lost_reports(log: str) -> list[str]:
    """Lines in which asyncio tells of failures and tasks that nobody waited for."""
    return [line for line in log.splitlines() if any(report in line for report in _LOST)]


@dataclass
class Caller:
    """How to start programs as this user. ``sources``: the flags that every command with sources gets."""

    home: Path
    prefix: list[str]
    environment: dict[str, str]
    python: str
    is_root: bool
    sources: list[str] = field(default_factory=list)

    @classmethod
    def root(cls, home: Path) -> Caller:
        return cls(home, [], dict(os.environ), sys.executable, True)

    @classmethod
    def user(cls, user: OtherUser) -> Caller:
        return cls(user.home, list(user.prefix), user.environment, user.python, False)

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    def use(self, *urls: str, key: str = "") -> None:
        """The binary caches to use from now on."""
        self.sources = [word for url in urls for word in ("--cache", url)]
        self.sources += ["--trusted-public-key", key] if key else []

    def configure(self, **keys: Any) -> None:
        """The configuration file; the environments lie in ``home`` in any case."""
        keys.setdefault("environments_dir", str(self.home / "environments"))
        text = "".join(f"{name.replace('_', '-')} = {json.dumps(value)}\n" for name, value in keys.items())
        (self.home / "config.toml").write_text(text)

    def words(self, command: str, *words: str | Path, sources: bool = True) -> list[str]:
        """The whole command line of ``veneer COMMAND WORDS``."""
        if not (self.home / "config.toml").exists():
            self.configure()
        own = ["--cache-dir", str(self.cache), "--config", str(self.home / "config.toml")]
        given = [*(self.sources if sources else []), *own, *map(str, words)]
        return [*self.prefix, self.python, "-m", "veneer.cli.main", command, *given]

    def veneer(
        self, command: str, *words: str | Path, sources: bool = True, timeout: float = SECONDS
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.words(command, *words, sources=sources),
            env=self.environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )

    def popen(self, words: list[str], **options: Any) -> subprocess.Popen[str]:
        """With pipes, and in a session of its own, unless ``options`` say otherwise."""
        given: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        given |= {"start_new_session": True, **options}
        return subprocess.Popen(words, env=self.environment, cwd=self.home, text=True, **given)

    @contextlib.contextmanager
    def running(
        self, command: str, *words: str | Path, sources: bool = True
    ) -> Iterator[subprocess.Popen[str]]:
        """``veneer COMMAND WORDS`` that has printed "up"; killed after the block unless it has ended."""
        process = self.popen(self.words(command, *words, sources=sources))
        try:
            assert process.stdout is not None
            line = read_line(process.stdout)
            assert line == "up\n", line + process.communicate(timeout=20)[1]
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=60)

    def document(
        self, command: str, *words: str | Path, status: int = 0, sources: bool = True
    ) -> dict[str, Any]:
        """What ``veneer COMMAND --json WORDS`` says, with this exit status."""
        done = self.veneer(command, "--json", *words, sources=sources)
        assert done.returncode == status, (done.stdout, done.stderr)
        document = json.loads(done.stdout or done.stderr)
        assert isinstance(document, dict)
        return document

    def status(self) -> dict[str, Any]:
        return self.document("status")

    def forget(self) -> None:
        """As on another machine: nothing is in the cache."""
        self.wait_for_daemons_end()
        shutil.rmtree(self.cache)

    def stories(self) -> str:
        """All stories of the running daemon as one text."""
        return "\n".join(
            f"{story['kind']} {story['path']}: {story['text']}" for story in self.status()["stories"]
        )

    def probe_words(self) -> list[str]:
        return [self.python, "-c", PROBE.read_text()]

    @contextlib.contextmanager
    def environment_probe(self, *options: str) -> Iterator[Probe]:
        """``veneer run`` of a probe; ``Probe.finish`` or the end of the block ends it."""
        probe = Probe(self.popen(self.words("run", *options, "--", *self.probe_words())))
        with probe.ended():
            yield probe

    @contextlib.contextmanager
    def mount_probe(self, target: Path) -> Iterator[Probe]:
        """``veneer mount`` and a probe that sees it: on this machine for root, in an own namespace otherwise."""
        target.mkdir(exist_ok=True)
        if not self.is_root:
            os.chown(target, self.home.stat().st_uid, -1)
        words = self.words("mount", target)
        outer = [*self.prefix] if self.is_root else [*self.prefix, "unshare", "-Urm"]
        command = [
            *outer,
            "sh",
            "-c",
            _MOUNT_AND_PROBE,
            "sh",
            self.python,
            PROBE.read_text(),
            *words[len(self.prefix) :],
        ]
        process = self.popen(command)
        probe = Probe(process)
        with probe.ended():
            assert process.stderr is not None
            line = read_line(process.stderr)
            assert "mounted on" in line, line + _rest(process)
            yield probe

    def daemon_pid(self) -> int:
        """Of the daemon that holds the cache directory."""
        return int((self.cache / "lock").read_text())

    def lost_errors(self) -> list[str]:
        """What asyncio reported in the daemon's log, of tasks whose failure or end nobody waited for."""
        try:
            log = (self.cache / "daemon.log").read_text("utf-8", "replace")
        except FileNotFoundError:
            return []
        return lost_reports(log)

    def wait_for_daemons_end(self) -> None:
        """A private daemon outlives its last client by a moment."""
        if not (self.cache / "lock").exists():
            return

        def is_free() -> bool:
            with open(self.cache / "lock") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                return True

        eventually(is_free)


# The probe keeps the shell's place; the mount ends on SIGTERM when the probe has ended.
_MOUNT_AND_PROBE = """
python=$1 source=$2; shift 2
exec 3<&0
"$@" < /dev/null >&2 & mount=$!
"$python" -c "$source" <&3
kill $mount 2>/dev/null
wait $mount
"""


class Probe:
    """A running ``probe.py``. One question at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.errors = ""
        """Standard error, after ``finish``."""

    def tell(self, action: str, **request: Any) -> None:
        """Send without waiting for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": action, **request}) + "\n")
        self.process.stdin.flush()

    def answer(self, seconds: float = SECONDS) -> dict[str, Any]:
        """The next answer; AssertionError when it does not come."""
        assert self.process.stdout is not None
        line = read_line(self.process.stdout, seconds)
        assert line, f"the probe ended: {_rest(self.process)}"
        found = json.loads(line)
        assert isinstance(found, dict)
        return found

    def ask(self, action: str, *, within: float = SECONDS, **request: Any) -> dict[str, Any]:
        self.tell(action, **request)
        return self.answer(within)

    def has_answer(self) -> bool:
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def finish(self) -> int:
        """End of input; the exit status."""
        _, self.errors = self.process.communicate(timeout=SECONDS)
        return self.process.returncode

    @contextlib.contextmanager
    def ended(self) -> Iterator[None]:
        try:
            yield
            if self.process.poll() is None:
                self.finish()
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGTERM)
                try:
                    self.process.wait(10)
                except subprocess.TimeoutExpired:
                    os.killpg(self.process.pid, signal.SIGKILL)
            for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            self.process.wait(SECONDS)


def read_line(pipe: Any, seconds: float = SECONDS) -> str:
    """The next line; "" at the end of file. AssertionError when none comes. The pipe must have been read by lines only."""
    assert select.select([pipe], [], [], seconds)[0], "no line came"
    return str(pipe.readline())


def _rest(process: subprocess.Popen[str]) -> str:
    process.terminate()
    try:
        return process.communicate(timeout=10)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        return "(it did not end)"
