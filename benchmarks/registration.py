"""How long real Nix takes to register a closure from our socket, against a lower store that has every answer ready.

::

    ./dev bench registration [--suite trixie|sid] [--paths N] [--rounds N] [--corpus DIR]

``nix path-info TOP`` with a new database of a local-overlay store: Nix asks its lower store three times about each path
of the closure, one question after the other. Lower stores:

- *instant*: a server in C that replies from memory and checks nothing.
- *first*: a store daemon with an empty cache directory, that fetches and checks every narinfo (nginx on loopback).
- *restarted*: a daemon just started on a cache directory that has them.
- *warm*: a daemon that has answered the same questions before.

Needs root, for the mounts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.support.lower_stores import (
    Closure,
    OverlayStore,
    closure_in,
    daemon,
    instant,
    write_closure,
)
from benchmarks.support.results import Table, in_turns
from benchmarks.support.stage import BenchError, corpus_of, parser, remove, scratch
from tests.support.nginx import Nginx, find_nginx
from tests.support.nix import fetch_nix

TARGET = 1.2
INSTANT, FIRST, RESTARTED, WARM = "instant lower", "veneer, first", "veneer, restarted", "veneer, warm"
WORKERS = 2


def main() -> None:
    options_parser = parser(__doc__, rounds=5)
    options_parser.add_argument(
        "--suite", default="trixie", help="the Debian suite that Nix comes from [trixie]"
    )
    options_parser.add_argument("--paths", type=int, default=2968, help="paths of the made closure [2968]")
    options = options_parser.parse_args()
    if os.geteuid():
        raise SystemExit("needs root, for the mounts")
    programs = fetch_nix(options.suite)
    table = Table(f"Registration by real Nix ({options.suite})", [INSTANT, FIRST, RESTARTED, WARM])
    with contextlib.ExitStack() as stack:
        home = scratch(stack)
        corpus = corpus_of(options)
        closures = [
            closure_in(corpus.cache, corpus.public_key, corpus.top),
            write_closure(home / "made", options.paths),
        ]
        for number, closure in enumerate(closures):
            place = home / str(number)
            place.mkdir()
            measure(programs, place, closure, table, options.rounds)
    print(table.markdown())
    for line in table.missed():
        print(f"missed: {line}")


def measure(programs: Path, home: Path, closure: Closure, table: Table, rounds: int) -> None:
    """Fill the row of one closure."""
    work = f"{len(closure.infos):,} paths"
    (home / "nginx").mkdir()
    store = OverlayStore(programs, home)
    key = closure.public_key
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(
            Nginx(find_nginx(), home / "nginx", closure.cache, extra="access_log off;", workers=WORKERS)
        )
        stack.enter_context(store.mounted(server.url, key))
        instant_socket = stack.enter_context(instant(home, closure))
        warm_socket = stack.enter_context(daemon(home / "warm", server.url, key))

        def first() -> float:
            with daemon(home / "first", server.url, key) as socket:
                seconds = store.register(socket, closure.top)
            remove(home / "first")
            return seconds

        def restarted() -> float:
            with daemon(home / "restarted", server.url, key) as socket:
                return store.register(socket, closure.top)

        ways: dict[str, Callable[[], float]] = {
            INSTANT: lambda: store.register(instant_socket, closure.top),
            FIRST: first,
            RESTARTED: restarted,
            WARM: lambda: store.register(warm_socket, closure.top),
        }
        for way in ways.values():
            way()  # files and programs are in memory, and the caches full, from now on
        there = store.registered(warm_socket)
        if there != len(closure.infos):
            raise BenchError(f"Nix registered {there} paths of {len(closure.infos)}")
        in_turns(rounds, ways, lambda way, seconds: table.add(work, way, seconds))
    for column in (FIRST, RESTARTED, WARM):
        table.target(work, column, TARGET)


if __name__ == "__main__":
    main()
