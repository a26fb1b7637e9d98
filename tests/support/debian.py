"""Packages from Debian's own mirrors, without root and without touching the machine's apt or dpkg.

Uses the programs apt-get, apt-config, apt-cache, dpkg and dpkg-deb, and Python's standard library only. apt checks
signatures and hashes. Mirrors, proxies and keys are those that the machine's apt is configured with; another mirror
can be given in the environment variable ``VENEER_DEBIAN_MIRROR``.

I1: a target directory exists only when it is complete (it is filled under another name, or ends with a stamp file).
I2: two processes that want the same target do the work once (``flock`` on a file beside it).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_UNNEEDED = (
    "./usr/share/doc",
    "./usr/share/man",
    "./usr/share/locale",
    "./usr/share/info",
    "./usr/share/lintian",
)


class DebianError(Exception):
    """Packages could not be had; the text says why and what to do."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path`` (made if needed, never removed); waits for other holders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def required(*programs: str) -> None:
    """DebianError if one of the programs is not on PATH."""
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        raise DebianError(f"{', '.join(missing)} not found: this needs Debian or a distribution made from it")


def run(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> str:
    """Standard output of a command; DebianError with its last words if it fails."""
    done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise DebianError(f"{command[0]} failed ({done.returncode}): {words}")
    return done.stdout


def mirror() -> str:
    """The Debian mirror that the machine's apt uses."""
    given = os.environ.get("VENEER_DEBIAN_MIRROR")
    if given:
        return given
    required("apt-get")
    uris = run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]).split()
    for uri in uris:
        if re.search(r"/debian(/\d{8}T\d{6}Z)?/?$", uri):
            return uri
    raise DebianError("apt has no Debian mirror configured; name one in VENEER_DEBIAN_MIRROR")


