"""Findings, and what checks are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from veneer.model.store_path import StorePath

State = Literal["failed", "warning", "ok", "skipped"]
STATES: tuple[State, ...] = ("failed", "warning", "ok", "skipped")
"""Worst first."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a check saw. ``fix``: a command or a line of configuration, or what to do in a few words."""

    state: State
    what: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """A result with its check's name and group. ``why``: why it matters."""

    name: str
    group: str
    state: State
    what: str
    why: str
    fix: str


@dataclass(frozen=True, slots=True)
class Subject:
    """Who and what is examined: the settings of this call. ``sources``: store URLs as configured.

    ``nix``: values of the user's Nix configuration; ``nix_error``: why it could not be read.
    ``status``: asks the running daemon; None when none runs, VeneerError when it cannot be used.
    ``memory``: asks it what its sources said of these paths before: base name -> source -> NarHash.
    """

    environ: Mapping[str, str]
    uid: int
    cache_dir: Path
    environments_dir: Path
    max_bytes: int | None
    sources: tuple[str, ...]
    keys: tuple[str, ...]
    require_signatures: bool
    netrc: Path | None
    ca_file: Path | None
    nix: Mapping[str, str]
    nix_error: str
    status: Callable[[], dict[str, object] | None]
    memory: Callable[[list[str]], dict[str, dict[str, str]]]
    paths: tuple[StorePath, ...] = ()
    borrowed: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table. ``seconds``: how long it may take. ``why``: for people and for the reference page."""

    name: str
    group: str
    looks_at: str
    why: str
    examine: Callable[[Subject], Iterator[Result]] = field(repr=False)
    seconds: float = 5.0
