"""The corpus behind nginx, real Nix to compare with, and a directory for both that goes away with the benchmark.

::

    with Stage(corpus_of(options)) as stage:
        seconds = stage.eager(stage.server.url)
        seconds = stage.veneer("run", "--", "true", url=stage.server.url)

Everything that fetches starts cold: Nix with an empty store and home, veneer with an empty cache directory and without a
daemon. Files of the served cache are in the page cache, so that the server's disk is not measured; what one run left
to be written is on disk before the next one starts.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.support.corpus import Corpus, corpus
from tests.support.nginx import Nginx, find_nginx
from tests.support.nix import RealNix, fetch_nix
from tests.support.places import own_directory

WORKERS = 2


class BenchError(Exception):
    """A program that is measured failed; the text has its last words."""


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Options of all benchmarks over the corpus."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--rounds", type=int, default=rounds, help=f"how often each is measured [{rounds}]")
    made.add_argument(
        "--corpus",
        type=Path,
        default=os.environ.get("VENEER_BENCH_CORPUS"),
        metavar="DIR",
        help="a corpus made by `./dev bench corpus DIR` [$VENEER_BENCH_CORPUS, else .dev/bench/corpus, made when missing]",
    )
    return made


def corpus_of(options: argparse.Namespace) -> Corpus:
    """The corpus that the options name."""
    return corpus(None if options.corpus is None else Path(options.corpus))


def veneer_command() -> list[str]:
    """``veneer`` of this checkout."""
    return [str(Path(sys.executable).with_name("veneer"))]


def timed(command: Sequence[str | Path], **more: object) -> float:
    """Seconds that ``command`` takes. BenchError when it fails; its standard output is dropped."""
    began = time.monotonic()
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **more
    )  # type: ignore[call-overload]
    seconds = time.monotonic() - began
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()[-4000:]
        raise BenchError(f"{' '.join(map(str, command))[:500]}: status {done.returncode}: {said}")
    return seconds


class Stage:
    """``server`` serves the corpus; ``home`` is an empty directory on the disk of the checkout. A context manager."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.closure = [*corpus.paths.values(), corpus.top]
        self._programs = fetch_nix()
        self._number = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.home = scratch(stack)
            (self.home / "nginx").mkdir()
            server = Nginx(find_nginx(), self.home / "nginx", self.corpus.cache, workers=WORKERS)
            self.server = stack.enter_context(server)
            subprocess.run(["cat", *sorted(self.corpus.cache.glob("nar/*"))], stdout=subprocess.DEVNULL)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def eager(self, url: str, key: str | None = None, then: str = "") -> float:
        """Seconds in which real Nix copies the whole closure from ``url``, signatures checked, into an empty store.

        ``key``: whose signatures count, instead of the corpus's. ``then``: a script for bash whose time counts too, in the
        directory in which the store lies, with the closure's paths as arguments.
        """
        home = self._fresh("nix")
        nix = RealNix(self._programs, home)
        options = ["--option", "trusted-public-keys", key or self.corpus.public_key]
        command: list[str | Path] = [nix.programs / "nix", "copy", *options, "--from", url, self.corpus.top]
        seconds = timed(command, env=nix.environment, cwd=home)
        there = len(list((nix.store / "nix/store").glob("*-*")))
        if there < len(self.closure):
            raise BenchError(f"nix copy brought {there} paths of {len(self.closure)}")
        if then:
            seconds += timed(["bash", "-c", then, "bash", *self.closure], cwd=nix.store)
        remove(home)
        return seconds

    def veneer(
        self,
        command: str,
        *words: str,
        url: str,
        environment: dict[str, str] | None = None,
        key: str | None = None,
    ) -> float:
        """Seconds that ``veneer COMMAND`` takes with an empty cache directory. ``words``: options of its own and arguments.

        ``key``: whose signatures count, instead of the corpus's.
        """
        cache_dir = self._fresh("cache")
        options = [
            "--cache",
            url,
            "--trusted-public-key",
            key or self.corpus.public_key,
            "--cache-dir",
            str(cache_dir),
        ]
        seconds = timed(
            [*veneer_command(), command, *options, *words],
            env=os.environ | (environment or {}),
            cwd=self.home,
        )
        with daemon_ended(cache_dir):
            remove(cache_dir)
        return seconds

    def _fresh(self, name: str) -> Path:
        os.sync()
        self._number += 1
        made = self.home / f"{name}-{self._number}"
        made.mkdir()
        return made


@contextlib.contextmanager
def daemon_ended(cache_dir: Path) -> Iterator[None]:
    """Waits for the end of the private daemon and holds its lock: none writes into the directory any more."""
    with open(cache_dir / "lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def scratch(stack: contextlib.ExitStack) -> Path:
    """A directory on the checkout's disk that goes away with ``stack``."""
    place = own_directory() / "bench"
    place.mkdir(exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=place))
    stack.callback(remove, made)
    return made


def remove(directory: Path) -> None:
    """Also directories without write permission, as a Nix store has."""
    subprocess.run(["chmod", "-R", "u+w", directory], check=True)
    shutil.rmtree(directory)
