"""A process of many threads that decode large pieces gives the memory back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import concurrent.futures, os, random, sys
from veneer.daemon.heap import keep_small
if sys.argv[1] == "small":
    assert keep_small()

def work(seed):
    numbers = random.Random(seed)
    kept = [bytes(numbers.randrange(1_000_000, 5_000_000)) for _ in range(6)]
    return sum(map(len, kept))

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

before = resident()
with concurrent.futures.ThreadPoolExecutor(16) as pool:
    list(pool.map(work, range(200)))
    print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_large_pieces_go_back_when_they_are_freed() -> None:
    words = [sys.executable, "-c", PROGRAM, "small"]
    grown = int(subprocess.run(words, capture_output=True, check=True, text=True, timeout=60).stdout)
    assert grown < 16 << 20
