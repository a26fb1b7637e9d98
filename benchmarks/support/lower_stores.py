"""Closures, lower stores that tell real Nix about them, and a local-overlay store that registers them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from benchmarks.support.peers import instant_lower
from benchmarks.support.stage import BenchError, timed, veneer_command
from tests.support.nix import RealNix
from veneer.formats import worker_wire as wire
from veneer.formats.cache_info import CacheInfo, write_cache_info
from veneer.formats.nar import nar_of
from veneer.formats.narinfo import parse_narinfo, write_narinfo
from veneer.formats.signature import SecretKey, fingerprint
from veneer.model.hashes import Hash, nix32_encode
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import DEFAULT_STORE_DIR, StorePath
from veneer.model.tree import RegularFile

PARENTS = 200
"""A made path's first referrer is among the last so many: the smaller, the deeper the closure."""
REFERENCES = 3
"""Further references of each made path."""
_FEATURES = "experimental-features = nix-command local-overlay-store"
_END_SECONDS = 20


@dataclass(frozen=True, slots=True)
class Closure:
    """A closure in a signed binary cache, as its narinfos tell it."""

    cache: Path
    public_key: str
    top: str
    infos: list[UnverifiedPathInfo]


def closure_in(cache: Path, public_key: str, top: str) -> Closure:
    """The closure of ``top``."""
    found: dict[StorePath, UnverifiedPathInfo] = {}
    waiting = [StorePath.parse_absolute(top)]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found[path] = parse_narinfo((cache / f"{path.hash_part}.narinfo").read_bytes())
            waiting += found[path].references
    return Closure(cache, public_key, top, list(found.values()))


def write_closure(cache: Path, count: int) -> Closure:
    """A cache (made here) with a closure of ``count`` paths, all of which are one empty file."""
    chance, key = random.Random(0), SecretKey.generate("registration-1")
    nar = b"".join(nar_of(RegularFile(0, executable=False, offset=0), lambda file: ()))
    (cache / "nar").mkdir(parents=True)
    (cache / "nar" / "empty.nar").write_bytes(nar)
    (cache / "nix-cache-info").write_bytes(write_cache_info(CacheInfo(DEFAULT_STORE_DIR, True, 40)))
    paths = [StorePath(nix32_encode(chance.randbytes(20)), f"package-{n}-1.{n}.0") for n in range(count)]
    references: list[set[StorePath]] = [set() for _ in paths]
    for number in range(1, count):
        references[chance.randrange(max(0, number - PARENTS), number)].add(paths[number])
        for _ in range(REFERENCES):
            references[number - 1].add(paths[chance.randrange(number, count)])
    infos = []
    for path, wanted in zip(paths, references, strict=True):
        info = UnverifiedPathInfo(
            store_path=path,
            url="nar/empty.nar",
            compression="none",
            nar_hash=Hash("sha256", hashlib.sha256(nar).digest()),
            nar_size=len(nar),
            references=tuple(sorted(wanted)),
            deriver=f"{nix32_encode(chance.randbytes(20))}-{path.name}.drv",
        )
        signed = key.sign(fingerprint(info)).encode()
        narinfo = write_narinfo(info) + b"Sig: " + signed + b"\n"
        (cache / f"{path.hash_part}.narinfo").write_bytes(narinfo)
        infos.append(parse_narinfo(narinfo))
    return Closure(cache, str(key.public_key()), paths[0].absolute(), infos)


@contextlib.contextmanager
def instant(home: Path, closure: Closure) -> Iterator[Path]:
    """The socket of a server in C that has every answer ready. NotHereError when it cannot be compiled."""
    table, socket = home / "instant.table", home / "instant.sock"
    with open(table, "wb") as file:
        for info in closure.infos:
            for part in (info.store_path.absolute().encode(), _reply(info)):
                file.write(struct.pack("=Q", len(part)) + part)
    with _running([*instant_lower(), socket, table], signal.SIGKILL) as server:
        assert server.stdout is not None
        if server.stdout.read(1) != b"1":
            raise BenchError("the instant lower store did not start")
        yield socket
    socket.unlink()


