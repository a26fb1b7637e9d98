r"""``local-overlay://``: the URL of Nix's overlay store, and Nix's check of the mount beneath it.

Source: NixOS/nix, ``local-overlay-store.cc`` and ``url.cc``; each rule compared with real Nix 2.26 and 2.34.

    url   = "local-overlay://?" name "=" value { "&" name "=" value }      values percent-encoded, once
    names = lower-store, upper-layer, and optional: root | real, state, remount-hook, check-mount
    lower-store = a store URL of its own: "unix://" socket "?root=" lower root;     merged store = root + "/nix/store"

The lower store's URL has ``?``, ``=`` and perhaps ``&`` of its own, so it is encoded as a whole. What Nix makes of others:
encoded twice: 2.26 takes it, 2.34 refuses it. Not encoded: both take it while it has one parameter; from a second one on, that
belongs to the outer URL. Without ``lower-store`` Nix takes the machine's default store, and creates ``/nix`` for it.

The check (``check-mount``, on unless switched off), over the text of /proc/self/mounts:

    last match of   (^|\n)overlay MERGED .*(\n|$)     has     \blowerdir=LOWER( |,)     and     \bupperdir=UPPER( |,)

with the three paths put in without escaping, while the kernel writes blanks, commas and backslashes as octal escapes. So the
mount's source must be named ``overlay``, and the paths must be written in the options as Nix writes them: absolute,
no links, no slash at the end, one lower directory. Paths with characters of a regular expression never match themselves; ``.``,
``|``, ``]`` and ``}`` do, but between two ``|`` of the merged store's path nothing matches everywhere, and Nix would look for the
last match for ever. Nix does not see what other kinds of mounts cover the overlay: ``cover`` does.

Limits: none; the text is the user's own or the kernel's. Nothing here touches the machine.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from urllib import parse

STORE = "/nix/store"
SCHEME = "local-overlay://"
_NEVER_MATCH = frozenset("\\^$*+?()[{")
_ESCAPED_BY_KERNEL = frozenset(" \t\n,")
_ESCAPE = re.compile(r"\\([0-3][0-7]{2})")
_TWICE = re.compile(r"%25[0-9A-Fa-f]{2}")
_FALSE = ("false", "no", "0")
_quote = partial(parse.quote, errors="surrogateescape")
_unquote = partial(parse.unquote, errors="surrogateescape")
"""For paths as Python has them: bytes that are no UTF-8 stand as surrogates."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong and the line or command that is right. ``refused``: Nix refuses it; otherwise it works by luck."""

    what: str
    fix: str
    refused: bool = True


@dataclass(frozen=True, slots=True)
class OverlayStore:
    """An overlay store over a socket and its files. All paths absolute. ``root``: "" for the machine's own /nix/store;
    ``state_dir``: "" for the directory of databases that goes with it."""

    lower_socket: str
    lower_root: str
    upper_layer: str
    root: str = ""
    remount_hook: str = ""
    check_mount: bool = True
    state_dir: str = ""

    @property
    def real_store_dir(self) -> str:
        """Where the overlay must be mounted."""
        return self.root + STORE

    @property
    def lower_store_dir(self) -> str:
        return self.lower_root + STORE

    def url(self) -> str:
        """For ``store =`` in nix.conf, ``--store`` and NIX_REMOTE."""
        fields = {
            "root": self.root,
            "state": self.state_dir,
            "lower-store": f"unix://{_quote(self.lower_socket)}?root={_quote(self.lower_root)}",
            "upper-layer": self.upper_layer,
            "remount-hook": self.remount_hook,
            "check-mount": "" if self.check_mount else "false",
        }
        return f"{SCHEME}?" + "&".join(f"{name}={_quote(v, safe='')}" for name, v in fields.items() if v)

    def mount_command(self, work: str = "WORKDIR") -> str:
        """The overlay that the URL expects. ``work``: an empty directory on the upper layer's file system."""
        return overlay_command(self.real_store_dir, self.lower_store_dir, self.upper_layer, work)


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """A URL as Nix reads it. Directories are "" where it does not name them; ``lower_socket`` too if it is no unix:// URL."""

    lower_store: str
    lower_socket: str
    lower_store_dir: str
    upper_layer: str
    real_store_dir: str
    state_dir: str
    remount_hook: str
    check_mount: bool
    faults: tuple[Fault, ...]


def overlay_command(merged: str, lower: str, upper: str, work: str = "WORKDIR") -> str:
    return f"mount -t overlay overlay -o lowerdir={lower},upperdir={upper},workdir={work} {merged}"


def is_overlay_url(text: str) -> bool:
    return text.startswith("local-overlay:")


