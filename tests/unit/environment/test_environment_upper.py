"""Writable layers on disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from veneer.environment import upper
from veneer.model.errors import MachineError, UsageError


def test_temporary_layer_is_removed_at_release(tmp_path: Path) -> None:
    layer = upper.take_temporary(tmp_path / "new" / "root")
    (layer.directory / "upper" / "d").mkdir()
    (layer.directory / "upper" / "d" / "f").write_text("x")
    layer.release()
    assert list((tmp_path / "new" / "root").iterdir()) == []


def test_named_layer_stays_and_is_found_again(tmp_path: Path) -> None:
    layer = upper.take_named(tmp_path, "dev")
    (layer.directory / "upper" / "f").write_text("x")
    layer.release()
    again = upper.take_named(tmp_path, "dev")
    assert (again.directory / "upper" / "f").read_text() == "x"
    again.release()


def test_layer_in_use_names_its_user(tmp_path: Path) -> None:
    layer = upper.take_named(tmp_path, "dev")
    with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
        upper.take_named(tmp_path, "dev")
    layer.release()
    upper.take_named(tmp_path, "dev").release()


def test_sweep_removes_what_nobody_uses(tmp_path: Path) -> None:
    used = upper.take_temporary(tmp_path)
    stale = upper.take_temporary(tmp_path)
    named = upper.take_named(tmp_path, "dev")
    os.close(stale.lock_fd)
    named.release()
    assert upper.sweep(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["dev", used.directory.name])
    used.release()


def test_sweep_of_nothing_is_quiet(tmp_path: Path) -> None:
    assert upper.sweep(tmp_path / "absent") == []


def test_closed_and_deep_directories_are_removed_and_links_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "link").symlink_to(outside)
    (tree / "closed").mkdir()
    (tree / "closed" / "f").write_text("x")
    (tree / "closed").chmod(0)
    (tree / "read-only").mkdir()
    (tree / "read-only" / "f").write_text("x")
    (tree / "read-only").chmod(0o555)
    fd = os.open(tree, os.O_RDONLY)
    for _ in range(1500):  # deeper than descriptors and the interpreter's stack reach
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    upper.remove_tree(tree)
    assert not tree.exists()
    assert (outside / "kept").exists()
    upper.remove_tree(tree)


def test_named_layer_in_an_impossible_place_says_so() -> None:
    with pytest.raises(MachineError, match="cannot make the environment dev"):
        upper.take_named(Path("/proc/none"), "dev")
