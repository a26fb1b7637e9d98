"""What Nix is told inside an environment. Pure: nothing here touches the machine.

Everything goes through environment variables, so that no file of the user's or the host's is changed or hidden: their nix.conf
(substituters, keys, features, access tokens) is read as always, and NIX_CONFIG is read after it.

- The store is a ``local-overlay`` store: Nix asks our daemon's socket about paths below and keeps its own database for
  those above. Its state (database, roots, profiles, logs) lies beside the upper layer and lives and dies with it.
- ``check-mount`` stays on, except where the overlay has two lower layers (a host with a store of its own): Nix's check
  knows only one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote

from veneer.environment import plan as p

STATE = f"{p.STATE}/nix"
LOGS = f"{p.STATE}/log"
FEATURE = "local-overlay-store"
_OVERRULED = ("NIX_REMOTE", "NIX_STATE_DIR", "NIX_LOG_DIR")
"""Variables of the caller's that would lead Nix to another store or database."""


@dataclass(frozen=True, slots=True)
class NixFacts:
    """``host_store``: the overlay has the host's store as a second lower layer. ``unprivileged``: a user namespace is needed.
    ``has_build_group``: the group that root's builders come from exists (nixbld, or what nix.conf says)."""

    host_store: bool
    unprivileged: bool
    has_build_group: bool


def environ(given: Mapping[str, str], socket_name: str, facts: NixFacts) -> dict[str, str]:
    """The command's environment: ``given``, and what makes Nix use the merged store. ``socket_name``: in NIX_SOCKETS."""
    made = {name: value for name, value in given.items() if name not in _OVERRULED}
    made["NIX_STATE_DIR"] = STATE
    made["NIX_LOG_DIR"] = LOGS
    lines = [made.get("NIX_CONFIG", ""), *_lines(socket_name, facts)]
    made["NIX_CONFIG"] = "\n".join(line for line in lines if line)
    return made


def store_url(socket_name: str, *, check_mount: bool) -> str:
    """The store's URL. The lower store's own URL is a parameter of it, encoded once."""
    lower = f"unix://{p.NIX_SOCKETS}/{socket_name}?root={p.LOWER_ROOT}"
    fields = {"lower-store": lower, "upper-layer": p.UPPER, "remount-hook": p.REMOUNT_HOOK}
    if not check_mount:
        fields["check-mount"] = "false"
    return "local-overlay://?" + "&".join(f"{name}={quote(value, safe='')}" for name, value in fields.items())


def _lines(socket_name: str, facts: NixFacts) -> list[str]:
    lines = [
        f"extra-experimental-features = {FEATURE}",
        f"store = {store_url(socket_name, check_mount=not facts.host_store)}",
    ]
    if facts.unprivileged:
        lines.append("require-drop-supplementary-groups = false")
    elif not facts.has_build_group:
        lines.append("build-users-group =")
    return lines
