"""Very many readers at once, which compare all that they read with the same files elsewhere.

Sent as source text to ``python -c PLAN``: standard library only. PLAN is JSON: {"files": [[file, the same elsewhere, size]],
"threads": n, "once": bool, "span": bytes, "seed": n}. ``once``: thread i reads file i from end to end; otherwise all read spans
at random places until standard input ends. Prints "reading" when all are at work and one line of JSON at the end.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from typing import Any

PIECE = 1 << 17


class Readers:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.files: list[tuple[str, str, int]] = plan["files"]
        self.once: bool = plan["once"]
        self.span: int = plan.get("span", PIECE)
        self.random = random.Random(plan.get("seed", 1))
        self.threads: int = plan["threads"]
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.together = threading.Barrier(self.threads + 1)
        self.reads = self.bytes = self.wrong = 0
        self.longest = 0.0
        self.errors: list[str] = []

    def run(self) -> None:
        threading.stack_size(256 << 10)
        threads = [threading.Thread(target=self.work, args=(i,)) for i in range(self.threads)]
        for thread in threads:
            thread.start()
        self.together.wait()
        began = time.monotonic()
        print("reading", flush=True)
        if not self.once:
            sys.stdin.read()
        self.over.set()
        for thread in threads:
            thread.join()
        result = {
            "reads": self.reads,
            "bytes": self.bytes,
            "wrong": self.wrong,
            "errors": self.errors[:20],
            "failed": len(self.errors),
            "longest": self.longest,
            "seconds": time.monotonic() - began,
        }
        print(json.dumps(result), flush=True)

    def work(self, number: int) -> None:
        self.together.wait()
        if self.once:
            file, same, size = self.files[number % len(self.files)]
            self.timed(file, same, 0, size)
            return
        while not self.over.is_set():
            with self.lock:
                file, same, size = self.random.choice(self.files)
                start = self.random.randrange(max(1, size - self.span))
            self.timed(file, same, start, min(self.span, size - start))

    def timed(self, file: str, same: str, start: int, size: int) -> None:
        began = time.monotonic()
        try:
            is_right = self.compared(file, same, start, size)
        except OSError as error:
            with self.lock:
                self.errors.append(str(error))
            return
        with self.lock:
            self.reads += 1
            self.bytes += size
            self.wrong += not is_right
            self.longest = max(self.longest, time.monotonic() - began)

    def compared(self, file: str, same: str, start: int, size: int) -> bool:
        with open(file, "rb", buffering=0) as ours, open(same, "rb", buffering=0) as theirs:
            os.posix_fadvise(ours.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # every page from the mount server
            ours.seek(start)
            theirs.seek(start)
            while size > 0:
                piece = ours.read(min(PIECE, size))
                if not piece or piece != theirs.read(len(piece)):
                    return False
                size -= len(piece)
        return True


if __name__ == "__main__":
    Readers(json.loads(sys.argv[1])).run()
