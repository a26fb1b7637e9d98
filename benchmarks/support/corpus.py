"""A store as large and as tangled as a real one: a Debian package closure, one store path for each package.

::

    ./dev bench corpus            makes it in .dev/bench/corpus (2 minutes, 6 GB) and prints where

306 paths, 939 references, depth 17, 2.1 GiB of NARs, 0.7 GiB as zstd. Packages are downloaded with apt's checks,
built by real Nix in a chroot store, and copied into a signed cache with listings. The machine's apt, dpkg and /nix stay untouched.
``nix-support/depends`` in each path names the paths of the packages that it depends on, so that Nix sees references;
every third path refers to itself.

The directory: ``corpus.json`` (written last), ``cache`` (the binary cache), ``nix`` (Nix's home; ``nix/store`` is the
unpacked truth), ``apt`` (downloads).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.debian import PrivateApt, locked, run
from tests.support.nix import RealNix, fetch_nix
from tests.support.places import own_directory

SUITE = "bookworm"
PACKAGES = """
bash coreutils file gawk jq man-db rsync tmux vim zsh emacs-nox automake autoconf libtool make cmake
binutils gcc-12 g++-12 clang-14 gdb libc6-dev linux-libc-dev git python3 python3-numpy python3-pip
perl ruby nodejs golang-1.19-go rustc openjdk-17-jre-headless postgresql-15 redis-server sqlite3
nginx curl openssh-client ca-certificates tzdata locales fonts-dejavu
""".split()  # noqa: SIM905 (forty quoted names are hard to read)

_HEADER = r"""
let
  package = name: deb: depends: refersToItself: derivation {
    inherit name deb depends;
    system = builtins.currentSystem;
    builder = "/bin/sh";
    PATH = "/usr/bin:/bin";
    args = [ "-euc" ''
      mkdir -p $out/nix-support
      dpkg-deb --fsys-tarfile $deb | tar -x -C $out --no-same-owner --no-same-permissions --delay-directory-restore
      chmod -R u+rwX $out
      echo $depends > $out/nix-support/depends
      ${if refersToItself then "echo $out > $out/nix-support/self" else ":"}
    '' ];
  };
"""
_FOOTER = r"""
  all = derivation {
    name = "corpus";
    system = builtins.currentSystem;
    builder = "/bin/sh";
    PATH = "/usr/bin:/bin";
    depends = builtins.attrValues packages;
    args = [ "-euc" "mkdir $out; for path in $depends; do ln -s $path $out/; done" ];
  };
in packages // { inherit all; }
"""


@dataclass(frozen=True, slots=True)
class Package:
    """A downloaded package; ``depends`` are names (of packages or provided) as its control file has them."""

    name: str
    version: str
    file: Path
    depends: tuple[tuple[str, ...], ...]
    """Each a choice of alternatives."""
    provides: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Corpus:
    """A corpus on disk."""

    cache: Path
    """The binary cache's directory (zstd, listings, signed)."""
    public_key: str
    top: str
    """The store path whose closure is everything."""
    paths: Mapping[str, str]
    """Package name -> store path."""
    store: Path
    """The chroot store with the unpacked truth."""

    def unpacked(self, path: str) -> Path:
        return self.store / path.removeprefix("/")


def corpus(directory: Path | None = None, packages: Sequence[str] = PACKAGES) -> Corpus:
    """The corpus in ``directory`` (by default ``.dev/bench/corpus``), made if it is not there yet."""
    directory = (directory or own_directory() / "bench" / "corpus").resolve()
    description = directory / "corpus.json"
    with locked(directory / "lock"):
        if not description.exists():
            _make(directory, packages)
        found = json.loads(description.read_text())
    places = {"cache": directory / found["cache"], "store": directory / found["store"]}
    return Corpus(public_key=found["public_key"], top=found["top"], paths=found["paths"], **places)


