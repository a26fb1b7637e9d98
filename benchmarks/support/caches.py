"""The corpus in three kinds of binary cache, each behind its own nginx: as we publish it, as it is (zstd), and as xz."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.support.stage import Stage, veneer_command
from tests.support.nginx import Nginx, find_nginx
from tests.support.nix import RealNix, fetch_nix
from veneer.formats.signature import SecretKey


@dataclass(frozen=True)
class Served:
    """A cache behind nginx. ``key``: whose signatures count."""

    name: str
    server: Nginx
    key: str


@contextlib.contextmanager
def caches(stage: Stage) -> Iterator[dict[str, Served]]:
    """The corpus as published by us, as it is (zstd), and as xz, each served."""
    with contextlib.ExitStack() as stack:

        def serve(name: str, place: Path, key: str) -> Served:
            home = stage.home / f"nginx-{name}"
            home.mkdir()
            subprocess.run(["cat", *sorted(place.glob("nar/*"))], stdout=subprocess.DEVNULL, check=True)
            return Served(name, stack.enter_context(Nginx(find_nginx(), home, place, workers=2)), key)

        key_file, public = _key(stage)
        yield {
            "published": serve("published", _published(stage, key_file), public),
            "zstd": zstd(stage),
            "xz": serve("xz", _xz(stage), stage.corpus.public_key),
        }


def zstd(stage: Stage) -> Served:
    """The corpus as real Nix wrote it."""
    return Served("zstd", stage.server, stage.corpus.public_key)


def _key(stage: Stage) -> tuple[Path, str]:
    secret = SecretKey.generate("published-1")
    file = stage.home / "key"
    file.write_text(secret.text())
    return file, str(secret.public_key())


def _published(stage: Stage, key_file: Path) -> Path:
    place = stage.home / "published"
    from_, to = ["--from", f"file://{stage.corpus.cache}"], ["--to", f"file://{place}"]
    key = ["--trusted-public-key", stage.corpus.public_key, "--key-file", str(key_file)]
    cache = stage.home / "publishing"
    command = [
        *veneer_command(),
        "mirror",
        "-q",
        *from_,
        *to,
        *key,
        "--cache-dir",
        str(cache),
        stage.corpus.top,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(cache, ignore_errors=True)
    return place


def _xz(stage: Stage) -> Path:
    """Made once for a corpus, because it takes minutes, and kept beside it."""
    place = stage.corpus.cache.with_name("cache-xz")
    if not (place / "nix-cache-info").exists():
        made = place.with_name("cache-xz.incoming")
        shutil.rmtree(made, ignore_errors=True)
        nix = RealNix(fetch_nix(), stage.home / "nix-xz")
        to = f"file://{made}?compression=xz&compression-level=1&parallel-compression=true&write-nar-listing=true"
        options = ["--option", "trusted-public-keys", stage.corpus.public_key]
        command = ["copy", *options, "--from", f"file://{stage.corpus.cache}", "--to", to, stage.corpus.top]
        subprocess.run([nix.programs / "nix", *command], check=True, env=nix.environment)
        made.rename(place)
    return place
