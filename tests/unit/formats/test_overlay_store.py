"""Overlay store URLs: written, read, diagnosed. What real Nix says of mounts is in integration/test_overlay_store_real_nix."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.formats.overlay_store import OverlayStore, cover, mount_fault, parse_overlay_url

STORE = OverlayStore("/run/veneer/nix.sock", "/mnt/lower", "/srv/upper", "/srv/root", "/srv/hook")
GOOD = "overlay /nix/store overlay rw,lowerdir=/l/nix/store,upperdir=/u,workdir=/w 0 0\n"
PATHS = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=12).map(
    "/x{}".format
)


def test_the_lower_url_is_encoded_exactly_once() -> None:
    assert STORE.url() == (
        "local-overlay://?root=%2Fsrv%2Froot&lower-store=unix%3A%2F%2F%2Frun%2Fveneer%2Fnix.sock%3Froot%3D%2Fmnt%2Flower"
        "&upper-layer=%2Fsrv%2Fupper&remount-hook=%2Fsrv%2Fhook"
    )


@given(PATHS, PATHS, PATHS)
def test_any_paths_survive_the_url(socket: str, lower: str, upper: str) -> None:
    found = parse_overlay_url(OverlayStore(socket, lower, upper, "/srv/root").url())
    assert found.faults == ()
    assert (found.lower_socket, found.lower_store_dir) == (socket, lower + "/nix/store")
    assert (found.upper_layer, found.real_store_dir) == (upper, "/srv/root/nix/store")


@given(st.text())
def test_any_text_is_diagnosed_without_an_error(text: str) -> None:
    parse_overlay_url("local-overlay://?" + text)
    mount_fault(text, "/nix/store", "/l/nix/store", text)
    cover(text, "/nix/store")


def test_without_a_root_the_merged_store_is_the_machines_own() -> None:
    found = parse_overlay_url(OverlayStore("/s", "/l", "/u", check_mount=False).url())
    assert (found.real_store_dir, found.check_mount) == ("/nix/store", False)


LOWER = "unix:///s?root=/l"
ENCODED = quote(LOWER, safe="")


@pytest.mark.parametrize(
    ("query", "words", "refused"),
    [
        (f"lower-store={quote(ENCODED, safe='')}&upper-layer=/u", "encoded twice", True),
        (f"lower-store={LOWER}&upper-layer=/u", "not encoded", False),
        ("lower-store=unix:///s?max-connections=1&root=/l&upper-layer=/u", "no root", True),
        ("lower-store=unix:///s%3Froot=/l&upper-layer=/u", "in parts", False),
        ("lower-store=unix%3A%2F%2F%2Fs&upper-layer=/u", "lower-store has no root", True),
        (f"lower-store={ENCODED}", "no upper-layer", True),
        ("upper-layer=/u", "no lower-store", True),
        (f"lower-store={ENCODED}&upper-layer=u", "relative", True),
        (
            "lower-store=unix%3A%2F%2F%2Fs%3Froot%3Dl&upper-layer=/u",
            "root of lower-store is a relative",
            True,
        ),
        (f"lower-store={ENCODED}&upper-layer=/u/", "slash", False),
        ("lower-store=%2Flower&upper-layer=/u", "for writing", False),
        ("lower-store=local%3Froot%3D%2Flower&upper-layer=/u", "for writing", False),
    ],
)
def test_each_mistake_in_a_url_is_named(query: str, words: str, refused: bool) -> None:
    found = [fault for fault in parse_overlay_url("local-overlay://?" + query).faults if words in fault.what]
    assert [fault.refused for fault in found] == [refused]
    assert found[0].fix


def test_a_read_only_local_lower_store_is_no_mistake() -> None:
    found = parse_overlay_url("local-overlay://?lower-store=%2Flower%3Fread-only%3Dtrue&upper-layer=/u")
    assert found.faults == ()
    assert (found.lower_store_dir, found.lower_socket) == ("/lower/nix/store", "")


def test_a_wrong_beginning_is_named() -> None:
    found = parse_overlay_url(f"local-overlay:lower-store={ENCODED}")
    assert "does not begin" in found.faults[0].what


def test_the_last_overlay_in_the_list_counts() -> None:
    other = GOOD.replace("/u,", "/other,")
    assert mount_fault(other + GOOD, "/nix/store", "/l/nix/store", "/u") is None
    fault = mount_fault(GOOD + other, "/nix/store", "/l/nix/store", "/u")
    assert fault is not None
    assert "upperdir is /other" in fault.what
    assert "upperdir=/u," in fault.fix


def test_what_covers_the_overlay_is_seen_although_nix_does_not() -> None:
    covered = GOOD + "none /nix/store tmpfs rw 0 0\n"
    assert mount_fault(covered, "/nix/store", "/l/nix/store", "/u") is None
    assert cover(covered, "/nix/store") == "tmpfs"
    assert cover(GOOD, "/nix/store") is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "no overlay is mounted"),
        ("fuse-overlayfs /nix/store fuse.fuse-overlayfs rw 0 0\n", "fuse-overlayfs"),
        ("none /nix/store tmpfs rw 0 0\n", "is no overlay: tmpfs"),
        ("foo /nix/store overlay rw,lowerdir=/l/nix/store,upperdir=/u 0 0\n", "named foo"),
    ],
)
def test_what_is_there_instead_of_the_overlay_is_named(line: str, words: str) -> None:
    fault = mount_fault("proc /proc proc rw 0 0\n" + line, "/nix/store", "/l/nix/store", "/u")
    assert fault is not None
    assert words in fault.what
    assert (
        "mount -t overlay overlay -o lowerdir=/l/nix/store,upperdir=/u,workdir=WORKDIR /nix/store"
        in fault.fix
    )


def test_paths_that_are_no_utf8_survive_the_url() -> None:
    found = parse_overlay_url(OverlayStore("/s\udcff", "/l\udcff", "/u\udcff").url())
    assert (found.lower_socket, found.lower_store_dir) == ("/s\udcff", "/l\udcff/nix/store")
    assert found.upper_layer == "/u\udcff"


@pytest.mark.parametrize(
    ("merged", "mounts"),
    [
        ("/a|b/nix/store", "overlay /a|c overlay rw 0 0\n"),
        ("/a|b", "b overlay\n"),
        ("/a||b/nix/store", GOOD),
        ("/a||b/nix/store", ""),
    ],
)
def test_paths_in_which_nix_sees_alternatives_are_diagnosed(merged: str, mounts: str) -> None:
    assert mount_fault(mounts, merged, "/l/nix/store", "/u") is not None