@contextlib.contextmanager
def daemon(cache_dir: Path, url: str, public_key: str) -> Iterator[Path]:
    """The socket for Nix of a store daemon on ``cache_dir`` (made when it is not there), ready for clients."""
    cache_dir.mkdir(exist_ok=True)
    view = cache_dir.with_suffix(".json")
    view.write_text(json.dumps({"sources": [{"url": url}], "keys": [public_key]}))
    ready, theirs = os.pipe()
    command: list[str | Path] = [sys.executable, "-m", "veneer.daemon", "--cache", cache_dir, "--view", view]
    command += ["--ready-fd", str(theirs)]
    try:
        with _running(command, signal.SIGTERM, pass_fds=(theirs,)):
            os.close(theirs)
            theirs = -1
            if os.read(ready, 1) != b"1":
                raise BenchError("the daemon did not start")
            yield cache_dir / "nix.sock"
    finally:
        os.close(ready)
        if theirs >= 0:
            os.close(theirs)


class OverlayStore:
    """Real Nix with a local-overlay store over ``veneer mount``; its database begins empty with each registration."""

    def __init__(self, programs: Path, home: Path) -> None:
        """``home``: an empty directory, without symbolic links or characters that Nix's check of the mount trips over."""
        self.nix = RealNix(programs, home / "nix")
        self.lower, self.root, self.upper = home / "lower", home / "root", home / "upper"
        self._home = home
        configuration = home / "nix" / "conf" / "nix.conf"
        configuration.write_text(
            configuration.read_text() + f"{_FEATURES}\nstore = dummy://\nbuild-users-group =\n"
        )

    @contextlib.contextmanager
    def mounted(self, url: str, public_key: str) -> Iterator[None]:
        """The lower store's files (a mount with a cache directory of its own: registering reads no file) and the overlay."""
        lower, merged, work = self.lower / "nix/store", self.root / "nix/store", self._home / "work"
        for directory in (lower, merged, self.upper, work):
            directory.mkdir(parents=True)
        options = ["--cache", url, "--trusted-public-key", public_key]
        options += ["--cache-dir", str(self._home / "mount-cache"), "--config", "/dev/null"]
        command = [*veneer_command(), "mount", *options, str(lower)]
        with _running(command, signal.SIGINT, stderr=subprocess.PIPE) as mount:
            assert mount.stderr is not None
            said = mount.stderr.readline()
            if b"mounted on" not in said:
                raise BenchError(f"veneer mount: {said!r}")
            layers = f"lowerdir={lower},upperdir={self.upper},workdir={work}"
            subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, merged], check=True)
            try:
                yield
            finally:
                subprocess.run(["umount", merged], check=True)

    def url(self, socket: Path) -> str:
        """The store with the socket as its lower store."""
        lower = quote(f"unix://{socket}?root={self.lower}", safe="")
        return f"local-overlay://?root={self.root}&lower-store={lower}&upper-layer={self.upper}"

    def register(self, socket: Path, top: str) -> float:
        """Seconds until Nix has the closure of ``top`` in a new database."""
        if (self.root / "nix/var").exists():
            shutil.rmtree(self.root / "nix/var")
        command: list[str | Path] = [self.nix.programs / "nix", "path-info", "--store", self.url(socket), top]
        return timed(command, env=self.nix.environment, cwd=self._home)

    def registered(self, socket: Path) -> int:
        """How many paths are in its database."""
        command: Sequence[str] = ["nix", "path-info", "--all", "--store", self.url(socket)]
        return len(self.nix.run(*command).split())


def _reply(info: UnverifiedPathInfo) -> bytes:
    """What a lower store says about a path."""
    deriver = f"{DEFAULT_STORE_DIR}/{info.deriver}" if info.deriver else ""
    references = [path.absolute() for path in info.references]
    fields = (deriver, info.nar_hash.digest.hex(), references, 0, info.nar_size, 0)
    return wire.reply((1, *fields, list(info.signatures), info.ca))


@contextlib.contextmanager
def _running(
    command: Sequence[str | Path],
    ending: signal.Signals,
    *,
    pass_fds: Iterable[int] = (),
    stderr: int | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended with the block."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        pass_fds=tuple(pass_fds),
        bufsize=0,
    )
    with process:
        try:
            yield process
        finally:
            process.send_signal(ending)
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
