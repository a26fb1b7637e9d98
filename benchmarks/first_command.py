"""The first useful command of a large closure over a slow link, against Nix, which must bring all of it first.

::

    ./dev bench first_command [--rounds N] [--corpus DIR]

The link has 200 Mbit/s and 20 ms there and back. Each command starts cold and runs wholly out of the store: its loader,
C library and modules too. Bytes are counted by the link: bodies and HTTP headers.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.support.corpus import Corpus
from benchmarks.support.results import Table, in_turns
from benchmarks.support.shaped_link import ShapedLink
from benchmarks.support.stage import Stage, corpus_of, parser

TIME, BYTES = 0.1, 0.07
"""The targets: shares of what Nix needs."""
_MULTIARCH = "lib/x86_64-linux-gnu"
_NIX, _VENEER = "nix copy", "veneer run"


def commands(corpus: Corpus) -> dict[str, list[str]]:
    """What a user would type -> the words that do it with programs of Debian, which expect their libraries elsewhere."""
    at = corpus.paths
    directories = [
        f"{at[name]}/{place}/{_MULTIARCH}"
        for name in ("libc6", "zlib1g", "libpcre2-8-0", "libexpat1")
        for place in (".", "usr")
    ]
    loader = f"{at['libc6']}/{_MULTIARCH}/ld-linux-x86-64.so.2"
    out_of_the_store = [loader, "--inhibit-cache", "--library-path", ":".join(directories)]
    python_home = [
        "env",
        f"PYTHONHOME={at['libpython3.11-minimal']}/usr",
        f"PYTHONPATH={at['libpython3.11-stdlib']}/usr/lib/python3.11",
    ]
    python = f"{at['python3.11-minimal']}/usr/bin/python3.11"
    return {
        "git --version": [*out_of_the_store, f"{at['git']}/usr/bin/git", "--version"],
        'python3 -c "import json"': [*python_home, *out_of_the_store, python, "-c", "import json"],
    }


def main() -> None:
    options = parser(__doc__, rounds=3).parse_args()
    with Stage(corpus_of(options)) as stage:
        wanted = commands(stage.corpus)
        title = f"First command of a closure of {len(stage.closure)} paths, 200 Mbit/s and 20 ms"
        seconds = Table(f"{title}: time", [_NIX, _VENEER])
        megabytes = Table(f"{title}: bytes", [_NIX, _VENEER], unit="MB")
        moved = 0.0

        def over_the_link(run: Callable[[str], float]) -> Callable[[], float]:
            def way() -> float:
                nonlocal moved
                with ShapedLink(stage.server.port) as link:
                    took = run(link.url)
                    moved = link.bytes_down / 1e6
                return took

            return way

        def record(way: str, took: float) -> None:
            for work in wanted if way == _NIX else [way]:
                seconds.add(work, _NIX if way == _NIX else _VENEER, took)
                megabytes.add(work, _NIX if way == _NIX else _VENEER, moved)

        def first_command(words: list[str]) -> Callable[[], float]:
            return over_the_link(lambda url: stage.veneer("run", "--", *words, url=url))

        ways = {_NIX: over_the_link(stage.eager)}
        ways |= {work: first_command(words) for work, words in wanted.items()}
        in_turns(options.rounds, ways, record)
    for work in wanted:
        seconds.target(work, _VENEER, TIME)
        megabytes.target(work, _VENEER, BYTES)
    print(seconds.markdown())
    print(megabytes.markdown())


if __name__ == "__main__":
    main()
