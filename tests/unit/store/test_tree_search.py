"""Files of a tree, found as programs find them."""

from __future__ import annotations

import pytest

from tests.support.signed_cache import make_files
from veneer.formats.tree_index import TreeIndex, encode_tree
from veneer.model.tree import Symlink
from veneer.store.tree_search import find_library, follow

FILES: dict[str, bytes | Symlink] = {
    "bin/tool": b"tool",
    "lib/libz.so.1": Symlink(b"libz.so.1.2"),
    "lib/libz.so.1.2": b"libz",
    "lib/libout.so": Symlink(b"/nix/store/other/lib/libout.so"),
    "lib/libgone.so": Symlink(b"nowhere"),
    "lib/libround.so": Symlink(b"libtrip.so"),
    "lib/libtrip.so": Symlink(b"./libround.so"),
    "lib/libabove.so": Symlink(b"../../../etc/passwd"),
    "lib/libz.so.1.old/libz.so.1": b"not this one",
    "usr/lib": Symlink(b"../lib"),
    "usr/out": Symlink(b"/nix/store/other"),
    "usr/share/deep/libdeep.so": b"deep",
    "usr/share/deep/nested/libdeep.so": b"deeper",
    "usr/share/libdir.so/a": b"in a directory with such a name",
}


@pytest.fixture(scope="module")
def tree() -> TreeIndex:
    made = make_files("made", FILES)
    return TreeIndex(
        encode_tree(
            made.tree, path_number=5, generation=b"g" * 16, nar_hash=b"h" * 32, nar_size=len(made.nar)
        )
    )


def place(tree: TreeIndex, below: str) -> str | None:
    found = follow(tree, below.encode())
    if found is None or isinstance(found, bytes):
        return None if found is None else found.decode()
    return tree.path(found.number).decode()


@pytest.mark.parametrize(
    ("below", "found"),
    [
        ("bin/tool", "bin/tool"),
        ("//bin/.//tool", "bin/tool"),
        ("bin/tool/", "bin/tool"),
        ("bin/../lib/libz.so.1", "lib/libz.so.1.2"),
        ("usr/lib/libz.so.1", "lib/libz.so.1.2"),
        ("usr/lib/../bin/tool", "bin/tool"),
        ("lib/libout.so", "/nix/store/other/lib/libout.so"),
        ("usr/out/lib/x", "/nix/store/other/lib/x"),
        ("lib", None),
        ("", None),
        (".", None),
        ("bin/tool/x", None),
        ("bin/nothing", None),
        ("..", None),
        ("lib/libgone.so", None),
        ("lib/libround.so", None),
        ("lib/libabove.so", None),
    ],
)
def test_paths_are_followed_inside_of_the_store_path(tree: TreeIndex, below: str, found: str | None) -> None:
    assert place(tree, below) == found


def test_a_store_path_may_be_the_file_itself() -> None:
    made = make_files("made", {"x": b"#!/bin/sh"})
    entries = made.tree.entries  # type: ignore[union-attr]
    for root, found in (
        (entries[0][1], True),
        (Symlink(b"/elsewhere"), b"/elsewhere"),
        (Symlink(b"x"), None),
    ):
        data = encode_tree(
            root, path_number=5, generation=b"g" * 16, nar_hash=b"h" * 32, nar_size=len(made.nar)
        )
        where = follow(TreeIndex(data), b"")
        assert where == found or (found is True and where is not None)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (b"libz.so.1", b"lib/libz.so.1.2"),
        (b"libdeep.so", b"usr/share/deep/libdeep.so"),
        (b"libout.so", b"/nix/store/other/lib/libout.so"),
        (b"libdir.so", None),
        (b"libgone.so", None),
        (b"libnone.so", None),
        (b"a", None),
    ],
)
def test_libraries_are_found_by_name(tree: TreeIndex, name: bytes, found: bytes | None) -> None:
    where = find_library(tree, name)
    if where is None or isinstance(where, bytes):
        assert where == found
    else:
        assert tree.path(where.number) == found
