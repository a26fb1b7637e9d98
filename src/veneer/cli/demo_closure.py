"""The demo's closure: programs of this machine as store paths, with their libraries, and data that nobody touches.

A program is not changed: its store path holds the binary below ``libexec`` and a script below ``bin`` that starts it with
the closure's own dynamic loader and libraries. Which libraries a program needs is asked of the machine's loader
(``ld.so --list``), so search paths inside the binary count as well.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from veneer.cli.demo_cache import Content, File, store_path
from veneer.model.errors import MachineError
from veneer.model.store_path import DEFAULT_STORE_DIR, StorePath

MAIN_PROGRAMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("git", ("--version",)),
    ("bash", ("-c", 'echo "hello from bash $BASH_VERSION"')),
    ("perl", ("-e", 'print "hello from perl $^V\\n"')),
    ("grep", ("--version",)),
    ("ls", ("/nix",)),
)
"""The first that exists is run, with these arguments."""
OTHER_PROGRAMS = (
    "bash",
    "perl",
    "grep",
    "sed",
    "tar",
    "gzip",
    "zstd",
    "curl",
    "openssl",
    "ssh",
    "gdb",
    "vim",
    "less",
)
DATA = (("dataset-1.0", 8, 6 << 20), ("textures-2.1", 4, 8 << 20), ("manual-1.0", 400, 8 << 10))
"""Generated store paths: name, files, bytes of each."""
MOST_BYTES = 64 << 20
"""Programs larger than this are left out: the demo is to be quick."""
_C_LIBRARY = re.compile(
    r"(ld-.*|ld64|lib(c|m|dl|rt|pthread|resolv|util|anl|mvec|nsl|nss_.*|BrokenLocale))(-[\d.]+)?\.so(\..*)?"
)
_LISTED = re.compile(r"^\s*(\S+)\s+(?:=>\s+(\S+)\s+)?\(0x[0-9a-f]+\)$", re.MULTILINE)
_MACHINE_DIRECTORIES = ("/usr/bin", "/bin", "/usr/local/bin", "/run/current-system/sw/bin")


@dataclass(frozen=True, slots=True)
class Planned:
    """One store path to be made. ``references``: in the same plan, before it."""

    path: StorePath
    content: Content
    references: tuple[StorePath, ...]


@dataclass(frozen=True, slots=True)
class Closure:
    """``command``: what to run; its first word lies in the last of ``paths``, which refers to all others."""

    paths: tuple[Planned, ...]
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """A dynamically linked binary of this machine. ``libraries``: (name it is asked for by, file), without the loader."""

    name: str
    binary: Path
    loader: Path
    libraries: tuple[tuple[str, Path], ...]


def find_program(name: str) -> Program | None:
    """The machine's program of that name; None when there is none or it is not a dynamically linked binary."""
    found = shutil.which(name, path=":".join(_MACHINE_DIRECTORIES)) or shutil.which(name)
    if found is None:
        return None
    binary = Path(found).resolve()
    try:
        with open(binary, "rb") as file:
            loader = interpreter(file.read(4096))
        if loader is None or binary.stat().st_size > MOST_BYTES:
            return None
        return Program(name, binary, Path(loader), libraries(Path(loader), binary))
    except (OSError, subprocess.SubprocessError):
        return None  # not to be read or not to be listed: the demo takes another


def interpreter(head: bytes) -> str | None:
    """The dynamic loader that an ELF file asks for (PT_INTERP), from its first bytes; None when it asks for none."""
    if head[:4] != b"\x7fELF" or len(head) < 64:
        return None
    wide, order = head[4] == 2, "<" if head[5] == 1 else ">"
    table, size, number = (
        (*struct.unpack_from(order + "Q", head, 32), *struct.unpack_from(order + "HH", head, 54))
        if wide
        else (*struct.unpack_from(order + "I", head, 28), *struct.unpack_from(order + "HH", head, 42))
    )
    for at in range(table, table + size * number, size):
        if at + size > len(head) or struct.unpack_from(order + "I", head, at)[0] != 3:
            continue
        start, length = (
            (*struct.unpack_from(order + "Q", head, at + 8), *struct.unpack_from(order + "Q", head, at + 32))
            if wide
            else (
                *struct.unpack_from(order + "I", head, at + 4),
                *struct.unpack_from(order + "I", head, at + 16),
            )
        )
        text: bytes = head[start : start + length]
        return text.rstrip(b"\0").decode("utf-8", "replace") if len(text) == length else None
    return None