def parse_overlay_url(text: str) -> StoreUrl:
    """The URL and all that is wrong with it. Never fails."""
    faults: list[Fault] = []
    if not text.startswith(SCHEME):
        faults.append(
            Fault("the URL does not begin with local-overlay://", "store = local-overlay://?lower-store=…")
        )
    query = text.partition("?")[2]
    fields: dict[str, str] = {}
    for item in query.split("&"):
        name, _, value = item.partition("=")
        fields.setdefault(name, value)
    raw_lower = fields.get("lower-store", "")
    values = {name: _unquote(value) for name, value in fields.items()}
    lower = values.get("lower-store", "")
    faults += _encoding_faults(raw_lower, fields)
    if not raw_lower:
        faults.append(
            Fault(
                "there is no lower-store, so Nix takes the machine's default store",
                "lower-store=unix%3A%2F%2F…",
            )
        )
    if "://" not in lower and "%3A" in lower.upper():
        lower = _unquote(lower)
    place, _, parameters = lower.partition("?")
    inner = {n: _unquote(v) for n, _, v in (p.partition("=") for p in parameters.split("&") if p)}
    faults += _lower_faults(place, inner) if raw_lower else []
    upper = values.get("upper-layer", "")
    if not upper:
        faults.append(
            Fault("there is no upper-layer", "upper-layer=%2Fpath%2Fof%2Fthe%2Foverlay%27s%2Fupperdir")
        )
    for name, value in (
        ("upper-layer", upper),
        ("root", values.get("root", "")),
        ("root of lower-store", inner.get("root", "")),
    ):
        faults += _path_faults(name, value)
    root = _clean(values.get("root", ""))
    return StoreUrl(
        lower_store=lower,
        lower_socket=_unquote(place.removeprefix("unix://")) if place.startswith("unix://") else "",
        lower_store_dir=_lower_dir(place, inner) if raw_lower else "",
        upper_layer=_clean(upper),
        real_store_dir=_clean(values.get("real", "")) or root + STORE,
        state_dir=_clean(values.get("state", "")) or (f"{root}/nix/var/nix" if root else ""),
        remount_hook=values.get("remount-hook", ""),
        check_mount=values.get("check-mount", "true") not in _FALSE,
        faults=tuple(faults),
    )


def _encoding_faults(raw: str, fields: dict[str, str]) -> Iterator[Fault]:
    fix = "encode the lower store's URL once: lower-store=" + _quote("unix:///SOCKET?root=/LOWER", safe="")
    if _TWICE.search(raw) and not _unquote(raw).startswith(("unix://", "/", "local", "daemon")):
        yield Fault("lower-store is encoded twice, which Nix 2.34 refuses", fix)
    elif "?" in raw:
        yield Fault("lower-store is not encoded", fix, refused=False)
        if "root" not in raw and "root" in fields:
            yield Fault(
                "lower-store is not encoded, so that what follows its & belongs to the outer URL", fix
            )
    elif "=" in raw:
        yield Fault("lower-store is encoded in parts only", fix, refused=False)


def _lower_faults(place: str, inner: dict[str, str]) -> Iterator[Fault]:
    if place.startswith("unix://") or place == "daemon":
        if "root" not in inner and "real" not in inner:
            yield Fault(
                f"lower-store has no root, so Nix expects its files in {STORE}, where the overlay is",
                "append %3Froot%3D and the directory above the mount's nix/store to lower-store",
            )
    elif inner.get("read-only") not in ("true", "yes", "1"):
        yield Fault(
            "lower-store is a local store that Nix opens for writing",
            "append %3Fread-only%3Dtrue to lower-store, and experimental-features = read-only-local-store",
            refused=False,
        )


def _path_faults(name: str, value: str) -> Iterator[Fault]:
    if value and not value.startswith("/"):
        yield Fault(f"{name} is a relative path: {value}", "write it from / on")
    elif value != "/" and value.endswith("/"):
        yield Fault(
            f"{name} ends with a slash", "Nix drops it; write it without, as in the mount", refused=False
        )


def _lower_dir(place: str, inner: dict[str, str]) -> str:
    if inner.get("real"):
        return _clean(inner["real"])
    root = inner.get("root", "")
    if not root and place.startswith("/"):
        root = place
    return _clean(root) + STORE


def _clean(path: str) -> str:
    """As Nix writes an absolute path: no double slashes, dots, slash at the end."""
    if not path.startswith("/"):
        return path
    cleaned = posixpath.normpath("/" + path.lstrip("/"))
    return "" if cleaned == "/" else cleaned


