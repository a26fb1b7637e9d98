"""Readers of every kind while mount servers and store daemons are killed: errors, wrong bytes, the longest pause.

::

    ./dev bench hand_over [--servers N] [--daemons N] [--place environment|mount]

Four cold readers, ``tar``, ``grep -r`` and a program that is executed, all in loops and in an environment (through the
overlay), then on a ``veneer mount``. What they read is compared; "longest" is the slowest single file, archive, search or
execution. A run starts its daemon again five times a minute at most, so daemons are killed every 13 s.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from random import Random
from typing import Any

from benchmarks.support.stage import BenchError, scratch
from tests.support.callers import Caller
from tests.support.storm import (
    Readable,
    kill_at_random,
    kill_daemon,
    kill_server,
    make_readable,
    mounted,
    reading_below,
    reading_in_run,
    server_of_mount,
    server_of_run,
)

PLACES = ("environment", "mount")
_DAEMON_PAUSE = (12.5, 13.5)
_SERVER_PAUSE = (0.3, 0.9)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--servers", type=int, default=20, help="mount servers to kill [20]")
    options.add_argument("--daemons", type=int, default=20, help="daemons to kill [20]")
    options.add_argument("--paths", type=int, default=24, help="store paths to read [24]")
    options.add_argument("--place", choices=PLACES, action="append", help="where they read [both]")
    given = options.parse_args()
    print("| readers | servers killed | daemons killed | seconds | reads | errors | wrong | longest |")
    print("|---|---|---|---|---|---|---|---|")
    bad = 0
    for place in given.place or PLACES:
        with contextlib.ExitStack() as stack:
            home = scratch(stack)
            caller = Caller.root(home)
            readable = make_readable(home / "readable", given.paths)
            caller.use(readable.cache.url, key=readable.cache.key)
            stack.callback(caller.wait_for_daemons_end)
            began = time.monotonic()
            found = _storm(place, caller, readable, given.servers, given.daemons)
            seconds = time.monotonic() - began
            bad += len(found["errors"]) + len(found["wrong"])
            print(
                f"| {place} | {given.servers} | {given.daemons} | {seconds:.0f} | {found['reads']} |"
                f" {len(found['errors'])} | {len(found['wrong'])} | {found['longest']:.2f} s |",
                flush=True,
            )
            for error in found["errors"][:5]:
                print(error, file=sys.stderr)
    if bad:
        raise BenchError(f"{bad} reads went wrong")


def _storm(place: str, caller: Caller, readable: Readable, servers: int, daemons: int) -> dict[str, Any]:
    random = Random(servers)
    with contextlib.ExitStack() as stack:
        find: Callable[[int], int]
        if place == "environment":
            reading = stack.enter_context(reading_in_run(caller, readable, "--quiet"))
            pid, find = reading.process.pid, server_of_run
        else:
            mount, target = stack.enter_context(mounted(caller))
            reading = stack.enter_context(reading_below(target, caller, readable))
            pid, find = mount.pid, server_of_mount
        kill_at_random(servers, lambda: kill_server(lambda: find(pid)), random, _SERVER_PAUSE)
        kill_at_random(daemons, lambda: kill_daemon(caller), random, _DAEMON_PAUSE)
        return reading.result()


if __name__ == "__main__":
    main()
