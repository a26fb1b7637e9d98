"""What to run in an environment, and what came of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from veneer.model.errors import UsageError

if TYPE_CHECKING:
    from veneer.environment.nix.database import Registration  # with sqlite3, which most runs do without

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_STORE_DIR = re.compile(r"(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+")
TEMPORARY_PREFIX = "tmp-"


@dataclass(frozen=True, slots=True)
class NixSpec:
    """How Nix inside comes to the merged store. ``socket``: where the store daemon answers Nix about this view.

    ``overlay``: every Nix inside opens a local-overlay store by itself. ``daemon``: a nix-daemon of the environment does, for all
    users inside; root only. ``filled``: the environment's database says that ``registered`` is valid, for a Nix without such stores.
    """

    socket: Path
    mode: Literal["overlay", "daemon", "filled"] = "overlay"
    registered: tuple[Registration, ...] = ()


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One command in one environment.

    ``command``: program and arguments, as for execvp; of a named environment it may be empty: then the environment just stays. ``cache_root``: the cache directory, with a daemon listening in it.
    ``view``: what the mount server brings in HELLO (None: the daemon's default). ``store_dir``: where the merged store
    appears. ``name``: of the writable layer that is kept; None for one that vanishes. ``environments_root``: the directory
    of writable layers. ``miss_seconds``: how long a read may wait for the daemon.
    ``max_parked``: how many requests may (None: as many as a mount server has by itself). ``map_root``: the command sees itself as
    root when a user namespace is needed. ``environ``, ``cwd``: the command's own. ``nix``: None to leave Nix alone.
    ``notes``: a file to which the mount servers append what is touched (``formats.touches``); None: they do not note it.
    """

    command: tuple[str, ...]
    cache_root: Path
    view: dict[str, Any] | None
    environments_root: Path
    miss_seconds: float
    environ: Mapping[str, str]
    cwd: str
    store_dir: str = "/nix/store"
    name: str | None = None
    map_root: bool = False
    nix: NixSpec | None = None
    notes: Path | None = None
    max_parked: int | None = None

    def __post_init__(self) -> None:
        if not self.command and self.name is None:
            raise UsageError("no command to run")
        check_store_dir(self.store_dir)
        if self.name is not None:
            check_name(self.name)


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """``status``: the command's exit status, or 128 + ``signal``, the one that ended it (0: none did).

    ``report``: the mount servers' own reports in one, and beside it ``warnings`` (a list of sentences) and, when the last
    one ended before the command did, ``mount_server_ended`` (how, in words).
    """

    status: int
    report: dict[str, Any]
    signal: int = 0


def is_name(name: str) -> bool:
    """Whether ``name`` can name an environment (and its directory)."""
    return bool(_NAME.fullmatch(name)) and not name.startswith(TEMPORARY_PREFIX)


def check_name(name: str) -> None:
    """UsageError unless ``is_name``."""
    if not is_name(name):
        raise UsageError(
            f"not a name for an environment: {name!r}",
            hint=f"letters, digits, '.', '_', '-'; at most 64; not beginning with '{TEMPORARY_PREFIX}'",
        )


def check_store_dir(path: str) -> None:
    """UsageError unless the store can be at ``path``: it goes unescaped into mount options and Nix's mount check."""
    if not _STORE_DIR.fullmatch(path) or path.count("/") < 2:
        raise UsageError(
            f"not a place for a store: {path!r}",
            hint="an absolute path like /nix/store, of letters, digits, '.', '_', '-'",
        )
