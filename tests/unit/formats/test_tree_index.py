"""The tree index: what the kernel gets out of it, and what damage does to it."""

from __future__ import annotations

import stat
import time

import pytest

from veneer.formats import fuse_wire as wire
from veneer.formats import tree_index
from veneer.formats.tree_index import DOTS, Kind, TreeIndex, encode_tree
from veneer.model.errors import FormatError, LimitError
from veneer.model.tree import MAX_DEPTH, Directory, Node, RegularFile, Symlink

NUMBER = 0x4000_0001
TREE = Directory(
    (
        (b"bin", Directory(((b"bash", RegularFile(1000, True, 400)), (b"sh", Symlink(b"bash"))))),
        (b"empty", Directory(())),
        (b"readme\xff", RegularFile(0, False, 2000)),
        (b"share", Directory(((b"bash", RegularFile(7, False, 2100)),))),
    )
)


def encoded(node: Node, nar_size: int = 10_000) -> bytes:
    return bytes(
        encode_tree(node, path_number=NUMBER, generation=b"g" * 16, nar_hash=b"h" * 32, nar_size=nar_size)
    )


def flat(count: int) -> Directory:
    return Directory(tuple((b"%06d" % i, RegularFile(i, False, 0)) for i in range(count)))


def records(run: bytes) -> list[tuple[int, int, bytes]]:
    """(node id, dirent.off, name) of each record, read as the kernel does."""
    found = []
    at = 0
    while at < len(run):
        node = wire.ENTRY_OUT.unpack_from(run, at)[0]
        _, off, length, _ = wire.DIRENT.unpack_from(run, at + 128)
        found.append((node, off, run[at + 152 : at + 152 + length]))
        at += (152 + length + 7) & ~7
    assert at == len(run)
    return found


def test_records_have_the_kernels_layout() -> None:
    assert tree_index._RECORD.size == wire.ENTRY_OUT.size + wire.DIRENT.size == tree_index.NAME_AT
    index = TreeIndex(encoded(TREE))
    record = index.lookup(0, b"bin")
    node, generation, valid, attr_valid, _, _, ino, _, _, *_ = wire.ENTRY_OUT.unpack_from(
        index.buffer, record
    )
    assert (node, generation, ino) == (NUMBER << 24 | 1, 0, NUMBER << 24 | 1)
    assert valid == attr_valid == tree_index.VALID_SECONDS


def test_entries_are_numbered_breadth_first() -> None:
    index = TreeIndex(encoded(TREE))
    names = [index.entry(i).name for i in range(index.count)]
    assert names == [b"", b"bin", b"empty", b"readme\xff", b"share", b"bash", b"sh", b"bash"]


def test_attributes_are_those_of_a_store_path() -> None:
    index = TreeIndex(encoded(TREE))
    modes = {}
    for path, entry in index.walk():
        attr = wire.ATTR.unpack_from(index.buffer, index.record(entry.number) + tree_index.ATTR_AT)
        assert attr[3:6] == (1, 1, 1)
        assert attr[10:13] == (1, 0, 0)
        modes[path] = attr[9]
        assert entry.mode == attr[9]
    assert modes[b"bin"] == stat.S_IFDIR | 0o555
    assert modes[b"bin/bash"] == stat.S_IFREG | 0o555
    assert modes[b"share/bash"] == stat.S_IFREG | 0o444
    assert modes[b"bin/sh"] == stat.S_IFLNK | 0o777


def test_find_tells_kinds_offsets_and_absence() -> None:
    index = TreeIndex(encoded(TREE))
    bash = index.find(b"bin/bash")
    assert bash is not None
    assert (bash.kind, bash.offset, bash.size, bash.name) == (Kind.EXECUTABLE, 400, 1000, b"bash")
    assert index.find(b"") == index.root
    assert index.find(b"bin/bash/x") is None
    assert index.find(b"bin/zsh") is None
    link = index.find(b"bin/sh")
    assert link is not None
    assert index.target(link.number) == b"bash"


def test_files_are_found_by_where_they_begin() -> None:
    index = TreeIndex(encoded(TREE))
    for path, offset in ((b"bin/bash", 400), (b"readme\xff", 2000), (b"share/bash", 2100)):
        assert index.file_at(offset) == index.find(path)
    assert [index.file_at(offset) for offset in (0, 1, 401, 1000, 10_000)] == [None] * 5


