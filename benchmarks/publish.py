"""Publishing a large closure into a directory, against ``nix copy`` to the same place: time, and size of the NAR files.

::

    ./dev bench publish [--rounds N] [--corpus DIR]

Both begin with the content on this machine: Nix with a store that holds the closure, veneer with its local cache filled. Both compress with
zstd at level 3, Nix's own. Sizes are of all objects.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from benchmarks.support.results import Table, in_turns
from benchmarks.support.stage import Stage, corpus_of, parser, remove, timed, veneer_command
from tests.support.nix import RealNix, fetch_nix
from veneer.formats.signature import SecretKey

TIME, SIZE = 1.0, 1.05
_NIX, _OURS, _LARGER, _LARGEST = "nix copy", "veneer publish", "--frame-size 512K", "--frame-size 1M"
_FRAMES = {_OURS: "256K", _LARGER: "512K", _LARGEST: "1M"}


def main() -> None:
    options = parser(__doc__, rounds=3).parse_args()
    with Stage(corpus_of(options)) as stage:
        secret = stage.home / "key"
        secret.write_text(SecretKey.generate("bench-1").text())
        nix = RealNix(fetch_nix(), stage.home / "nix-filled")
        trust = ["--option", "trusted-public-keys", stage.corpus.public_key]
        from_ = f"file://{stage.corpus.cache}"
        timed([nix.programs / "nix", "copy", *trust, "--from", from_, stage.corpus.top], env=nix.environment)
        cache = stage.home / "filled"
        ours = ["--cache", from_, "--trusted-public-key", stage.corpus.public_key, "--cache-dir", str(cache)]
        timed([*veneer_command(), "fetch", "-q", "--closure", *ours, stage.corpus.top])
        place = stage.home / "published"
        sizes: dict[str, int] = {}

        def measured(way: str, command: list[str | Path], **more: object) -> float:
            os.sync()
            seconds = timed(command, **more)
            files = subprocess.run(["du", "-sb", place], capture_output=True, check=True, text=True).stdout
            sizes[way] = int(files.split()[0])
            shutil.rmtree(place)
            return seconds

        def by_nix() -> float:
            to = f"file://{place}?compression=zstd&parallel-compression=true&write-nar-listing=true&secret-key={secret}"
            command: list[str | Path] = [nix.programs / "nix", "copy", "--to", to, stage.corpus.top]
            return measured(_NIX, command, env=nix.environment)

        def by_us(way: str) -> Callable[[], float]:
            to = ["--to", f"file://{place}", "--key-file", str(secret), "--frame-size", _FRAMES[way]]
            return lambda: measured(way, [*veneer_command(), "publish", "-q", *to, *ours, stage.corpus.top])

        columns = [_NIX, *_FRAMES]
        seconds = Table(f"Publishing {len(stage.closure)} paths: time", columns)
        megabytes = Table(f"Publishing {len(stage.closure)} paths: size", columns, unit="MB")

        def record(way: str, took: float) -> None:
            seconds.add("publish", way, took)
            megabytes.add("publish", way, sizes[way] / 1e6)

        in_turns(options.rounds, {_NIX: by_nix, **{way: by_us(way) for way in _FRAMES}}, record)
        remove(nix.store)
    for way in _FRAMES:
        seconds.target("publish", way, TIME)
        megabytes.target("publish", way, SIZE)
    print(seconds.markdown())
    print(megabytes.markdown())


if __name__ == "__main__":
    main()
