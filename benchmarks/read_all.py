"""Reading every file of a large closure, against copying it with Nix from the same cache; cold.

::

    ./dev bench read_all [--rounds N] [--corpus DIR] [--link]

Over loopback the cache is the corpus as it is (zstd). With ``--link``, 200 Mbit/s and 20 ms there and back, it is that, one of xz, and one
that ``veneer mirror`` published.

Readers are 8 processes at a time, one for each store path (``find -type f -exec cat {} +``); ``tar`` is one reader for all.
``veneer fetch --closure`` brings the same content into the cache and reads nothing, as ``nix copy`` does; a job that reads
everything has that to do afterwards, where Nix copied it to: ``nix copy, then tar`` is both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from benchmarks.support.caches import Served, caches, zstd
from benchmarks.support.results import Table, in_turns
from benchmarks.support.shaped_link import ShapedLink
from benchmarks.support.stage import Stage, corpus_of, parser

RATIO = 1.1
"""The target."""
READERS = 8
_EACH = f"""printf '%s\\0' "$@" | xargs -0 -P {READERS} -n 1 sh -ec 'find "$0" -type f -exec cat {{}} + >/dev/null'"""
_TAR = """set -o pipefail; tar -c -b 2048 -f - -C / "${@#/}" | cat >/dev/null"""
_NIX, _NIX_ONE, _FETCH, _PARALLEL, _ONE = (
    "nix copy",
    "nix copy, then tar",
    "veneer fetch --closure",
    f"veneer run, {READERS} readers",
    "veneer run, tar",
)


def main() -> None:
    made = parser(__doc__, rounds=3)
    made.add_argument("--link", action="store_true", help="over the slow link, from three kinds of cache")
    options = made.parse_args()
    with Stage(corpus_of(options)) as stage, contextlib.ExitStack() as stack:
        where = "200 Mbit/s and 20 ms" if options.link else "loopback"
        title = f"Reading all of a closure of {len(stage.closure)} paths, {where}"
        table = Table(title, [_NIX, _NIX_ONE, _FETCH, _PARALLEL, _ONE])
        served = stack.enter_context(caches(stage)) if options.link else {"zstd": zstd(stage)}
        ways = {
            f"{cache}|{way}": _way(stage, served[cache], way, link=options.link)
            for cache in served
            for way in table.columns
        }

        def record(which: str, seconds: float) -> None:
            cache, _, way = which.partition("|")
            table.add(cache, way, seconds)

        in_turns(options.rounds, ways, record)
    for cache in served:
        for way in (_FETCH, _PARALLEL, _ONE):
            table.target(cache, way, RATIO)
    print(table.markdown())


def _way(stage: Stage, cache: Served, way: str, *, link: bool) -> Callable[[], float]:
    words: dict[str, list[str]] = {
        _FETCH: ["fetch", "--closure", "--quiet", stage.corpus.top],
        _PARALLEL: ["run", "--quiet", "--", "bash", "-c", _EACH, "bash", *stage.closure],
        _ONE: ["run", "--quiet", "--", "bash", "-c", _TAR, "bash", *stage.closure],
    }

    def run(url: str) -> float:
        if way in (_NIX, _NIX_ONE):
            return stage.eager(url, cache.key, then=_TAR.replace("-C /", "-C .") if way == _NIX_ONE else "")
        command, *rest = words[way]
        return stage.veneer(command, *rest, url=url, key=cache.key)

    def over_the_link() -> float:
        with ShapedLink(cache.server.port) as shaped:
            return run(shaped.url)

    return over_the_link if link else lambda: run(cache.server.url)


if __name__ == "__main__":
    main()
