"""Reading every file of a large closure, against copying it with Nix; loopback, cold.

::

    ./dev bench read_all [--rounds N] [--corpus DIR]

Readers are 8 processes at a time, one for each store path (``find -type f -exec cat {} +``); ``tar`` is one reader for all.
``veneer fetch --closure`` brings the same content into the cache and reads nothing.
"""

from __future__ import annotations

from benchmarks.support.results import Table, in_turns
from benchmarks.support.stage import Stage, corpus_of, parser

RATIO = 1.3
"""The target; 1.1 is the next one."""
READERS = 8
_WORK = "every byte of the closure"
_EACH = f"""printf '%s\\0' "$@" | xargs -0 -P {READERS} -n 1 sh -ec 'find "$0" -type f -exec cat {{}} + >/dev/null'"""
_TAR = """set -o pipefail; tar -c -b 2048 -f - -C / "${@#/}" | cat >/dev/null"""
_NIX, _FETCH, _PARALLEL, _ONE = (
    "nix copy",
    "veneer fetch --closure",
    f"veneer run, {READERS} readers",
    "veneer run, tar",
)


def main() -> None:
    options = parser(__doc__, rounds=3).parse_args()
    with Stage(corpus_of(options)) as stage:
        url, closure = stage.server.url, stage.closure
        table = Table(
            f"Reading all of a closure of {len(closure)} paths, loopback", [_NIX, _FETCH, _PARALLEL, _ONE]
        )
        ways = {
            _NIX: lambda: stage.eager(url),
            _FETCH: lambda: stage.veneer("fetch", "--closure", "--quiet", stage.corpus.top, url=url),
            _PARALLEL: lambda: stage.veneer(
                "run", "--quiet", "--", "bash", "-c", _EACH, "bash", *closure, url=url
            ),
            _ONE: lambda: stage.veneer("run", "--quiet", "--", "bash", "-c", _TAR, "bash", *closure, url=url),
        }
        in_turns(options.rounds, ways, lambda way, seconds: table.add(_WORK, way, seconds))
    for way in (_FETCH, _PARALLEL, _ONE):
        table.target(_WORK, way, RATIO)
    print(table.markdown())


if __name__ == "__main__":
    main()
