"""What Nix is told inside an environment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from veneer.environment import plan as p
from veneer.environment.facts import NixFacts
from veneer.environment.nix.inside import show_channels
from veneer.environment.nix.settings import OWN_PROFILES, STATE, STATE_HOME, daemon_environ, environ
from veneer.environment.spec import NixSpec
from veneer.formats.nix_conf import parse_nix_conf

NIX = NixSpec(Path("/cache/nix/s.sock"))
ROOT = NixFacts(host_store=False, unprivileged=False, has_build_group=True)


def told(facts: NixFacts, given: dict[str, str] | None = None) -> dict[str, str]:
    """The settings that NIX_CONFIG comes to."""
    made = environ(given or {}, NIX, facts)
    return parse_nix_conf(made["NIX_CONFIG"], path="NIX_CONFIG", include=lambda _: None, base={})


def store(facts: NixFacts) -> dict[str, list[str]]:
    """The parameters of the store's URL."""
    return parse_qs(told(facts)["store"].partition("?")[2], keep_blank_values=True)


def test_the_store_is_the_merged_one_over_the_worker_socket() -> None:
    assert store(ROOT) == {
        "lower-store": [f"unix://{p.NIX_SOCKETS}/s.sock?root={p.LOWER_ROOT}"],
        "upper-layer": [p.UPPER],
        "remount-hook": [p.REMOUNT_HOOK],
    }


def test_the_check_of_the_mount_is_off_only_above_the_hosts_store() -> None:
    with_store = NixFacts(host_store=True, unprivileged=False, has_build_group=True)
    assert store(with_store)["check-mount"] == ["false"]


def test_database_and_profiles_are_the_environments_own() -> None:
    given = {
        "NIX_REMOTE": "daemon",
        "NIX_STATE_DIR": "/nix/var/nix",
        "NIX_PROFILE": "/home/u/p",
        "PATH": "/bin",
    }
    made = environ(given, NIX, ROOT)
    assert (made["NIX_STATE_DIR"], made["NIX_STATE_HOME"], made["PATH"]) == (STATE, STATE_HOME, "/bin")
    assert "NIX_REMOTE" not in made
    assert "NIX_PROFILE" not in made
    assert told(ROOT)["use-xdg-base-directories"] == "true"


def test_settings_of_the_user_are_kept() -> None:
    """``extra-`` adds a feature to those of files that Nix reads before; other settings stay as they are."""
    made = environ({"NIX_CONFIG": "cores = 3\nexperimental-features = flakes"}, NIX, ROOT)
    lines = made["NIX_CONFIG"].splitlines()
    assert lines[:2] == ["cores = 3", "experimental-features = flakes"]
    assert "extra-experimental-features = local-overlay-store" in lines


@pytest.mark.parametrize(
    ("unprivileged", "has_group", "groups"), [(False, True, None), (False, False, ""), (True, False, None)]
)
def test_root_builds_itself_where_there_are_no_build_users(
    unprivileged: bool, has_group: bool, groups: str | None
) -> None:
    facts = NixFacts(host_store=False, unprivileged=unprivileged, has_build_group=has_group)
    assert told(facts).get("build-users-group") == groups
    assert told(facts).get("require-drop-supplementary-groups") == ("false" if unprivileged else None)


def test_clients_of_a_nix_daemon_leave_the_store_to_it() -> None:
    nix = replace(NIX, mode="daemon")
    made = environ({"NIX_CONFIG": "cores = 3"}, nix, ROOT)
    assert (made["NIX_REMOTE"], made["NIX_CONFIG"]) == ("daemon", f"cores = 3\n{OWN_PROFILES}")
    assert "local-overlay://" in daemon_environ(made, nix, ROOT)["NIX_CONFIG"]
    assert "NIX_REMOTE" not in daemon_environ(made, nix, ROOT)


def test_an_old_nix_has_a_plain_store() -> None:
    made = environ({}, replace(NIX, mode="filled"), ROOT)
    assert made["NIX_CONFIG"] == "store = local"
    assert made["NIX_PROFILE"].startswith(f"{STATE}/profiles/")


def test_channels_of_the_host_are_found_in_the_environment(tmp_path: Path) -> None:
    """Nix looks for them beside its profiles, which are the environment's own."""
    home, state, host = tmp_path / "home", tmp_path / "state", tmp_path / "host"
    (home / ".nix-defexpr").mkdir(parents=True)
    root_channels = "profiles/per-user/root/channels"
    (host / root_channels).mkdir(parents=True)
    for _ in range(2):  # an environment may be started again
        show_channels({"HOME": str(home)}, state, state / "home", host)
        assert (state / "home/defexpr").readlink() == home / ".nix-defexpr"
        assert (state / root_channels).readlink() == host / root_channels


def test_channels_that_nix_made_in_an_environment_stay(tmp_path: Path) -> None:
    home, state = tmp_path / "home", tmp_path / "state"
    (home / ".nix-defexpr").mkdir(parents=True)
    (state / "home/defexpr").mkdir(parents=True)
    channels = state / "profiles/per-user/root/channels"
    channels.parent.mkdir(parents=True)
    channels.symlink_to("channels-1-link")
    show_channels({"HOME": str(home)}, state, state / "home", tmp_path / "host")
    assert (state / "home/defexpr").is_dir()
    assert not (state / "home/defexpr").is_symlink()
    assert channels.readlink() == Path("channels-1-link")