class PrivateApt:
    """apt with its state, lists and downloads in a directory of our own.

    Without ``suite`` it sees the machine's own package sources and thinks that nothing is installed; with ``suite``
    (``bookworm``, ``trixie``, ``sid``) it sees that suite of Debian's mirror only.
    """

    def __init__(self, directory: Path, suite: str | None = None) -> None:
        required("apt-get", "apt-config", "dpkg-deb")
        self.directory = directory.resolve()
        self.archives = self.directory / "cache" / "archives"
        for name in (
            "state/lists/partial",
            "cache/archives/partial",
            "etc/parts",
            "etc/preferences.d",
            "etc/trusted.d",
        ):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        (self.directory / "state/status").touch()
        config = self.directory / "apt.conf"
        config.write_text("\n".join([*_machine_settings(), *self._settings(suite)]) + "\n")
        self._env = dict(
            os.environ, APT_CONFIG=str(config), LC_ALL="C.UTF-8", DEBIAN_FRONTEND="noninteractive"
        )

    def _settings(self, suite: str | None) -> list[str]:
        own, etc = self.directory, Path("/etc/apt")
        settings = {
            "Dir::State": own / "state",
            "Dir::State::status": own / "state/status",
            "Dir::Cache": own / "cache",
            "Dir::Log": own,
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": own
            / "etc/parts",  # the machine's hooks would act on the machine's directories
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": own / "etc/preferences.d",
            "Dir::Etc::sourcelist": etc / "sources.list",
            "Dir::Etc::sourceparts": etc / "sources.list.d",
            "Dir::Etc::trusted": etc / "trusted.gpg",
            "Dir::Etc::trustedparts": etc / "trusted.gpg.d",
            "Dir::Etc::netrc": etc / "auth.conf",
            "Dir::Etc::netrcparts": etc / "auth.conf.d",
            "APT::Install-Recommends": "0",
            "APT::Sandbox::User": "root",  # that is: do not change to the user _apt
            "Debug::NoLocking": "1",
            "Acquire::Languages": "none",
            "Acquire::PDiffs": "0",
            "Acquire::Retries": "3",
            "Acquire::http::Timeout": "30",
            "Acquire::https::Timeout": "30",
            "Acquire::Check-Valid-Until": "0",  # a mirror that stands still has expired lists, and is still signed
        }
        if suite is not None:
            if not _KEYRING.exists():
                raise DebianError(f"{_KEYRING} not found: install debian-archive-keyring")
            sources = own / "etc/sources.list"
            sources.write_text(f"deb [signed-by={_KEYRING}] {mirror()} {suite} main\n")
            settings |= {"Dir::Etc::sourcelist": sources, "Dir::Etc::sourceparts": "/dev/null"}
        return [f'{name} "{value}";' for name, value in settings.items()]

    def run(self, *command: str) -> str:
        """An apt program in this private world; its standard output."""
        return run(command, self._env)

    def update(self) -> None:
        self.run("apt-get", "-qq", "update")

    def download(self, packages: Sequence[str]) -> list[Path]:
        """Just these packages."""
        before = set(self.archives.glob("*.deb"))
        done = subprocess.run(
            ["apt-get", "-qq", "download", *packages],
            env=self._env,
            cwd=self.archives,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise DebianError(f"apt-get download {' '.join(packages)} failed: {done.stderr.strip()[-2000:]}")
        return sorted(set(self.archives.glob("*.deb")) - before)

    def download_closure(self, packages: Sequence[str]) -> list[Path]:
        """These packages and everything that they depend on, down to libc. All .deb files in ``archives``."""
        self.run("apt-get", "-qq", "-y", "--download-only", "install", *packages)
        return sorted(self.archives.glob("*.deb"))


def _machine_settings() -> list[str]:
    """How the machine reaches its mirrors (proxies, certificates), and nothing else of its configuration."""
    lines = run(["apt-config", "dump"]).splitlines()
    return [
        line
        for line in lines
        if line.startswith("Acquire::") and not line.startswith("Acquire::IndexTargets")
    ]


def unpack(deb: Path, target: Path) -> None:
    """A package's files under ``target``, without documentation; owned by whoever calls."""
    target.mkdir(parents=True, exist_ok=True)
    tar = ["tar", "-x", "-C", str(target), "--no-same-owner", "--keep-directory-symlink"]
    tar += [f"--exclude={name}" for name in _UNNEEDED]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as source:
        done = subprocess.run(tar, stdin=source.stdout, capture_output=True, text=True)
    if done.returncode or source.returncode:
        raise DebianError(f"cannot unpack {deb.name}: {done.stderr.strip()[-2000:]}")


def fetch_program(target: Path, suite: str, packages: Sequence[str], programs: Sequence[str]) -> Path:
    """Programs of a Debian suite with their whole library closure (libc too), runnable where they lie, by anybody.

    ``programs`` are paths relative to the root (``usr/bin/nix``); symbolic links to them come along. Returns the
    directory that holds the unpacked root, ``target/root``; ``target/bin`` holds links to the programs. ``target``
    must be its final place: interpreter and library paths in the binaries are absolute. Idempotent.
    """
    stamp = target / "complete"
    if stamp.exists():
        return target / "root"
    with locked(target.with_name(target.name + ".lock")):
        if stamp.exists():
            return target / "root"
        shutil.rmtree(target, ignore_errors=True)
        apt = PrivateApt(target / "apt", suite)
        apt.update()
        root = target / "root"
        for deb in apt.download_closure([*packages, "patchelf"]):
            unpack(deb, root)
        shutil.rmtree(target / "apt")
        _make_relocated(root.resolve(), programs)
        (target / "bin").mkdir()
        for program in programs:
            place = root / program
            for name in place.parent.iterdir():
                if name.resolve() == place.resolve():
                    (target / "bin" / name.name).symlink_to(Path("../root") / name.relative_to(root))
        stamp.touch()
    return root


def _make_relocated(root: Path, programs: Sequence[str]) -> None:
    """Make programs and their libraries find each other under ``root``; drop every library that none of them loads."""
    library_dirs = [
        d
        for d in sorted(root.glob("usr/lib/*-linux-gnu*")) + sorted(root.glob("lib/*-linux-gnu*"))
        if d.is_dir()
    ]
    library_dirs += [d for d in (root / "usr/lib/nix",) if d.is_dir()]
    loaders = [f for d in library_dirs for f in d.glob("ld-linux*.so.*")]
    if not loaders:
        raise DebianError(f"no dynamic loader under {root}")
    loader, search = str(loaders[0]), ":".join(str(d) for d in library_dirs)
    patchelf = [
        loader,
        "--library-path",
        search,
        str(root / "usr/bin/patchelf"),
        "--force-rpath",
        "--set-rpath",
        search,
    ]
    binaries = [(root / program).resolve() for program in programs]

    def loaded_by(binary: Path) -> set[Path]:
        listing = run([loader, "--library-path", search, "--list", str(binary)])
        return {Path(word).resolve() for word in re.findall(r"(/\S+) \(0x", listing)}

    libraries = {loaders[0].resolve()}.union(*map(loaded_by, binaries))
    for file in sorted(libraries - loaded_by(root / "usr/bin/patchelf")):  # it cannot rewrite what it runs on
        run([*patchelf, str(file)])
    for file in binaries:
        run([*patchelf, "--set-interpreter", loader, str(file)])
    keep = libraries.union(binaries, (f.resolve() for d in library_dirs for f in d.glob("libnss_*.so*")))
    for place, _, names in os.walk(root):
        for name in names:
            file = Path(place, name)
            if file.resolve() not in keep and not _is_kept_data(file.relative_to(root)):
                file.unlink()


def _is_kept_data(relative: Path) -> bool:
    return (
        relative.parts[:3] in {("usr", "share", "nix"), ("usr", "share", "nginx")}
        or relative.parts[0] == "etc"
    )
