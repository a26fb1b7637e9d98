"""Load on one store daemon: what is read and by whom, and how processes are watched meanwhile.

``benchmarks/load.py`` runs it for long, ``tests/integration/test_load.py`` for a moment. Each kind of load returns its
figures and raises ``LoadError`` for whatever a load must not do: errors, wrong bytes, growth, what is left afterwards.
"""

from __future__ import annotations

import contextlib
import json
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.callers import Caller, eventually, lost_reports, read_line
from tests.support.load_readers import PIECE
from tests.support.published_cache import PublishedCache
from tests.support.signed_cache import MadePath, SignedCache, make_path
from tests.support.storm import server_of_run
from veneer.daemon.listening import DEFAULT_NAME
from veneer.formats.signature import SecretKey
from veneer.model.store_path import DEFAULT_STORE_DIR

READERS = Path(__file__).with_name("load_readers.py")
SLACK = 16 << 20
"""Bytes that a process may have more in the last quarter than in the second one: caches that fill, fragments."""
MORE_FILES = 96
"""Descriptors that an idle daemon may have more than before: sparse NARs are kept open."""


class LoadError(AssertionError):
    """What a load must not do."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Of a process. ``resident`` in bytes."""

    resident: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Sample:
        proc = Path("/proc") / str(pid)
        status = dict(
            line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line
        )
        files = sum(1 for _ in (proc / "fd").iterdir())
        return cls(int(status["VmRSS"].split()[0]) << 10, files, int(status["Threads"]))