def libraries(loader: Path, binary: Path) -> tuple[tuple[str, Path], ...]:
    """What the loader would load for ``binary``: (name, file). subprocess.SubprocessError when it cannot."""
    listed = subprocess.run(
        [str(loader), "--list", str(binary)],
        check=True, capture_output=True, text=True, timeout=10, env={"LC_ALL": "C"},
    ).stdout  # fmt: skip
    return tuple(parse_list(listed, loader.name))


def parse_list(text: str, loader_name: str) -> Iterator[tuple[str, Path]]:
    """(name, file) of each line of ``ld.so --list`` that stands for a file other than the loader."""
    for name, file in _LISTED.findall(text):
        if file and Path(name).name != loader_name:
            yield Path(name).name, Path(file)


def plan() -> Closure:
    """The closure of the first main program that this machine has. MachineError when it has none."""
    found = ((find_program(name), arguments) for name, arguments in MAIN_PROGRAMS)
    main, arguments = next(((p, a) for p, a in found if p is not None), (None, ()))
    if main is None:
        names = ", ".join(name for name, _ in MAIN_PROGRAMS)
        raise MachineError(
            f"none of {names} is here as a dynamically linked program", hint="install git or bash"
        )
    others = [p for p in map(find_program, OTHER_PROGRAMS) if p is not None and p.name != main.name]
    others = [p for p in others if p.loader.resolve() == main.loader.resolve()]
    return plan_of(main, arguments, others, DATA)


def plan_of(
    main: Program, arguments: Sequence[str], others: Sequence[Program], data: Iterable[tuple[str, int, int]]
) -> Closure:
    """The store paths of ``main`` and, as its references that need not be touched, ``others`` and generated ``data``."""
    files = {name: file for program in (main, *others) for name, file in program.libraries}
    base = _c_library(main.loader, {name: file for name, file in files.items() if _C_LIBRARY.fullmatch(name)})
    own = {name: _library(name, file, base) for name, file in files.items() if not _C_LIBRARY.fullmatch(name)}
    made = [base, *own.values(), *(_program(program, base, own, ()) for program in others)]
    made += [_generated(*row) for row in data]
    top = _program(main, base, own, [planned.path for planned in made])
    command = (f"{top.path.absolute()}/bin/{main.name}", *arguments)
    return Closure((*made, top), command)


def _identity(file: Path) -> str:
    status = file.stat()
    return f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"


def _c_library(loader: Path, files: dict[str, Path]) -> Planned:
    """The loader and what belongs to it."""
    files = {**files, loader.name: loader}
    path = store_path("libc", *(_identity(file) for _, file in sorted(files.items())))
    lib = {name: File(file, executable=True) for name, file in files.items()}
    return Planned(path, {"lib": lib}, ())


def _library(name: str, file: Path, base: Planned) -> Planned:
    path = store_path(re.sub(r"[^A-Za-z0-9+\-._?=]", "-", name), str(base.path), _identity(file))
    return Planned(path, {"lib": {name: File(file)}}, (base.path,))


def _program(program: Program, base: Planned, own: dict[str, Planned], more: Sequence[StorePath]) -> Planned:
    needed = [own[name] for name, _ in program.libraries if name in own]
    references = dict.fromkeys([base.path, *(library.path for library in needed), *more])
    path = store_path(program.name, *map(str, references), _identity(program.binary))
    search = ":".join(f"{used.path.absolute()}/lib" for used in (base, *needed))
    script = (
        "#!/bin/sh\n"
        f"exec {base.path.absolute()}/lib/{program.loader.name} --library-path {search} "
        f'{DEFAULT_STORE_DIR}/{path}/libexec/{program.name} "$@"\n'
    )
    content: Content = {
        "bin": {program.name: File(script.encode(), executable=True)},
        "libexec": {program.name: File(program.binary, executable=True)},
    }
    return Planned(path, content, tuple(references))


def _generated(name: str, files: int, size: int) -> Planned:
    """Data that no compression makes small; the same on every machine."""
    content = {
        f"{number:03d}.bin": File(hashlib.shake_128(f"{name} {number}".encode()).digest(size))
        for number in range(files)
    }
    return Planned(store_path(name), {"share": content}, ())
