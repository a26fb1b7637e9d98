"""What the user's Nix needs of an environment, and what it gets: the flags and their meaning."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import click

from veneer.cli.config import Settings, SourceSetting
from veneer.cli.options import Decorator, Function, store_path_arguments
from veneer.cli.output import Output
from veneer.cli.private_daemon import WatchedDaemon
from veneer.model.errors import NotFoundError, VeneerError
from veneer.model.store_path import DEFAULT_STORE_DIR, StorePath

if TYPE_CHECKING:
    from pathlib import Path

    from veneer.cli.client import Client
    from veneer.cli.reader import StoreReader
    from veneer.environment import NixSpec
    from veneer.environment.nix.database import Registration

MODES = ("auto", "overlay", "daemon", "filled", "off")
_VERSION_SECONDS = 5.0
_DRV = ".drv"
_HOST_STORE = "local"
_HOST_DATABASE = "/nix/var/nix/db/db.sqlite"

_FLAGS: tuple[Decorator, ...] = (
    click.option(
        "--nix",
        type=click.Choice(MODES),
        default="auto",
        show_default=True,
        help="How Nix inside uses the merged store. overlay: by itself (2.22 and newer); daemon: through a nix-daemon of the"
        " environment, for several users (root only); filled: with a database filled with --closure, for older Nix and"
        " forks; off: not at all; auto: overlay or filled, as the Nix in PATH is.",
    ),
    click.option(
        "--closure",
        metavar="PATH",
        multiple=True,
        help="For --nix filled: a store path that Nix shall take for valid, with all that it refers to; of a .drv the"
        " outputs too. Repeatable.",
    ),
)


@dataclass(frozen=True, slots=True)
class NixFlags:
    """What the command line said. ``mode``: one of MODES; ``closure``: store paths."""

    mode: str
    closure: tuple[str, ...]

    @property
    def wanted(self) -> bool:
        return self.mode != "off"


def nix_flags(function: Function) -> Function:
    """Adds --nix and --closure; the command gets them as one argument, ``nix``."""

    @functools.wraps(function)
    def command(*args: Any, nix: str, closure: tuple[str, ...], **given: Any) -> Any:
        return function(*args, nix=NixFlags(nix, closure), **given)

    wrapped: Function = command
    for option in reversed(_FLAGS):
        wrapped = option(wrapped)
    return wrapped


def nix_spec(flags: NixFlags, daemon: WatchedDaemon, cache_dir: Path, output: Output) -> NixSpec | None:
    """The environment's part. UsageError, and the daemon's errors about the paths of ``closure``."""
    from veneer.environment import NixSpec

    if not flags.wanted:
        return None
    mode = _mode_of_installed(bool(flags.closure), output) if flags.mode == "auto" else flags.mode
    match mode:
        case "overlay":
            return NixSpec(daemon.nix_socket)
        case "daemon":
            return NixSpec(daemon.nix_socket, "daemon")
        case _:
            rows = registrations(daemon.client, cache_dir, store_path_arguments(flags.closure))
            return NixSpec(daemon.nix_socket, "filled", rows)


def with_host_store(settings: Settings, flags: NixFlags) -> Settings:
    """``settings`` with the host's own store as a source, so that Nix inside takes for valid what the host's Nix does.

    Its files lie beneath the environment's store in any case.
    """
    if not flags.wanted or settings.borrowed or not os.access(_HOST_DATABASE, os.R_OK):
        return settings
    if any(source.url.partition("?")[0] == _HOST_STORE for source in settings.sources):
        return settings
    return replace(settings, sources=(SourceSetting(_HOST_STORE, "strict"), *settings.sources))


def _mode_of_installed(has_closure: bool, output: Output) -> Literal["overlay", "filled"]:
    from veneer.environment.nix import version

    try:
        found = version.detect(None, os.environ, _VERSION_SECONDS)
    except VeneerError:  # none here: perhaps there is one inside
        return "overlay"
    if found is None or found.has_local_overlay:
        return "overlay"
    if not has_closure:
        output.note(
            f"{found} cannot ask which paths the caches have: name those that it shall take for valid with --closure"
        )
    return "filled"


def registrations(client: Client, cache_dir: Path, roots: list[str]) -> tuple[Registration, ...]:
    """Rows of Nix's database for the closure of ``roots`` (base names), and for that of the outputs of each ``.drv``.

    NotFoundError: no source has a path of it.
    """
    if not roots:
        return ()
    from veneer.cli.reader import StoreReader
    from veneer.environment.nix.database import Registration
    from veneer.formats.derivation import parse_outputs
    from veneer.model.hashes import Hash

    reader = StoreReader(client, cache_dir)
    outputs: dict[str, tuple[tuple[str, StorePath], ...]] = {}
    rows: dict[str, dict[str, object]] = {}
    waiting = list(roots)
    asked = set(roots)
    while waiting:
        for row in _closure(client, waiting):
            rows[str(row["path"])] = row
        waiting = []
        for path in [path for path in rows if path.endswith(_DRV) and path not in outputs]:
            outputs[path] = parse_outputs(_content(reader, path), store_dir=DEFAULT_STORE_DIR)
            if path in asked:
                waiting += [o.basename for _, o in outputs[path] if _is_there(client, o.basename)]
    return tuple(
        Registration(
            path=StorePath.parse(path),
            nar_hash=Hash.parse(str(row["nar_hash"])),
            nar_size=_number(row["nar_size"]),
            references=tuple(StorePath.parse(name) for name in _strings(row["references"])),
            deriver=str(row["deriver"]) if row["deriver"] else None,
            signatures=tuple(_strings(row["signatures"])),
            ca=str(row["ca"]) if row["ca"] else None,
            outputs=outputs.get(path),
        )
        for path, row in rows.items()
    )


def _closure(client: Client, paths: list[str]) -> list[dict[str, object]]:
    found = client.control("closure", {"paths": paths})["paths"]
    assert isinstance(found, list)
    return found


def _is_there(client: Client, path: str) -> bool:
    try:
        _closure(client, [path])
    except NotFoundError:
        return False
    return True


def _content(reader: StoreReader, path: str) -> bytes:
    """A store path that is a file."""
    held, entry = reader.resolve([path.encode()], follow=True)
    return b"".join(reader.content(held, entry))


def _number(value: object) -> int:
    assert isinstance(value, int)
    return value


def _strings(value: object) -> list[str]:
    assert isinstance(value, list)
    return [str(item) for item in value]