@dataclass
class Watch:
    """Samples processes by name while it is entered."""

    pids: dict[str, int]
    seconds: float = 0.5
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def __enter__(self) -> Watch:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(self.seconds):
            for name, pid in self.pids.items():
                with contextlib.suppress(OSError, KeyError):  # it has ended
                    self.samples.setdefault(name, []).append(Sample.of(pid))

    def check_flat(self) -> None:
        """LoadError when a process grows after it has warmed up."""
        for name, samples in self.samples.items():
            second, last = self.quarter(samples, 1), self.quarter(samples, 3)
            if last.resident > second.resident + SLACK or last.descriptors > second.descriptors + MORE_FILES:
                raise LoadError(f"the {name} grows: {second} in the second quarter, {last} in the last")
            if last.threads > second.threads + 8:
                raise LoadError(f"the {name} has more and more threads: {second}, then {last}")

    @staticmethod
    def quarter(samples: Sequence[Sample], which: int) -> Sample:
        """Medians of the first (0) to the last (3) quarter."""
        size = max(1, len(samples) // 4)
        part = samples[which * size :][:size] or samples[-1:]
        return Sample(
            int(statistics.median(s.resident for s in part)),
            int(statistics.median(s.descriptors for s in part)),
            int(statistics.median(s.threads for s in part)),
        )

    def figures(self) -> dict[str, list[Sample]]:
        """Each quarter of each process."""
        return {
            name: [self.quarter(rows, which) for which in range(4)] for name, rows in self.samples.items()
        }


@dataclass(frozen=True)
class Stock:
    """Store paths in one cache, and the same bytes as plain files. ``files``: (name below the store, plain file, size)."""

    directory: Path
    key: str
    files: list[tuple[str, str, int]]

    @property
    def size(self) -> int:
        return sum(size for _, _, size in self.files)

    def plan(self, threads: int, *, once: bool, span: int = PIECE, store: str = DEFAULT_STORE_DIR) -> str:
        files = [(f"{store}/{name}", same, size) for name, same, size in self.files]
        return json.dumps({"files": files, "threads": threads, "once": once, "span": span})


def make_stock(home: Path, plain: int, plain_size: int, published: int, published_size: int) -> Stock:
    """``plain`` paths as Nix's own caches have them, ``published`` ones that are read in parts."""
    secret = SecretKey.generate("load-1")
    whole = [make_path(f"plain-{n}", plain_size + n) for n in range(plain)]
    parts = [make_path(f"published-{n}", published_size + n) for n in range(published)]
    SignedCache(home / "served", whole, compression="zstd", secret=secret)
    if parts:
        PublishedCache(home / "served", parts, secret=secret)
    (home / "plain").mkdir()
    return Stock(
        home / "served", str(secret.public_key()), [_plain(home / "plain", p) for p in (*whole, *parts)]
    )


def _plain(directory: Path, made: MadePath) -> tuple[str, str, int]:
    file = directory / made.path.basename
    file.write_bytes(made.data)
    return f"{made.path.basename}/data", str(file), len(made.data)


class OneDaemon:
    """``veneer daemon`` of ``caller``, watched. ``environment``: more of it, such as PYTHONASYNCIODEBUG."""

    def __init__(self, caller: Caller, *words: str, environment: dict[str, str] | None = None) -> None:
        self.caller = caller
        self._words = words
        self._environment = environment or {}
        self._log = caller.home / "daemon-under-load.log"

    def __enter__(self) -> OneDaemon:
        with open(self._log, "w") as log:
            caller = self.caller
            environment = caller.environment | self._environment
            words = caller.words("daemon", *self._words)
            self.process = subprocess.Popen(
                words, env=environment, cwd=caller.home, stdin=subprocess.DEVNULL, stderr=log
            )
        try:
            eventually(lambda: "serving" in self._log.read_text() or self.process.poll() is not None)
            if self.process.poll() is not None:
                raise LoadError(self._log.read_text())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._end()
        said = lost_reports(self._log.read_text())
        if kind is None and (said or self.process.returncode):
            raise LoadError(f"the daemon ended with {self.process.returncode}: {said[:10]}")

    def _end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    @property
    def pid(self) -> int:
        """The daemon itself; a caller's prefix may have put processes before it."""
        return self.caller.daemon_pid()

    def sample(self) -> Sample:
        return Sample.of(self.pid)

    def check_idle(self, before: Sample) -> Sample:
        """LoadError unless nothing is under way, open or left after all clients went. What it has now."""

        def is_idle() -> bool:
            found = self.caller.status()
            connected = {c["peer"]: c["open"] for c in found["connections"]}
            del connected[DEFAULT_NAME]  # the daemon's own session
            return (
                not found["downloads"] and found["busy"] == 0 and [*connected.values()] == [1]
            )  # our question

        try:
            eventually(is_idle)
        except AssertionError:
            raise LoadError(f"not idle: {self.caller.status()}") from None
        now = self.sample()
        if now.descriptors > before.descriptors + MORE_FILES or now.threads > before.threads + 96:
            raise LoadError(f"left behind: {before} before, {now} after")
        return now


def _read(process: subprocess.Popen[str], *, told: bool, seconds: float) -> dict[str, Any]:
    """The result of ``load_readers.py``. ``told``: by the end of its input to end."""
    out, said = process.communicate("" if told else None, timeout=seconds)
    if process.returncode:
        raise LoadError(f"status {process.returncode}: {said[-2000:]}")
    found = json.loads(out.splitlines()[-1])
    assert isinstance(found, dict)
    if found["wrong"] or found["failed"]:
        raise LoadError(f"{found['wrong']} wrong, {found['failed']} failed: {found['errors']}")
    return found


@contextlib.contextmanager
def _running(caller: Caller, words: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    process = caller.popen(list(words))
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def _readers(caller: Caller, plan: str, *options: str) -> list[str]:
    return caller.words("run", "--quiet", *options, "--", caller.python, "-c", READERS.read_text(), plan)


def environments(caller: Caller, stock: Stock, count: int, named: int) -> dict[str, Any]:
    """``count`` runs and ``named`` named environments over one daemon, all up at the same time; each reads everything."""
    caller.use(f"file://{stock.directory}", key=stock.key)
    with OneDaemon(caller) as daemon, contextlib.ExitStack() as stack:
        caller.veneer("run", "--", "true")
        before = daemon.sample()
        began = time.monotonic()
        plan = stock.plan(len(stock.files), once=True)
        names = [f"load-{n}" for n in range(named)]
        waiting = [
            "sh",
            "-c",
            'echo up; read go; exec "$@"',
            "sh",
            caller.python,
            "-c",
            READERS.read_text(),
            plan,
        ]
        runs = [
            stack.enter_context(_running(caller, caller.words("run", "--quiet", "--", *waiting)))
            for _ in range(count)
        ]
        for name in names:
            done = caller.veneer("up", name)
            if done.returncode:
                raise LoadError(done.stderr)
            stack.callback(caller.veneer, "down", name, sources=False)
        for run in runs:
            assert run.stdout is not None
            if read_line(run.stdout, 300) != "up\n":
                raise LoadError(f"not up: {run.communicate(timeout=20)[1]}")
        up = time.monotonic() - began
        open_ = len(caller.status()["connections"])
        most = daemon.sample()
        for run in runs:
            assert run.stdin is not None
            run.stdin.write("go\n")
            run.stdin.flush()
        words = [caller.python, "-c", READERS.read_text(), plan]
        for name in names:
            inside = caller.words("run", "--quiet", "--name", name, "--", *words)
            _read(stack.enter_context(_running(caller, inside)), told=False, seconds=300)
        found = [_read(run, told=False, seconds=300) for run in runs]
        seconds = time.monotonic() - began
        for name in names:
            caller.veneer("down", name, sources=False)
        after = daemon.check_idle(before)
    return {
        "environments": count + named,
        "seconds until all were up": up,
        "connections": open_,
        "reads": sum(each["reads"] for each in found) + named * len(stock.files),
        "seconds": seconds,
        "daemon": [before, most, after],
    }


def readers(caller: Caller, stock: Stock, threads: int, rate: int) -> dict[str, Any]:
    """``threads`` readers in one environment, each of a cold file of its own as far as there are enough.

    ``rate``: bytes per second of the source, so that most of them wait.
    """
    caller.use(f"file://{stock.directory}?bytes-per-second={rate}", key=stock.key)
    with OneDaemon(caller) as daemon:
        caller.veneer("run", "--", "true")
        before = daemon.sample()
        with _running(caller, _readers(caller, stock.plan(threads, once=True))) as run:
            found = _read(run, told=False, seconds=300)
        after = daemon.check_idle(before)
    return {**found, "daemon": [before, after]}


_LOOK = r"""xargs -a "$0" -n 500 sh -c 'find "$@" -printf "%s\\n" | wc -l' sh; read go"""


def lookups(caller: Caller, directory: Path, key: str, paths: Sequence[str], entries: int) -> dict[str, Any]:
    """Every entry of ``paths`` is looked up in one environment."""
    caller.use(f"file://{directory}", key=key)
    with OneDaemon(caller) as daemon:
        caller.veneer("run", "--", "true")
        before = daemon.sample()
        began = time.monotonic()
        listed = caller.home / "paths"
        listed.write_text("\n".join(paths))
        words = caller.words("run", "--quiet", "--", "sh", "-c", _LOOK, str(listed))
        with _running(caller, words) as run:
            assert run.stdout is not None
            found = 0
            while found < entries and (line := read_line(run.stdout, 600)):
                found += int(line)
            seconds = time.monotonic() - began
            server = Sample.of(server_of_run(run.pid))
            most = daemon.sample()
            run.communicate("go\n", timeout=60)
        if found != entries:
            raise LoadError(f"{found} entries of {entries}")
        after = daemon.check_idle(before)
    return {
        "paths": len(paths),
        "entries": found,
        "seconds": seconds,
        "mount server": [server],
        "daemon": [before, most, after],
    }


def churn(
    caller: Caller, stock: Stock, url: str, limit: int, threads: int, seconds: float, *, debug: bool = False
) -> dict[str, Any]:
    """Reads at random of far more than the cache may hold, for ``seconds``."""
    caller.use(url, key=stock.key)
    environment = {"PYTHONASYNCIODEBUG": "1"} if debug else {}
    with OneDaemon(caller, "--max-size", str(limit), environment=environment) as daemon:
        caller.veneer("run", "--", "true")
        before = daemon.sample()
        plan = stock.plan(threads, once=False, span=3 * PIECE)
        with _running(caller, _readers(caller, plan)) as run:
            assert run.stdout is not None
            if read_line(run.stdout) != "reading\n":
                raise LoadError(run.communicate(timeout=20)[1])
            server = int(eventually(lambda: server_of_run(run.pid)))
            with Watch({"daemon": daemon.pid, "mount server": server}) as watch:
                threading.Event().wait(seconds)
            found = _read(run, told=True, seconds=120)
        after = daemon.check_idle(before)
        totals = caller.status()["totals"]
    watch.check_flat()
    return {
        **found,
        "working set": stock.size,
        "limit": limit,
        "held": totals["nar_bytes"] + totals["tree_bytes"],
        "daemon before and after": [before, after],
        "quarters": watch.figures(),
    }
