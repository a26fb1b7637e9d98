"""NAR: parser, builder, writer and layout. NARs of real Nix are in tests/golden."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest

from veneer.formats import nar
from veneer.formats.nar import (
    DirectoryEnd,
    DirectoryStart,
    Event,
    File,
    FileData,
    Link,
    NarParser,
    TreeBuilder,
    events_of,
    nar_of,
    nar_size,
    tree_of_nar,
    with_offsets,
)
from veneer.model.errors import FormatError, LimitError
from veneer.model.tree import MAX_DEPTH, MAX_NAME, MAX_TARGET, Directory, Node, RegularFile, Symlink


def string(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data + bytes(-len(data) % 8)


def words(*items: bytes | str) -> bytes:
    """A NAR spelled word by word, independent of the writer."""
    return b"".join(string(item.encode() if isinstance(item, str) else item) for item in items)


MAGIC = words("nix-archive-1")
EMPTY_FILE = words("(", "type", "regular", "contents", "", ")")


def entry(name: bytes | str, node: bytes = EMPTY_FILE) -> bytes:
    return words("entry", "(", "name", name, "node") + node + words(")")


def directory(*entries: bytes) -> bytes:
    return words("(", "type", "directory") + b"".join(entries) + words(")")


def link(target: bytes | str) -> bytes:
    return words("(", "type", "symlink", "target", target, ")")


def parse(data: bytes, step: int = 1 << 20, *, contents: bool = False) -> list[Event]:
    parser = NarParser(contents=contents)
    events: list[Event] = []
    for at in range(0, len(data), step):
        events += parser.feed(data[at : at + step])
    assert parser.finish() == len(data)
    return events


def letters(file: RegularFile) -> Iterable[bytes]:
    return [b"x" * file.size]


def nested(depth: int, inner: Node) -> Node:
    for _ in range(depth):
        inner = Directory(((b"d", inner),))
    return inner


EXAMPLE = MAGIC + directory(
    entry("a", words("(", "type", "regular", "executable", "", "contents", "#!/bin/sh\n", ")")),
    entry(b"bad\xff", link("/x y")),
    entry("c", directory()),
    entry("d", directory(entry("eight", words("(", "type", "regular", "contents", "12345678", ")")))),
)
EXAMPLE_EVENTS: list[Event] = [
    DirectoryStart(b""),
    File(b"a", 10, True, EXAMPLE.index(b"#!")),
    Link(b"bad\xff", b"/x y"),
    DirectoryStart(b"c"),
    DirectoryEnd(),
    DirectoryStart(b"d"),
    File(b"eight", 8, False, EXAMPLE.index(b"12345678")),
    DirectoryEnd(),
    DirectoryEnd(),
]


def test_every_kind_of_node() -> None:
    assert parse(EXAMPLE) == EXAMPLE_EVENTS


@pytest.mark.parametrize("step", [1, 2, 7, 8, 13, 64, 100])
def test_cut_anywhere_gives_the_same_events(step: int) -> None:
    assert parse(EXAMPLE, step) == EXAMPLE_EVENTS


@pytest.mark.parametrize("step", [1, 3, 1 << 20])
def test_contents_are_delivered_when_asked_for(step: int) -> None:
    events = parse(EXAMPLE, step, contents=True)
    assert [e for e in events if not isinstance(e, FileData)] == EXAMPLE_EVENTS
    assert b"".join(e.data for e in events if isinstance(e, FileData)) == b"#!/bin/sh\n12345678"
    assert all(isinstance(after, FileData) for before, after in pairwise(events) if isinstance(before, File))


@pytest.mark.parametrize(
    ("node", "tree"),
    [
        (EMPTY_FILE, RegularFile(0, False, 96)),
        (words("(", "type", "regular", "executable", "", "contents", "x", ")"), RegularFile(1, True, 128)),
        (link("t"), Symlink(b"t")),
        (directory(), Directory(())),
    ],
)
def test_the_root_may_be_of_any_kind(node: bytes, tree: Node) -> None:
    assert tree_of_nar([MAGIC + node]) == tree
    assert b"".join(nar_of(tree, letters)) == MAGIC + node
    assert nar_size(tree) == len(MAGIC + node)


def test_content_is_skipped_without_being_kept() -> None:
    size = 1 << 40
    parser = NarParser()
    head = MAGIC + words("(", "type", "regular", "contents") + size.to_bytes(8, "little")
    assert parser.feed(head) == [File(b"", size, False, 96)]
    chunk = bytes(1 << 20)
    for _ in range(100):
        assert parser.feed(chunk) == []
    assert parser._rest == b""


@pytest.mark.parametrize("cut", range(0, len(EXAMPLE), 4))
def test_a_cut_nar_is_refused_at_the_end(cut: int) -> None:
    parser = NarParser()
    parser.feed(EXAMPLE[:cut])
    with pytest.raises(FormatError, match="cut short"):
        parser.finish()


@pytest.mark.parametrize("rest", [b"\0", words(")"), EXAMPLE])
def test_bytes_after_the_end_are_refused(rest: bytes) -> None:
    with pytest.raises(FormatError, match="after"):
        parse(EXAMPLE + rest)
    parser = NarParser()
    parser.feed(EXAMPLE)
    with pytest.raises(FormatError, match="after"):
        parser.feed(rest)


@pytest.mark.parametrize(
    "names",
    [["b", "a"], ["a", "a"], ["a", "A"], [b"\xff", b"\xfe"], ["a", ""], ["ab", "a"]],
)
def test_unsorted_and_repeated_names_are_refused(names: list[str]) -> None:
    with pytest.raises(FormatError):
        parse(MAGIC + directory(*map(entry, names)))


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/b", "a\0", "\0", "a" * (MAX_NAME + 1)])
def test_names_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(FormatError):
        parse(MAGIC + directory(entry(name)))
    with pytest.raises(FormatError):
        list(nar_of(Directory(((name.encode(), Symlink(b"x")),)), letters))


@pytest.mark.parametrize("name", ["...", "a" * MAX_NAME, "\n", b"\xff\x01", ".a", "\\"])
def test_odd_names_are_accepted(name: str) -> None:
    assert len(parse(MAGIC + directory(entry(name)))) == 3


@pytest.mark.parametrize("target", ["", "a\0b", "x" * (MAX_TARGET + 1)])
def test_targets_that_are_none_are_refused(target: str) -> None:
    with pytest.raises(FormatError):
        parse(MAGIC + link(target))
    with pytest.raises(FormatError):
        list(nar_of(Symlink(target.encode()), letters))


def test_the_longest_target_is_accepted() -> None:
    assert parse(MAGIC + link("x" * MAX_TARGET), 1000) == [Link(b"", b"x" * MAX_TARGET)]


@pytest.mark.parametrize(
    "data",
    [
        b"nix-archive-1",
        words("nix-archive-2") + EMPTY_FILE,
        MAGIC + words("(", "type", "fifo", ")") + bytes(100),
        MAGIC + words("(", "type", "regular", ")") + bytes(100),
        MAGIC + words("(", "type", "regular", "executable", "x", "contents", "", ")") + bytes(100),
        MAGIC + words("(", "type", "regular", "contents", "", "contents", "", ")"),
        MAGIC + directory(words("entry", "(", "node") + EMPTY_FILE + words(")")) + bytes(100),
        MAGIC + directory(words("entry", "(", "name", "a", "name", "a", "node") + EMPTY_FILE + words(")")),
        MAGIC + EMPTY_FILE[:-16] + words("("),
    ],
)
def test_other_words_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        parse(data)


@pytest.mark.parametrize("word", [b"a", b"bad\xff", b"/x y", b"#!/bin/sh\n"])
def test_padding_must_be_zero(word: bytes) -> None:
    data = bytearray(EXAMPLE)
    at = data.index(string(word)) + 8 + len(word)
    assert data[at] == 0
    data[at] = 1
    for step in (1, 1 << 20):
        with pytest.raises(FormatError):
            parse(bytes(data), step)


def test_impossible_sizes_are_refused() -> None:
    for size in (1 << 63, (1 << 64) - 1, (1 << 63) - 50):
        head = MAGIC + words("(", "type", "regular", "contents") + size.to_bytes(8, "little")
        with pytest.raises(LimitError):
            NarParser().feed(head)


def test_depth_is_limited_without_recursion() -> None:
    deepest = with_offsets(nested(MAX_DEPTH, RegularFile(3, False, 0)))
    data = b"".join(nar_of(deepest, letters))
    assert len(data) == nar_size(deepest)
    assert b"".join(nar_of(tree_of_nar([data]), letters)) == data
    too_deep = nested(MAX_DEPTH + 1, RegularFile(0, False, 0))
    with pytest.raises(LimitError):
        list(nar_of(too_deep, letters))
    with pytest.raises(LimitError):
        parse(MAGIC + (directory()[:-16] + entry("d", b"")[:-16]) * MAX_DEPTH + directory() + bytes(100))
    with pytest.raises(LimitError):
        parse(MAGIC + (directory()[:-16] + entry("d", b"")[:-16]) * 100_000)


def test_entries_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nar, "MAX_ENTRIES", 3)
    tree = Directory(((b"a", Symlink(b"x")), (b"b", Symlink(b"x"))))
    data = b"".join(nar_of(tree, letters))
    assert tree_of_nar([data]) == tree
    more = Directory((*tree.entries, (b"c", Symlink(b"x"))))
    with pytest.raises(LimitError):
        list(nar_of(more, letters))
    with pytest.raises(LimitError):
        parse(MAGIC + directory(*(entry(name, link("x")) for name in "abc")))


def test_a_refused_nar_stays_refused() -> None:
    parser = NarParser()
    with pytest.raises(FormatError):
        parser.feed(b"x" * 100)
    with pytest.raises(FormatError, match="before"):
        parser.feed(EXAMPLE)
    with pytest.raises(FormatError):
        parser.finish()


def test_errors_tell_the_offset() -> None:
    with pytest.raises(FormatError, match=f"NAR offset {len(EXAMPLE)}"):
        parse(EXAMPLE + b"x", 10)


def test_a_tree_is_not_given_before_it_is_whole() -> None:
    builder = TreeBuilder()
    with pytest.raises(FormatError):
        builder.tree()
    builder.add(EXAMPLE_EVENTS[:-1])
    with pytest.raises(FormatError):
        builder.tree()
    builder.add(EXAMPLE_EVENTS[-1:])
    assert list(events_of(builder.tree())) == EXAMPLE_EVENTS


@pytest.mark.parametrize("pieces", [[], [b"12"], [b"12", b"34"], [b"1"] * 4, [b"x" * 200_000]])
def test_content_of_another_size_is_refused(pieces: list[bytes]) -> None:
    with pytest.raises(FormatError, match="declared 3"):
        list(nar_of(RegularFile(3, False, 0), lambda _: pieces))


def test_reader_is_told_offsets_that_no_two_files_share() -> None:
    tree = Directory(
        tuple((bytes([c]), RegularFile(size, False, 0)) for c, size in ((97, 0), (98, 0), (99, 100_000)))
    )
    seen: list[RegularFile] = []

    def read(file: RegularFile) -> Iterable[bytes]:
        seen.append(file)
        return [b"x" * (file.size // 2)] * 2

    data = b"".join(nar_of(tree, read))
    assert len({file.offset for file in seen}) == 3
    assert [child for _, child in with_offsets(tree).entries] == seen  # type: ignore[union-attr]
    assert tree_of_nar([data]) == with_offsets(tree)


def test_unsorted_trees_are_not_written() -> None:
    with pytest.raises(FormatError, match="order"):
        list(nar_of(Directory(((b"b", Symlink(b"x")), (b"a", Symlink(b"x")))), letters))
    with pytest.raises(LimitError):
        list(nar_of(RegularFile(-1, False, 0), letters))
