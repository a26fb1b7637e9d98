"""Store paths: what is one, and what only looks like one."""

from __future__ import annotations

import pytest

from veneer.model.errors import FormatError
from veneer.model.store_path import StorePath, is_hash_part

HASH_PART = "0123456789abcdfghijklmnpqrsvwxyz"


@pytest.mark.parametrize("name", ["a", "hello-2.12.1", ".hidden", "..x", "a" * 211, "+-._?=", "x.drv"])
def test_names_that_nix_allows_are_accepted(name: str) -> None:
    path = StorePath.parse(f"{HASH_PART}-{name}")
    assert (path.hash_part, path.name) == (HASH_PART, name)
    assert StorePath.parse_absolute(path.absolute()) == path
    assert StorePath.parse_absolute(path.absolute("/"), "/") == path


@pytest.mark.parametrize(
    "basename",
    [
        "",
        HASH_PART,
        f"{HASH_PART}-",
        f"{HASH_PART[:-1]}-x",
        f"{HASH_PART[:-1]}e-x",
        f"{HASH_PART.upper()}-x",
        f"{HASH_PART}-{'a' * 212}",
        f"{HASH_PART}-.",
        f"{HASH_PART}-..",
        f"{HASH_PART}-.-a",
        f"{HASH_PART}-..-a",
        f"{HASH_PART}-a/b",
        f"{HASH_PART}-a\n",
        f"{HASH_PART}-ä",
        f"{HASH_PART}-a b",
        f"/nix/store/{HASH_PART}-a",
    ],
)
def test_other_names_are_refused(basename: str) -> None:
    with pytest.raises(FormatError):
        StorePath.parse(basename)


@pytest.mark.parametrize("path", ["", "/nix/stores/", "/nix/store", "/nix/store/", "nix/store/x"])
def test_absolute_paths_outside_the_store_are_refused(path: str) -> None:
    with pytest.raises(FormatError):
        StorePath.parse_absolute(path + HASH_PART)


def test_files_inside_a_store_path_are_not_store_paths() -> None:
    with pytest.raises(FormatError):
        StorePath.parse_absolute(f"/nix/store/{HASH_PART}-a/bin")


def test_hash_parts_are_told_from_other_names() -> None:
    assert is_hash_part(HASH_PART)
    assert not is_hash_part(HASH_PART + "\n")
    assert not is_hash_part(HASH_PART[1:])
    assert not is_hash_part("nix-cache-info")