def _make(directory: Path, names: Sequence[str]) -> None:
    apt = PrivateApt(directory / "apt", SUITE)
    apt.update()
    packages = {p.name: p for p in map(read_package, apt.download_closure(names))}
    home = directory / "nix"
    for unfinished in (home, directory / "cache"):
        if unfinished.exists():
            subprocess.run(["chmod", "-R", "u+w", unfinished], check=True)
            shutil.rmtree(unfinished)
    nix = RealNix(fetch_nix(), home)
    (home / "corpus.nix").write_text(expression(packages))
    top = nix.run("nix-build", home / "corpus.nix", "-A", "all", "--no-out-link").strip()
    wanted = 'builtins.mapAttrs (name: toString) (builtins.removeAttrs (import ./corpus.nix) [ "all" ])'
    paths = json.loads(
        nix.run("nix", "eval", "--impure", "--json", "--expr", wanted.replace("./", f"{home}/"))
    )
    secret, public = nix.make_key("corpus-1")
    nix.copy([top], f"file://{directory}/cache?compression=zstd&write-nar-listing=true&secret-key={secret}")
    found = {"cache": "cache", "store": "nix/store", "public_key": public, "top": top, "paths": paths}
    partial = directory / "corpus.json.partial"
    partial.write_text(json.dumps(found, indent=1))
    partial.rename(directory / "corpus.json")


def read_package(file: Path) -> Package:
    """From the control file of a .deb."""
    fields = ("Package", "Version", "Depends", "Pre-Depends", "Provides")
    control = dict(
        re.findall(r"^([A-Za-z-]+): (.*)$", run(["dpkg-deb", "--field", file, *fields]), re.MULTILINE)
    )
    clauses = [
        c for name in ("Pre-Depends", "Depends") for c in control.get(name, "").split(",") if c.strip()
    ]
    return Package(
        name=control["Package"],
        version=control["Version"],
        file=file,
        depends=tuple(tuple(_bare(alternative) for alternative in clause.split("|")) for clause in clauses),
        provides=tuple(_bare(name) for name in control.get("Provides", "").split(",") if name.strip()),
    )


def _bare(dependency: str) -> str:
    """``libc6:any (>= 2.36)`` -> ``libc6``."""
    return re.split(r"[\s:(]", dependency.strip())[0]


def dependencies(packages: Mapping[str, Package]) -> dict[str, list[str]]:
    """Package -> packages it depends on, in an order in which each comes after its own; cycles are cut."""
    provider = {name: p.name for p in packages.values() for name in p.provides}

    def direct(package: Package) -> Iterable[str]:
        for alternatives in package.depends:
            known = (name if name in packages else provider.get(name) for name in alternatives)
            yield from [name for name in known if name is not None and name != package.name][:1]

    ordered: dict[str, list[str]] = {}
    under_way: set[str] = set()

    def visit(name: str) -> None:
        under_way.add(name)
        kept = []
        for dependency in dict.fromkeys(direct(packages[name])):
            if dependency not in ordered and dependency not in under_way:
                visit(dependency)
            if dependency in ordered:  # else it is under way: a cycle, cut here
                kept.append(dependency)
        ordered[name] = kept

    for name in sorted(packages):
        if name not in ordered:
            visit(name)
    return ordered


def expression(packages: Mapping[str, Package]) -> str:
    """The Nix expression: an attribute for each package, and ``all``."""
    lines = [_HEADER, "  packages = rec {"]
    for number, (name, needed) in enumerate(dependencies(packages).items()):
        package = packages[name]
        version = re.sub(r"[^A-Za-z0-9+._?=-]", "_", package.version.split(":")[-1])
        file_name = re.sub(r"[^A-Za-z0-9+._?=-]", "_", package.file.name)
        deb = f'builtins.path {{ path = {json.dumps(str(package.file))}; name = "{file_name}"; }}'
        depends = " ".join(f"packages.{json.dumps(n)}" for n in needed)
        refers_to_itself = "true" if number % 3 == 0 else "false"
        lines.append(
            f'    {json.dumps(name)} = package "{name}-{version}" ({deb}) [ {depends} ] {refers_to_itself};'
        )
    return "\n".join([*lines, "  };", _FOOTER])
