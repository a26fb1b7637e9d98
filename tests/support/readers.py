"""Readers of every kind that read on and on, and compare: how a test sees that a mount was never away.

Sent as source text to ``python -c PLAN``, so it runs as any user and imports the standard library only. PLAN is JSON:
{"files": {path: SHA-256 in hex}, "tops": [directory], "programs": [path]}. Ends when standard input does, with one line of JSON:
{"reads": n, "errors": [text], "wrong": [path], "longest": seconds of the longest single read, program or search}.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from typing import Any

COLD_READERS = 4


class Readers:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.files: dict[str, str] = plan["files"]
        self.tops: list[str] = plan["tops"]
        self.programs: list[str] = plan["programs"]
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.reads = 0
        self.longest = 0.0
        self.errors: list[str] = []
        self.wrong: list[str] = []

    def run(self) -> None:
        cold = [self.read_cold] * COLD_READERS
        jobs: list[Callable[[int], None]] = [*cold, self.tar, self.search, self.execute]
        threads = [threading.Thread(target=self.loop, args=(job, n)) for n, job in enumerate(jobs)]
        for thread in threads:
            thread.start()
        print("reading", flush=True)
        sys.stdin.read()
        self.over.set()
        for thread in threads:
            thread.join()
        result = {"reads": self.reads, "errors": self.errors, "wrong": self.wrong, "longest": self.longest}
        print(json.dumps(result), flush=True)

    def loop(self, job: Callable[[int], None], turn: int) -> None:
        while not self.over.is_set():
            try:
                job(turn)
            except (OSError, subprocess.CalledProcessError) as error:
                with self.lock:
                    self.errors.append(str(error))
            turn += COLD_READERS

    def timed(self, what: str, wanted: str, read: Callable[[], str]) -> None:
        began = time.monotonic()
        found = read()
        took = time.monotonic() - began
        with self.lock:
            self.reads += 1
            self.longest = max(self.longest, took)
            if found != wanted:
                self.wrong.append(what)

    def read_cold(self, turn: int) -> None:
        """Every page from the mount server."""
        names = list(self.files)
        path = names[turn % len(names)]
        self.timed(path, self.files[path], lambda: _cold(path))

    def tar(self, turn: int) -> None:
        top = self.tops[turn % len(self.tops)]
        self.chill(top)
        wanted = sorted(digest for path, digest in self.files.items() if path.startswith(top + "/"))

        def through() -> str:
            done = subprocess.run(["tar", "-C", top, "-c", "-f", "-", "."], capture_output=True)
            if done.returncode:
                raise OSError(done.stderr.decode("utf-8", "replace"))
            with tarfile.open(fileobj=io.BytesIO(done.stdout)) as packed:
                members = [packed.extractfile(member) for member in packed if member.isreg()]
                return json.dumps(sorted(hashlib.sha256(m.read()).hexdigest() for m in members if m))

        self.timed(f"tar {top}", json.dumps(wanted), through)

    def search(self, turn: int) -> None:
        top = self.tops[turn % len(self.tops)]
        self.chill(top)
        count = sum(path.startswith(top + "/") for path in self.files)

        def through() -> str:
            words = ["grep", "-r", "-L", "no file has this", top]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.stderr:
                raise OSError(done.stderr)
            return str(len(done.stdout.splitlines()))

        self.timed(f"grep {top}", str(count), through)

    def execute(self, turn: int) -> None:
        program = self.programs[turn % len(self.programs)]
        _forget(program)

        def through() -> str:
            return subprocess.run([program, "ran"], capture_output=True, check=True, text=True).stdout

        self.timed(program, "ran\n", through)

    def chill(self, top: str) -> None:
        for path in self.files:
            if path.startswith(top + "/"):
                _forget(path)


def _forget(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _cold(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while piece := file.read(1 << 17):
            digest.update(piece)
    return digest.hexdigest()


if __name__ == "__main__":
    Readers(json.loads(sys.argv[1])).run()
