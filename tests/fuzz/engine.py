"""One target under libFuzzer: ``python -m tests.fuzz.engine TARGET [libFuzzer's options and corpora]``."""

from __future__ import annotations

import importlib
import resource
import sys

ADDRESS_SPACE = 3 << 30
"""Of the whole process, so that an input that asks for more is a MemoryError, which no target may raise."""


def main() -> None:
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["veneer"]):
        targets = importlib.import_module("tests.fuzz.targets")
    target = targets.TARGETS[sys.argv.pop(1)]
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))

    def one(data: bytes) -> None:
        targets.survives(target, data)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