def mount_fault(mounts: str, real_store_dir: str, lower_store_dir: str, upper_layer: str) -> Fault | None:
    """Which rule of Nix's check fails and how to mend it; None when Nix accepts. ``mounts``: text of /proc/self/mounts.

    The directories are those of ``StoreUrl``. Read the text with errors="surrogateescape".
    """
    named = {"merged store": real_store_dir, "lower store": lower_store_dir, "upper layer": upper_layer}
    for name, path in named.items():
        special = sorted(_NEVER_MATCH & set(path))
        if special:
            return _unusable(name, path, f"Nix takes {' '.join(special)} for part of a regular expression")
    if "||" in real_store_dir:
        return _unusable("merged store", real_store_dir, "Nix would never end looking for ||")
    line = _last_match(mounts, real_store_dir)
    if _has(line, "lowerdir", lower_store_dir) and _has(line, "upperdir", upper_layer):
        return None
    for name, path in named.items():
        if _ESCAPED_BY_KERNEL & set(path):
            return _unusable(
                name, path, "the kernel lists its blanks and commas in another form, which Nix does not know"
            )
    if not line:
        return _no_overlay(
            mounts, real_store_dir, overlay_command(real_store_dir, lower_store_dir, upper_layer)
        )
    return _option_fault(line, real_store_dir, lower_store_dir, upper_layer)


def cover(mounts: str, real_store_dir: str) -> str | None:
    """The type of a mount that hides the overlay at the merged store, which Nix does not notice."""
    here = [words for words in _lines(mounts) if words[1] == real_store_dir]
    if here and any(words[2] == "overlay" for words in here) and here[-1][2] != "overlay":
        return here[-1][2]
    return None


def _unusable(name: str, path: str, why: str) -> Fault:
    return Fault(
        f"the path of the {name} can never pass: {why}: {path}",
        f"use a directory with a plain name for the {name}",
    )


def _last_match(mounts: str, real_store_dir: str) -> str:
    # Only . | ] } are left of what a regular expression could mean; they mean the same to Python.
    pattern = re.compile(rf"(^|\n)overlay {real_store_dir} [^\n\r]*(\n|$)")
    line = ""
    while (match := pattern.search(mounts)) is not None:
        line, mounts = match[0], mounts[match.end() :]
    return line


def _has(line: str, option: str, value: str) -> bool:
    return re.search(rf"\b{option}={value}( |,)", line, re.ASCII) is not None


def _no_overlay(mounts: str, real_store_dir: str, command: str) -> Fault:
    here = [words for words in _lines(mounts) if words[1] == real_store_dir]
    kinds = {words[2] for words in here}
    source = next((words[0] for words in reversed(here) if words[2] == "overlay"), None)
    if source is not None:
        return Fault(f"the overlay's source is named {source}, not overlay", command)
    if "fuse.fuse-overlayfs" in kinds:
        return Fault(
            "fuse-overlayfs is mounted there, which Nix does not accept",
            f"use the kernel's overlay: {command}",
        )
    if kinds:
        return Fault(
            f"what is mounted on {real_store_dir} is no overlay: {', '.join(sorted(kinds))}", command
        )
    return Fault(f"no overlay is mounted on {real_store_dir}", command)


def _option_fault(line: str, real_store_dir: str, lower: str, upper: str) -> Fault:
    command = overlay_command(real_store_dir, lower, upper)
    # After a | in the path the match is a piece of the line: options are looked for in all of it.
    found = dict(option.partition("=")[::2] for option in re.split("[ ,\n]", line))
    if not _has(line, "lowerdir", lower):
        if "lowerdir+" in found:
            return Fault("the overlay was mounted with lowerdir+=, which Nix does not read", command)
        return Fault(_difference("lowerdir", _decoded(found.get("lowerdir", "")), lower), command)
    return Fault(_difference("upperdir", _decoded(found.get("upperdir", "")), upper), command)


def _difference(option: str, found: str, expected: str) -> str:
    """What keeps ``found`` from being ``expected``, for people."""
    if not found:
        return f"the overlay has no {option}"
    if option == "lowerdir" and ":" in found and expected in found.split(":"):
        return f"the overlay has several lower directories, and Nix's check knows one: {found}"
    if not found.startswith("/"):
        return f"{option} is a relative path: {found}; Nix expects {expected}"
    if posixpath.normpath(found) == expected:
        return f"{option} is written {found}; Nix expects exactly {expected}"
    return f"{option} is {found}; the URL leads Nix to expect {expected} (links count as different paths)"


def _lines(mounts: str) -> Iterator[list[str]]:
    for line in mounts.split("\n"):
        words = [_decoded(word) for word in line.split(" ")]
        if len(words) >= 4:
            yield words


def _decoded(word: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), word)
