"""Which store path stands for a changed one, and where a trace's files lie in a NAR."""

from __future__ import annotations

import pytest

from veneer.formats.trace import TracedFile
from veneer.formats.tree_index import TreeIndex, encode_tree
from veneer.model.store_path import StorePath
from veneer.model.tree import Directory, RegularFile, Symlink
from veneer.store.trace_match import nar_ranges, stem, successors


def path(which: str, name: str) -> StorePath:
    return StorePath(which * 32, name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openssl-3.0.7", ("openssl", "")),
        ("openssl-3.0.7-dev", ("openssl", "dev")),
        ("glibc-2.37-8", ("glibc", "")),
        ("glibc-2.37-8-bin", ("glibc", "bin")),
        ("gcc-12.3.0-lib", ("gcc", "lib")),
        ("python3.11-numpy-1.26", ("python3.11-numpy", "")),
        ("source", ("source", "")),
        ("stdenv-linux", ("stdenv-linux", "")),
    ],
)
def test_the_stem_is_the_name_up_to_the_version_and_the_output(name: str, expected: tuple[str, str]) -> None:
    assert stem(name) == expected


def test_a_rebuilt_path_is_found_by_its_name() -> None:
    old, new = path("1", "git-2.39"), path("2", "git-2.39")
    assert successors([old], [new, path("3", "git-2.40")], []) == {old: new}


def test_an_updated_path_is_found_by_its_name_up_to_the_version() -> None:
    old, new = path("1", "git-2.39"), path("2", "git-2.40")
    assert successors([old], [new, path("3", "git-2.40-doc"), path("4", "gitolite-2")], []) == {old: new}


def test_the_same_name_is_better_than_the_same_stem() -> None:
    one, other = path("1", "git-2.39"), path("2", "git-2.38")
    new, newer = path("3", "git-2.39"), path("4", "git-2.40")
    assert successors([other, one], [newer, new], []) == {one: new, other: newer}


def test_a_path_stands_for_one_only() -> None:
    one, other, new = path("1", "git-2.39"), path("2", "git-2.38"), path("3", "git-2.40")
    assert successors([one, other], [new], []) == {one: new}


def test_what_the_trace_has_itself_stands_for_nothing_else() -> None:
    kept = path("2", "git-2.40")
    assert successors([path("1", "git-2.39")], [kept], [kept]) == {}


def test_what_has_no_like_stays_unmatched() -> None:
    assert successors([path("1", "git-2.39")], [path("2", "hg-6")], []) == {}


def tree() -> TreeIndex:
    root = Directory(
        (
            (b"bin", Directory(((b"git", RegularFile(5000, executable=True, offset=1000)),))),
            (b"link", Symlink(b"bin/git")),
            (b"small", RegularFile(10, executable=False, offset=6200)),
        )
    )
    return TreeIndex(
        bytes(encode_tree(root, path_number=1, generation=bytes(16), nar_hash=bytes(32), nar_size=7000))
    )


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([TracedFile(b"bin/git", 5000, ((0, 4096),))], ((1000, 4096),)),
        ([TracedFile(b"bin/git", 9000, ((4096, 4904),))], ((5096, 904),)),
        ([TracedFile(b"bin/git", 9000, ((8192, 808),))], ()),
        ([TracedFile(b"bin/git", 300, ((0, 300),))], ((1000, 5000),)),
        ([TracedFile(b"small", 10, ((0, 10),)), TracedFile(b"bin/git", 9, ((0, 1),))], ((1000, 1), (6200, 10))),
        ([TracedFile(name, 9, ((0, 9),)) for name in (b"", b"bin", b"link", b"gone", b"small/x")], ()),
    ],
    ids=["part", "shorter", "beyond", "whole", "order", "no file"],
)  # fmt: skip
def test_files_lie_where_the_tree_says(
    files: list[TracedFile], expected: tuple[tuple[int, int], ...]
) -> None:
    assert nar_ranges(files, tree()) == expected
