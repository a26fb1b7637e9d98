"""Programs out of a large closure, from a published cache, with and without a trace, and from ordinary ones; against real Nix.

::

    ./dev bench parts [--rounds N] [--corpus DIR] [--loopback]

The link has 200 Mbit/s and 20 ms there and back. Nix copies the whole closure from the same kind of cache behind the same link
before anything runs. Each command starts cold, with an empty cache directory, and its programs, libraries and modules come out of the
store. Bytes are counted by the link (bodies and HTTP headers), requests in the server's log. The published cache is what
``veneer mirror`` makes of the ordinary one with its default options, the xz one what ``nix copy`` makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.support.caches import Served, caches
from benchmarks.support.corpus import Corpus
from benchmarks.support.results import Table, in_turns
from benchmarks.support.shaped_link import ShapedLink
from benchmarks.support.stage import Stage, corpus_of, parser

TIME, BYTES, TRACED = 0.1, 0.07, 0.5
"""The targets: shares of what Nix needs; with a trace, of that share of the time again."""
_MULTIARCH = "lib/x86_64-linux-gnu"
_GCC = "usr/lib/gcc/x86_64-linux-gnu/12"
_EAGER = "nix copy"
_HELLO = '#include <stdio.h>\nint main(void) { return puts("hello") < 0; }\n'


def commands(corpus: Corpus, scratch: Path) -> dict[str, list[str]]:
    """What a user would type -> the words that do it with programs of Debian, which expect their libraries elsewhere."""
    at = {name: f"{corpus.top}/{Path(path).name}" for name, path in corpus.paths.items()}  # as by a profile

    def with_libraries(*packages: str, more: tuple[str, ...] = ()) -> list[str]:
        found = [
            f"{at[name]}/{place}/{_MULTIARCH}" for name in ("libc6", *packages) for place in (".", "usr")
        ]
        loader = f"{at['libc6']}/{_MULTIARCH}/ld-linux-x86-64.so.2"
        path = ":".join([*found, *more])
        return ["env", f"LD_LIBRARY_PATH={path}", loader, "--inhibit-cache", "--library-path", path]

    python = [
        "env",
        f"PYTHONHOME={at['libpython3.11-minimal']}/usr",
        "PYTHONPATH="
        + ":".join(
            [
                f"{at['libpython3.11-stdlib']}/usr/lib/python3.11",
                f"{at['libpython3.11-stdlib']}/usr/lib/python3.11/lib-dynload",
                f"{at['python3-numpy']}/usr/lib/python3/dist-packages",
            ]
        ),
    ]
    algebra = tuple(f"{at[f'lib{name}3']}/usr/{_MULTIARCH}/{name}" for name in ("blas", "lapack"))
    numpy = with_libraries(
        "zlib1g", "libexpat1", "libffi8", "libgfortran5", "libquadmath0", "libgcc-s1", more=algebra
    )
    compiler = with_libraries(
        *("zlib1g", "libzstd1", "libisl23", "libmpc3", "libmpfr6", "libgmp10", "libbinutils", "libctf0"),
        *("libjansson4", "libgprofng0") if "libgprofng0" in at else (),
    )
    hello = scratch / "hello.c"
    hello.write_text(_HELLO)
    psql = with_libraries(
        *("libpq5", "libreadline8", "libtinfo6", "zlib1g", "libssl3", "libgssapi-krb5-2", "libkrb5-3"),
        *("libk5crypto3", "libkrb5support0", "libcom-err2", "libkeyutils1", "libldap-2.5-0", "libsasl2-2"),
        *("libzstd1", "liblz4-1"),
    )
    return {
        "git --version": [
            *with_libraries("zlib1g", "libpcre2-8-0"),
            f"{at['git']}/usr/bin/git",
            "--version",
        ],
        "python3 -c 'import numpy'": [
            *python,
            *numpy,
            f"{at['python3.11-minimal']}/usr/bin/python3.11",
            "-c",
            "import numpy",
        ],
        "gcc hello.c": [
            *compiler,
            f"{at['gcc-12']}/usr/bin/x86_64-linux-gnu-gcc-12",
            f"-B{at['cpp-12']}/{_GCC}/",
            f"-B{at['gcc-12']}/{_GCC}/",
            f"-B{at['libgcc-12-dev']}/{_GCC}/",
            f"-B{at['binutils-x86-64-linux-gnu']}/usr/bin/x86_64-linux-gnu-",
            f"-B{at['libc6-dev']}/usr/{_MULTIARCH}/",
            f"-I{at['libgcc-12-dev']}/{_GCC}/include",
            f"-I{at['libc6-dev']}/usr/include/x86_64-linux-gnu",
            f"-I{at['libc6-dev']}/usr/include",
            f"-I{at['linux-libc-dev']}/usr/include",
            "-static",
            str(hello),
            "-o",
            str(scratch / "hello"),
        ],
        "perl -e 1": [*with_libraries("libcrypt1"), f"{at['perl-base']}/usr/bin/perl", "-e", "1"],
        "psql --version": [
            *psql,
            f"{at['postgresql-client-15']}/usr/lib/postgresql/15/bin/psql",
            "--version",
        ],
    }


def main() -> None:
    made = parser(__doc__, rounds=3)
    made.add_argument("--loopback", action="store_true", help="without the slow link")
    options = made.parse_args()
    with Stage(corpus_of(options)) as stage, caches(stage) as served:
        wanted = commands(stage.corpus, stage.home)
        link = "loopback" if options.loopback else "200 Mbit/s and 20 ms"
        title = f"Programs of a closure of {len(stage.closure)} paths, {link}"
        ways = [_EAGER, "published", "with trace", "zstd", "xz"]
        seconds = Table(f"{title}: time", ways)
        megabytes = Table(f"{title}: bytes", ways, unit="MB")
        requests = Table(f"{title}: requests", ways, unit="")
        moved = {"bytes": 0.0, "requests": 0.0}

        def over_the_link(which: Served, run: Callable[[str], float]) -> float:
            which.server.forget()
            if options.loopback:
                took = run(which.server.url)
            else:
                with ShapedLink(which.server.port) as shaped:
                    took = run(shaped.url)
                    moved["bytes"] = shaped.bytes_down / 1e6
            moved["requests"] = len(which.server.requests())
            return took

        def note(work: str, way: str, took: float) -> None:
            seconds.add(work, way, took)
            if not options.loopback:
                megabytes.add(work, way, moved["bytes"])
            requests.add(work, way, moved["requests"])

        def lazily(work: str, cache: str, *more: str) -> Callable[[], float]:
            which = served[cache]

            def run(url: str) -> float:
                return stage.veneer("run", *more, "--", *wanted[work], url=url, key=which.key)

            return lambda: over_the_link(which, run)

        for work in wanted:
            lazily(work, "published", "--trace", str(stage.home / _file_name(work)))()
        runs: dict[str, Callable[[], float]] = {
            _EAGER: lambda: over_the_link(served["zstd"], lambda url: stage.eager(url))
        }
        for work in wanted:
            for cache in ("published", "zstd", "xz"):
                runs[f"{work}|{cache}"] = lazily(work, cache)
            trace = str(stage.home / _file_name(work))
            runs[f"{work}|with trace"] = lazily(work, "published", "--prefetch", trace)

        def record(run: str, took: float) -> None:
            for work in wanted if run == _EAGER else [run.partition("|")[0]]:
                note(work, run.partition("|")[2] or _EAGER, took)

        in_turns(options.rounds, runs, record)
        for work in wanted:
            seconds.target(work, "published", TIME)
            seconds.target(work, "with trace", TRACED * TIME)
            megabytes.target(work, "published", BYTES)
        print(seconds.markdown())
        if not options.loopback:
            print(megabytes.markdown())
        print(requests.markdown())


def _file_name(work: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in work) + ".trace"


if __name__ == "__main__":
    main()
