"""``nix.conf``: Nix's configuration files, as far as they concern sources and trust.

Source: the Nix manual ("nix.conf"), behaviour of Nix 2.26 and 2.34.

    file    = { [ setting | include ] [ "#" comment ] LF }
    setting = name "=" { word }           words and "=" separated by spaces or tabs
    include = ( "include" | "!include" ) path       relative to the including file; "!" for one that may be missing

A later setting replaces an earlier one of the same name. ``extra-NAME = words`` appends to NAME, or to Nix's default where
nothing was set. Old names (``binary-caches``, ...) mean the new ones. Nix reads, in this order, the system's file, the
users' files and ``$NIX_CONFIG``: parse each with the result of the one before as ``base``.

Limits, enforced here: 1 MiB per file, 16 files inside each other (Nix has none and overflows its stack), 256 includes in all
(two lines that include their own file are 2^16 readings of it). Reading the files
is the caller's work. Unknown settings are kept, as plugins and other versions have others; typed values are checked when
asked for (``settings``).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from veneer.model.errors import FormatError, LimitError

MAX_SIZE = 1 << 20
MAX_INCLUDE_DEPTH = 16
MAX_INCLUDES = 256

DEFAULTS: Mapping[str, str] = {
    "substituters": "https://cache.nixos.org/",
    "trusted-public-keys": "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=",
    "trusted-substituters": "",
    "netrc-file": "/etc/nix/netrc",
    "ssl-cert-file": "",
    "require-sigs": "true",
    "narinfo-cache-negative-ttl": "3600",
}
"""Nix's own defaults for what ``settings`` tells."""

_ALIASES = {
    "binary-caches": "substituters",
    "binary-cache-public-keys": "trusted-public-keys",
    "trusted-binary-caches": "trusted-substituters",
}
_SINGLE = frozenset(("netrc-file", "ssl-cert-file", "require-sigs", "narinfo-cache-negative-ttl"))
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_WORD = re.compile(r"[^ \t\r]+")
_SECONDS = re.compile(r"[0-9]{1,10}")

Include = Callable[[str], str | None]
"""The text of a file by its path; None when there is no such file."""


def _nothing(_: str) -> str | None:
    return None


def parse_nix_conf(
    text: str,
    *,
    path: str = "/etc/nix/nix.conf",
    include: Include = _nothing,
    base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """All settings of ``text`` on top of ``base``, by their new names, words joined by one space. FormatError, LimitError.

    ``path``: the file's own, for includes and messages. ``include`` is asked for included files.
    """
    values = dict(base or {})
    included = 0

    def counted(name: str) -> str | None:
        nonlocal included
        included += 1
        if included > MAX_INCLUDES:
            raise LimitError(f"more than {MAX_INCLUDES} includes", where=path)
        return include(name)

    _parse(text, path, counted, values, 0)
    return values


@dataclass(frozen=True, slots=True)
class NixSettings:
    """What Nix would use. ``ssl_cert_file``: None when the environment or the system decides. Times in seconds."""

    substituters: tuple[str, ...]
    trusted_public_keys: tuple[str, ...]
    trusted_substituters: tuple[str, ...]
    netrc_file: str
    ssl_cert_file: str | None
    require_sigs: bool
    narinfo_cache_negative_ttl: int


def settings(values: Mapping[str, str]) -> NixSettings:
    """The typed settings in ``values`` (of ``parse_nix_conf``), Nix's defaults for the rest. FormatError."""
    found = {**DEFAULTS, **values}
    require_sigs = _BOOLEANS.get(found["require-sigs"])
    if require_sigs is None:
        raise FormatError(
            f"require-sigs is not true or false: {found['require-sigs'][:100]!r}", where="nix.conf"
        )
    ttl = found["narinfo-cache-negative-ttl"]
    if _SECONDS.fullmatch(ttl) is None:
        raise FormatError(f"narinfo-cache-negative-ttl is not a number: {ttl[:100]!r}", where="nix.conf")
    return NixSettings(
        substituters=_words(found["substituters"]),
        trusted_public_keys=_words(found["trusted-public-keys"]),
        trusted_substituters=_words(found["trusted-substituters"]),
        netrc_file=found["netrc-file"],
        ssl_cert_file=found["ssl-cert-file"] or None,
        require_sigs=require_sigs,
        narinfo_cache_negative_ttl=int(ttl),
    )


def _words(value: str) -> tuple[str, ...]:
    """The words of ``value``, each once."""
    return tuple(dict.fromkeys(value.split()))


def _parse(text: str, path: str, include: Include, values: dict[str, str], depth: int) -> None:
    if len(text) > MAX_SIZE:
        raise LimitError(f"{len(text)} characters, limit {MAX_SIZE}", where=path)
    for number, line in enumerate(text.split("\n"), 1):
        words = _WORD.findall(line.partition("#")[0])
        where = f"{path} line {number}"
        if not words:
            continue
        if words[0] in ("include", "!include") and len(words) == 2:
            _include(words[1], words[0] == "!include", where, path, include, values, depth)
        elif len(words) >= 2 and words[1] == "=" and words[0] not in ("include", "!include"):
            _set(values, words[0], " ".join(words[2:]))
        else:
            raise FormatError(f'not "name = value": {line[:200]!r}', where=where)


def _include(
    name: str,
    may_be_missing: bool,
    where: str,
    path: str,
    include: Include,
    values: dict[str, str],
    depth: int,
) -> None:
    if depth >= MAX_INCLUDE_DEPTH:
        raise LimitError(f"more than {MAX_INCLUDE_DEPTH} files include each other", where=where)
    included = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
    text = include(included)
    if text is not None:
        _parse(text, included, include, values, depth + 1)
    elif not may_be_missing:
        raise FormatError(f"included file {included!r} not found", where=where)


def _set(values: dict[str, str], name: str, value: str) -> None:
    if name.startswith("extra-"):
        name = name.removeprefix("extra-")
        name = _ALIASES.get(name, name)
        if name in _SINGLE:
            return  # not a list: Nix does not know such a setting and ignores it
        value = f"{values.get(name, DEFAULTS.get(name, ''))} {value}".strip()
    values[_ALIASES.get(name, name)] = value
