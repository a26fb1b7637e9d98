"""A trace made of notes."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.cli.options import named_in, roots_in
from veneer.cli.recording import Known, made_of, write
from veneer.formats.touches import Touched
from veneer.formats.trace import TracedFile
from veneer.formats.tree_index import TreeIndex, encode_tree
from veneer.model.errors import VeneerError
from veneer.model.hashes import Hash
from veneer.model.store_path import StorePath
from veneer.model.tree import Directory, RegularFile, Symlink

GIT = StorePath("1" * 32, "git")
NOTE = StorePath("2" * 32, "note")


def tree(number: int, root: Directory | RegularFile) -> TreeIndex:
    encoded = encode_tree(root, path_number=number, generation=bytes(16), nar_hash=bytes(32), nar_size=9000)
    return TreeIndex(bytes(encoded))


GIT_TREE = tree(
    7,
    Directory(
        (
            (b"bin", Directory(((b"git", RegularFile(5000, executable=True, offset=1000)),))),
            (b"link", Symlink(b"bin/git")),
        )
    ),
)
GIT_ENTRY = 3


def known(tree: TreeIndex) -> Known:
    return Hash("sha256", tree.nar_hash), tree.nar_size, tree


def test_reads_get_names_and_end_with_their_file() -> None:
    rows = [
        Touched(7, GIT),
        Touched(7, None, GIT_ENTRY, 4096, 4096),
        Touched(9, NOTE),
        Touched(7, None, GIT_ENTRY, 4096, 8192),
        Touched(9, None, 0, 0, 4096),
    ]
    trees = {7: GIT_TREE, 9: tree(9, RegularFile(20, executable=False, offset=96))}
    git, note = made_of(rows, lambda number, *_: known(trees[number]))
    assert (git.path, git.files) == (GIT, (TracedFile(b"bin/git", 5000, ((4096, 904),)),))
    assert (note.path, note.files) == (NOTE, (TracedFile(b"", 20, ((0, 20),)),))


@pytest.mark.parametrize("entry", [0, 1, 2, 77], ids=["root", "directory", "link", "none"])
def test_reads_of_what_is_no_file_are_left_out(entry: int) -> None:
    (git,) = made_of([Touched(7, GIT), Touched(7, None, entry, 0, 4096)], lambda *_: known(GIT_TREE))
    assert git.files == ()


def test_paths_without_a_name_or_a_tree_are_left_out() -> None:
    assert made_of([Touched(8, None, 1, 0, 9), Touched(7, GIT)], lambda *_: None) == ()


def test_a_path_that_was_only_looked_up_needs_no_tree() -> None:
    asked = []

    def recall(number: int, name: StorePath, was_read: bool) -> Known:
        asked.append((number, was_read))
        return known(GIT_TREE) if was_read else (Hash("sha256", bytes(32)), 17, None)

    git, note = made_of([Touched(7, GIT), Touched(9, NOTE), Touched(7, None, GIT_ENTRY, 0, 4096)], recall)
    assert asked == [(7, True), (9, False)]
    assert (len(git.files), note.path, note.nar_size, note.files) == (1, NOTE, 17, ())


def test_a_path_with_two_numbers_is_one_path() -> None:
    rows = [Touched(7, GIT), Touched(7, None, GIT_ENTRY, 0, 4096), Touched(8, GIT)]
    (git,) = made_of(rows, lambda *_: known(GIT_TREE))
    assert len(git.files) == 1


def test_the_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    write(tmp_path / "t", b"one")
    write(tmp_path / "t", b"two")
    assert [entry.name for entry in tmp_path.iterdir()] == ["t"]
    (tmp_path / "directory").mkdir()
    with pytest.raises(VeneerError):
        write(tmp_path / "directory", b"x")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["directory", "t"]


def test_roots_are_the_store_paths_of_a_command_line(tmp_path: Path) -> None:
    (tmp_path / "result").symlink_to(f"/nix/store/{NOTE}")
    words = [str(tmp_path / "result" / "bin" / "x"), f"/nix/store/{GIT}/bin/git", "/nix/store/nothing", "git"]
    assert roots_in(words) == [str(GIT), str(NOTE)]
    words = ["env", f"P=/nix/store/{NOTE}/lib:/usr/lib:/nix/store/{GIT}", f"exec /nix/store/{GIT}/bin/git;"]
    assert named_in(words) == [str(NOTE), str(GIT)]
    assert roots_in(words) == []
    assert roots_in([]) == []
