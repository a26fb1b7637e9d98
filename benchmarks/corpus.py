"""Make the corpus of the other benchmarks: ``./dev bench corpus [DIRECTORY]``."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.support.corpus import corpus


def main() -> None:
    made = corpus(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    print(
        f"cache       {made.cache}\npublic key  {made.public_key}\ntop         {made.top}\npaths       {len(made.paths) + 1}"
    )


if __name__ == "__main__":
    main()