def test_names_are_found_wherever_they_stand() -> None:
    index = TreeIndex(encoded(TREE))
    assert [index.path(entry.number) for entry in index.named(b"bash")] == [b"bin/bash", b"share/bash"]
    assert [entry.kind for entry in index.named(b"sh")] == [Kind.LINK]
    for name in (b"", b"ash", b".", b"bas", b"bash\0", b"nobody"):
        assert list(index.named(name)) == []


def test_a_name_inside_of_longer_ones_is_not_taken_for_them() -> None:
    names = sorted(b"x" * length + b"libz.so" + b"y" * more for length in range(200) for more in (0, 1, 9))
    tree = Directory(tuple((name, RegularFile(1, False, 400)) for name in names))
    index = TreeIndex(encoded(tree))
    assert [entry.name for entry in index.named(b"libz.so")] == [b"libz.so"]


@pytest.mark.parametrize("root", [RegularFile(5, True, 100), Symlink(b"/nix/store/x")])
def test_store_path_may_be_a_file_or_a_link(root: Node) -> None:
    index = TreeIndex(encoded(root))
    assert index.to_node() == root
    assert index.count == 1
    with pytest.raises(FormatError):
        index.run(0, 0, 4096)


def test_directory_is_listed_completely_in_pages_of_any_size() -> None:
    index = TreeIndex(encoded(flat(1000)))
    for size in (168, 4096, 5000, 1 << 20):
        cookie = 0
        names = []
        while run := bytes(index.run(0, cookie, size)):
            assert len(run) <= size
            got = records(run)
            names += [name for _, _, name in got]
            cookie = got[-1][1]
        assert names == [b".", b"..", *(b"%06d" % i for i in range(1000))]


def test_page_is_filled_as_far_as_whole_records_fit() -> None:
    index = TreeIndex(encoded(flat(100)))
    assert len(index.run(0, 0, DOTS + 160 * 3 + 159)) == DOTS + 160 * 3
    assert len(index.run(0, 0, 170)) == 160
    assert len(index.run(0, DOTS, 160)) == 160


def test_dot_records_carry_no_node_but_their_inode_numbers() -> None:
    index = TreeIndex(encoded(TREE))
    run = bytes(index.run(1, 0, 4096))
    assert [node for node, _, _ in records(run)][:2] == [0, 0]
    assert wire.DIRENT.unpack_from(run, 128)[0] == NUMBER << 24 | 1
    assert wire.DIRENT.unpack_from(run, 160 + 128)[0] == NUMBER << 24
    assert wire.DIRENT.unpack_from(bytes(index.run(0, 0, 4096)), 160 + 128)[0] == 1


@pytest.mark.parametrize("cookie", [1, 8, 159, 161, 168, 319, 321, 328])
def test_cookie_inside_a_record_is_refused(cookie: int) -> None:
    index = TreeIndex(encoded(flat(10)))
    with pytest.raises(FormatError):
        index.run(0, cookie, 4096)


def test_cookie_at_or_after_the_end_gives_nothing() -> None:
    index = TreeIndex(encoded(flat(10)))
    for cookie in (DOTS + 1600, DOTS + 1608, 1 << 40):
        assert len(index.run(0, cookie, 4096)) == 0


def test_record_that_cannot_fit_is_an_error_and_not_an_end() -> None:
    index = TreeIndex(encoded(flat(10)))
    with pytest.raises(FormatError):
        index.run(0, DOTS, 100)


def test_names_that_collide_in_the_table_are_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_index, "crc32", lambda data, start=0: 5)
    tree = Directory((*flat(200).entries, (b"dir", flat(100))))
    buffer = encode_tree(tree, path_number=1, generation=bytes(16), nar_hash=bytes(32), nar_size=1000)
    header = tree_index._CRC_AT
    monkeypatch.undo()
    tree_index._CRC.pack_into(buffer, header, tree_index.crc32(bytes(buffer[:header])))
    index = TreeIndex(buffer)
    monkeypatch.setattr(tree_index, "crc32", lambda data, start=0: 5)
    for i in range(200):
        assert index.lookup(0, b"%06d" % i)
    found = index.find(b"dir/000077")
    assert found is not None
    assert found.name == b"000077"
    assert not index.lookup(0, b"000200")
    assert not index.lookup(0, b"a")
    assert not index.lookup(0, b"z")


def test_prefixes_and_longer_names_are_not_confused() -> None:
    index = TreeIndex(encoded(Directory(((b"abcdefgh", Symlink(b"x")), (b"abcdefghi", Symlink(b"y"))))))
    for name in (b"abcdefg", b"abcdefgh\0", b"abcdefghij", b"abcdefgh" * 40):
        assert not index.lookup(0, name)


