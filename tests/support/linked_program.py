"""A program that runs and its libraries, each in a store path of its own, made by the machine's compiler."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.support.signed_cache import MadePath, make_files

COUNT = 6
"""Libraries that the program needs; each of them needs one more."""
LIBRARY = 200_000
BULK = 1_500_000
"""Bytes in each path that nobody reads."""
ANSWER = "21 of 6\n"
PROGRAM = "linked-0"

_MAIN = """
#include <stdio.h>
%(declarations)s
int main(void) { printf("%%d of %(count)d\\n", %(sum)s); return 0; }
"""
_LIBRARY = """
__asm__(".section .rodata\\n.globl data_%(name)s\\ndata_%(name)s: .incbin \\"%(data)s\\"\\n.text\\n");
%(declaration)s
int value_%(name)s(void) { return %(value)s; }
"""


def find_compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("cc")


def make_linked_program(scratch: Path) -> tuple[list[MadePath], dict[str, list[str]]]:
    """Its paths and their references. The program is ``bin/linked`` of PROGRAM and prints ANSWER."""
    made: list[MadePath] = []
    references: dict[str, list[str]] = {PROGRAM: []}
    objects = []
    for number in range(1, COUNT + 1):
        deep = _library(scratch, f"deep{number}", str(number), [])
        direct = _library(scratch, f"direct{number}", f"value_deep{number}()", [deep], f"deep{number}")
        objects.append(direct)
        made += [_path(f"deep{number}", deep), _path(f"direct{number}", direct)]
        references[PROGRAM].append(f"direct{number}-0")
        references[f"direct{number}-0"] = [f"deep{number}-0"]
    calls = [f"value_direct{number}" for number in range(1, COUNT + 1)]
    source = scratch / "main.c"
    source.write_text(
        _MAIN
        % {
            "declarations": "\n".join(f"int {call}(void);" for call in calls),
            "sum": "+".join(f"{call}()" for call in calls),
            "count": COUNT,
        }
    )
    program = scratch / "linked"
    _compile(source, program, objects)
    return [
        make_files(PROGRAM, {"bin/linked": program.read_bytes(), "data": _noise("p", BULK)}),
        *made,
    ], references


def program_at() -> str:
    return f"{_at(PROGRAM)}/bin/linked"


def _library(scratch: Path, name: str, value: str, needed: Sequence[Path], other: str = "") -> Path:
    data, source, library = (scratch / f"{name}.data", scratch / f"{name}.c", scratch / f"lib{name}.so")
    data.write_bytes(_noise(name, LIBRARY))
    declaration = f"int value_{other}(void);" if other else ""
    source.write_text(_LIBRARY % {"name": name, "data": data, "declaration": declaration, "value": value})
    _compile(source, library, needed, "-shared", "-fPIC", f"-Wl,-soname,{library.name}")
    return library


def _compile(source: Path, to: Path, needed: Sequence[Path], *options: str) -> None:
    compiler = find_compiler()
    assert compiler is not None
    search = ":".join(f"{_at(_name(library))}/lib" for library in needed)
    words = [compiler, *options, "-o", to, source, *needed, f"-Wl,-rpath-link,{to.parent}"]
    words += [f"-Wl,-rpath,{search}"] if search else []
    subprocess.run(list(map(str, words)), check=True)


def _path(name: str, library: Path) -> MadePath:
    return make_files(
        f"{name}-0", {f"lib/{library.name}": library.read_bytes(), "zz-data": _noise(name, BULK)}
    )


def _name(library: Path) -> str:
    return f"{library.stem.removeprefix('lib')}-0"


def _at(name: str) -> str:
    return f"/nix/store/{make_files(name, {'x': b''}).path}"


def _noise(name: str, size: int) -> bytes:
    return hashlib.shake_256(name.encode()).digest(size)
