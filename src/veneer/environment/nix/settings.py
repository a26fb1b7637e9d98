"""What Nix is told inside an environment. Pure: nothing here touches the machine.

Everything goes through environment variables, so that no file of the user's or the host's is changed or hidden: their nix.conf
(substituters, keys, features, access tokens) is read as always, and NIX_CONFIG is read after it.

- The store is a ``local-overlay`` store: Nix asks our daemon's socket about paths below and keeps its own database for
  those above. Its state (database, roots, profiles, logs) lies beside the upper layer and lives and dies with it.
- With a nix-daemon only that has this store; its clients have NIX_REMOTE=daemon and the state directory, in which its socket lies.
- A Nix without such stores has a plain local one, over a database that we have filled.
- Profiles are the environment's own. Nix finds them by the link ``~/.nix-profile``, which may be the host's: what is installed
  there would be missing on the host, and generations that the host needs would be collected. With ``use-xdg-base-directories``
  it looks in NIX_STATE_HOME instead (Nix 2.25 and newer; an older one leaves out what it does not know).
- ``check-mount`` stays on, except where the overlay has two lower layers (a host with a store of its own): Nix's check
  knows only one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from veneer.environment import plan as p
from veneer.environment.facts import NixFacts
from veneer.environment.spec import NixSpec
from veneer.formats.overlay_store import OverlayStore

STATE = f"{p.STATE}/nix"
LOGS = f"{p.STATE}/log"
STATE_HOME = f"{STATE}/home"
"""In place of ``~/.local/state/nix``."""
OWN_PROFILES = "use-xdg-base-directories = true"
FEATURE = "local-overlay-store"
NO_BUILD_USERS = "build-users-group ="
_OVERRULED = ("NIX_REMOTE", "NIX_STATE_DIR", "NIX_LOG_DIR", "NIX_STATE_HOME", "NIX_PROFILE")
"""Variables of the caller's that would lead Nix to another store, database or profile."""


def environ(given: Mapping[str, str], nix: NixSpec, facts: NixFacts) -> dict[str, str]:
    """The command's environment: ``given``, and what makes Nix use the merged store."""
    made = _base(given)
    match nix.mode:
        case "overlay":
            lines = _overlay_lines(nix, facts)
        case "daemon":
            made["NIX_REMOTE"] = "daemon"
            lines = [OWN_PROFILES]
        case "filled":
            made["NIX_PROFILE"] = f"{STATE}/profiles/profile"  # old ones do not know that setting
            lines = ["store = local"]
            if not facts.unprivileged and not facts.has_build_group:
                lines.append(NO_BUILD_USERS)
    _configure(made, lines)
    return made


def daemon_environ(given: Mapping[str, str], nix: NixSpec, facts: NixFacts) -> dict[str, str]:
    """That of the environment's nix-daemon."""
    made = _base(given)
    _configure(made, _overlay_lines(nix, facts))
    return made


def store_url(socket_name: str, *, check_mount: bool) -> str:
    """The store's URL."""
    store = OverlayStore(
        lower_socket=f"{p.NIX_SOCKETS}/{socket_name}",
        lower_root=p.LOWER_ROOT,
        upper_layer=p.UPPER,
        remount_hook=p.REMOUNT_HOOK,
        check_mount=check_mount,
    )
    return store.url()


def _base(given: Mapping[str, str]) -> dict[str, str]:
    made = {name: value for name, value in given.items() if name not in _OVERRULED}
    made["NIX_STATE_DIR"] = STATE
    made["NIX_LOG_DIR"] = LOGS
    made["NIX_STATE_HOME"] = STATE_HOME
    return made


def _configure(made: dict[str, str], lines: Sequence[str]) -> None:
    """Put ``lines`` behind what the caller's NIX_CONFIG says."""
    text = "\n".join(line for line in (made.get("NIX_CONFIG", ""), *lines) if line)
    if text:
        made["NIX_CONFIG"] = text


def _overlay_lines(nix: NixSpec, facts: NixFacts) -> list[str]:
    return [
        f"extra-experimental-features = {FEATURE}",
        OWN_PROFILES,
        f"store = {store_url(nix.socket.name, check_mount=not facts.host_store)}",
        *_builder_lines(facts),
    ]


def _builder_lines(facts: NixFacts) -> list[str]:
    if facts.unprivileged:
        return ["require-drop-supplementary-groups = false"]
    return [] if facts.has_build_group else [NO_BUILD_USERS]