@pytest.mark.parametrize(
    "node",
    [
        Directory(((b"b", Symlink(b"x")), (b"a", Symlink(b"x")))),
        Directory(((b"a", Symlink(b"x")), (b"a", Symlink(b"x")))),
        Directory(((b"", Symlink(b"x")),)),
        Directory(((b".", Symlink(b"x")),)),
        Directory(((b"..", Symlink(b"x")),)),
        Directory(((b"a/b", Symlink(b"x")),)),
        Directory(((b"a\0", Symlink(b"x")),)),
        Directory(((b"a" * 256, Symlink(b"x")),)),
        Symlink(b""),
        Symlink(b"a\0b"),
        Symlink(b"a" * 4096),
        RegularFile(10_000, False, 1),
        RegularFile(-1, False, 100),
        RegularFile(1, False, -1),
    ],
)
def test_impossible_trees_are_refused(node: Node) -> None:
    with pytest.raises(FormatError):
        encoded(node)


def test_deep_tree_is_encoded_without_recursion_and_too_deep_refused() -> None:
    node: Node = RegularFile(1, False, 100)
    for _ in range(MAX_DEPTH):
        node = Directory(((b"d", node),))
    index = TreeIndex(encoded(node))
    assert index.count == MAX_DEPTH + 1
    assert sum(1 for _ in index.walk()) == MAX_DEPTH + 1
    with pytest.raises(LimitError):
        encoded(Directory(((b"d", node),)))


def test_every_damaged_byte_is_found() -> None:
    good = encoded(TREE)
    TreeIndex(good).verify()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 0x40
        with pytest.raises(FormatError):
            TreeIndex(bad).verify()


def test_damage_gives_no_error_but_format_error() -> None:
    good = encoded(TREE)
    for at in range(tree_index.HEADER_SIZE, len(good)):
        for value in (0x7F, 0xFF):
            bad = bytearray(good)
            bad[at] = value
            index = TreeIndex(bad)
            for question in (
                index.to_node,
                lambda i=index: [i.lookup(p, n) for p in range(8) for n in (b"bin", b"bash", b"zz")],
                lambda i=index: [bytes(i.run(e, 0, 4096)) for e in range(8)],
                lambda i=index: [i.find(b"bin/bash"), i.find(b"share/bash"), i.find(b"readme\xff")],
                lambda i=index: [*map(i.file_at, (400, 2000, 9)), *i.named(b"bash"), *i.named(b"b")],
            ):
                try:
                    question()
                except FormatError:
                    continue


@pytest.mark.parametrize("length", [0, 8, 255, 256, 300, -1])
def test_cut_file_is_refused_at_opening(length: int) -> None:
    with pytest.raises(FormatError):
        TreeIndex(encoded(TREE)[:length])


def test_file_names_come_from_the_path_number() -> None:
    assert tree_index.tree_file(0x4000_00AB) == "trees/ab/0000400000ab.tree"
    assert tree_index.nar_file(0x4000_00AB) == "nars/ab/0000400000ab.nar"
    assert tree_index.split_node_id(tree_index.node_id(0x4000_00AB, 77)) == (0x4000_00AB, 77)


def test_hundred_thousand_entries_are_encoded_in_seconds() -> None:
    started = time.perf_counter()
    index = TreeIndex(encoded(flat(100_000), nar_size=1 << 40))
    assert time.perf_counter() - started < 5
    assert index.lookup(0, b"099999")


def test_a_damaged_table_without_a_free_slot_ends_the_search() -> None:
    tree = Directory(((b"a", RegularFile(0, executable=False, offset=0)),))
    made = encode_tree(tree, path_number=7, generation=bytes(16), nar_hash=bytes(32), nar_size=1000)
    table = tree_index.HEADER_SIZE + 2 * tree_index.ROW.size
    made[table : table + 32] = b"\xff" * 32
    assert TreeIndex(bytes(made)).lookup(0, b"b") == 0


def test_a_damaged_directory_of_names_without_children_is_refused() -> None:
    tree = Directory(((b"a", RegularFile(0, executable=False, offset=0)),))
    made = encode_tree(tree, path_number=7, generation=bytes(16), nar_hash=bytes(32), nar_size=1000)
    made[tree_index.HEADER_SIZE + 28 : tree_index.HEADER_SIZE + 32] = bytes(
        4
    )  # the root's number of children
    with pytest.raises(FormatError, match="damaged row"):
        TreeIndex(bytes(made)).run(0, DOTS // 2, 300)
