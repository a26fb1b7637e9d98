"""For every tree: encode and read back is the identity, and all the questions agree with the tree."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from veneer.formats.tree_index import HEADER_SIZE, Kind, TreeIndex, bare_root, encode_tree, root_kind
from veneer.model.errors import FormatError
from veneer.model.tree import Directory, Node, RegularFile, Symlink

NAMES = st.binary(min_size=1, max_size=20).filter(lambda n: n not in (b".", b"..") and not {0, 47} & set(n))
FILES = st.builds(RegularFile, st.integers(0, 1 << 40), st.booleans(), st.integers(0, 1 << 40))
LINKS = st.builds(Symlink, st.binary(min_size=1, max_size=30).filter(lambda t: 0 not in t))


def directories(children: st.SearchStrategy[Node]) -> st.SearchStrategy[Directory]:
    return st.dictionaries(NAMES, children, max_size=8).map(lambda d: Directory(tuple(sorted(d.items()))))


TREES: st.SearchStrategy[Node] = st.recursive(st.one_of(FILES, LINKS), directories, max_leaves=40)


def encode(node: Node, number: int = 9) -> bytes:
    return bytes(
        encode_tree(node, path_number=number, generation=b"g" * 16, nar_hash=b"h" * 32, nar_size=1 << 42)
    )


@given(TREES, st.integers(1, (1 << 32) - 1))
def test_encoding_and_reading_gives_the_tree_back(node: Node, number: int) -> None:
    index = TreeIndex(encode(node, number))
    index.verify()
    assert index.to_node() == node
    assert index.number == number
    assert encode(index.to_node(), number) == index.buffer


@given(TREES, st.integers(1, (1 << 32) - 1))
def test_what_is_told_of_a_root_alone_is_what_its_tree_tells(node: Node, number: int) -> None:
    index = TreeIndex(encode(node, number))
    kind = index.entry(0).kind
    assert root_kind(index.buffer[: HEADER_SIZE + 32]) is kind
    record = index.record(0)
    assert (index.buffer[record : record + 128] == bare_root(number)) is (kind is Kind.DIRECTORY)


@given(TREES)
def test_every_walked_entry_is_found_by_its_path(node: Node) -> None:
    index = TreeIndex(encode(node))
    paths = dict(index.walk())
    assert len(paths) == index.count
    for path, entry in paths.items():
        assert index.find(path) == entry


@given(TREES, st.integers(0, 4095), st.integers(0, 255))
def test_damaged_file_is_refused_or_unchanged(node: Node, at: int, value: int) -> None:
    good = encode(node)
    bad = bytearray(good)
    bad[at % len(bad)] = value
    try:
        index = TreeIndex(bad)
        index.verify()
    except FormatError:
        return
    assert index.to_node() == node


@given(st.binary(max_size=600))
def test_any_bytes_are_refused(data: bytes) -> None:
    try:
        TreeIndex(b"VNRTREE1" + data)
    except FormatError:
        return
    raise AssertionError("accepted")
