"""Properties of the text and NAR formats: what is written is read back, and where a stream is cut does not matter.

"Accepted or refused with FormatError" for any input is held by tests/fuzz.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from veneer.formats.cache_info import CacheInfo, parse_cache_info, write_cache_info
from veneer.formats.listing import parse_listing, write_listing
from veneer.formats.nar import (
    Event,
    File,
    FileData,
    NarParser,
    events_of,
    nar_of,
    nar_size,
    tree_of_nar,
    with_offsets,
)
from veneer.formats.narinfo import MAX_NAR_SIZE, parse_narinfo, write_narinfo
from veneer.formats.nix_conf import parse_nix_conf
from veneer.formats.signature import PublicKey, SecretKey, fingerprint
from veneer.model.errors import FormatError
from veneer.model.hashes import DIGEST_SIZES, NIX32_ALPHABET, Hash, nix32_decode, nix32_encode
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath
from veneer.model.tree import Directory, Node, RegularFile, Symlink

NAME_BYTES = st.binary(min_size=1, max_size=20).filter(
    lambda name: name not in (b".", b"..") and b"/" not in name and b"\0" not in name
)
NAME_TEXT = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..")
)


def trees(names: st.SearchStrategy[bytes]) -> st.SearchStrategy[Node]:
    """Trees in NAR order, offsets not canonical, with links to anything that is a name."""
    files: st.SearchStrategy[Node] = st.builds(RegularFile, st.integers(0, 40), st.booleans(), st.just(0))
    links: st.SearchStrategy[Node] = st.builds(Symlink, names)

    def directory(entries: dict[bytes, Node]) -> Node:
        return Directory(tuple(sorted(entries.items(), key=lambda entry: entry[0])))

    return st.recursive(
        files | links, lambda inner: st.dictionaries(names, inner, max_size=5).map(directory), max_leaves=15
    )


BYTE_TREES = trees(NAME_BYTES)
TEXT_TREES = trees(NAME_TEXT.map(str.encode))

PATHS = st.builds(
    StorePath,
    st.text(NIX32_ALPHABET, min_size=32, max_size=32),
    st.from_regex(r"[A-Za-z0-9+\-_?=][A-Za-z0-9+\-._?=]{0,20}", fullmatch=True),
)
HASHES = st.sampled_from(sorted(DIGEST_SIZES)).flatmap(
    lambda name: st.builds(
        Hash, st.just(name), st.binary(min_size=DIGEST_SIZES[name], max_size=DIGEST_SIZES[name])
    )
)
SHA256 = st.builds(Hash, st.just("sha256"), st.binary(min_size=32, max_size=32))
LINES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=20)
KNOWN = {
    "StorePath",
    "URL",
    "Compression",
    "FileHash",
    "FileSize",
    "NarHash",
    "NarSize",
    "References",
    "Deriver",
    "CA",
    "Sig",
}
INFOS = st.builds(
    UnverifiedPathInfo,
    store_path=PATHS,
    url=LINES.filter(lambda url: bool(url) and ".." not in url),
    compression=LINES.filter(bool),
    nar_hash=SHA256,
    nar_size=st.integers(1, MAX_NAR_SIZE),
    references=st.lists(PATHS, max_size=4).map(tuple),
    file_hash=st.none() | HASHES,
    file_size=st.none() | st.integers(1, MAX_NAR_SIZE),
    deriver=st.just("") | PATHS.map(str),
    signatures=st.lists(LINES, max_size=3).map(tuple),
    ca=LINES,
    store_dir=st.sampled_from(["/nix/store", "/gnu/store", "/"]),
    extra=st.lists(
        st.tuples(LINES.filter(lambda key: bool(key) and ":" not in key and key not in KNOWN), LINES),
        max_size=3,
    ).map(tuple),
)


def content(file: RegularFile) -> Iterable[bytes]:
    """Content that differs from file to file, in two pieces."""
    data = bytes((file.offset + i) % 251 for i in range(file.size))
    return [data[: file.size // 3], data[file.size // 3 :]]


def nar(tree: Node) -> bytes:
    return b"".join(nar_of(tree, content))


def merged(events: Iterable[Event]) -> list[Event]:
    """``events`` with neighbouring FileData joined: where they are cut follows the input's cuts."""
    out: list[Event] = []
    for event in events:
        if isinstance(event, FileData) and isinstance(out[-1], FileData):
            out[-1] = FileData(out[-1].data + event.data)
        else:
            out.append(event)
    return out


@given(BYTE_TREES)
def test_a_tree_is_read_back_from_its_nar(tree: Node) -> None:
    data = nar(tree)
    assert tree_of_nar([data]) == with_offsets(tree)
    assert nar_size(tree) == len(data)
    assert with_offsets(with_offsets(tree)) == with_offsets(tree)


@given(BYTE_TREES, st.lists(st.integers(1, 200), max_size=30))
def test_where_a_nar_is_cut_does_not_matter(tree: Node, cuts: list[int]) -> None:
    data = nar(tree)
    parser = NarParser(contents=True)
    events: list[Event] = []
    rest = data
    for cut in cuts:
        events += parser.feed(rest[:cut])
        rest = rest[cut:]
    events += parser.feed(rest)
    assert parser.finish() == len(data)
    whole = NarParser(contents=True)
    assert merged(events) == merged(whole.feed(data))
    assert [e for e in events if not isinstance(e, FileData)] == list(events_of(tree))
    for event in events:
        if isinstance(event, File):
            expected = b"".join(content(RegularFile(event.size, event.executable, event.offset)))
            assert data[event.offset : event.offset + event.size] == expected


@given(BYTE_TREES, st.integers(0, 1 << 30), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_gives_a_nar_that_is_canonical(
    tree: Node, where: int, change: int
) -> None:
    """The parser accepts no second spelling: what it accepts, the writer writes again."""
    data = bytearray(nar(tree))
    data[where % len(data)] ^= change
    parser = NarParser(contents=True)
    try:
        events = parser.feed(bytes(data))
        parser.finish()
    except FormatError:
        return
    contents: dict[int, bytes] = {}
    for event in events:
        if isinstance(event, File):
            offset = event.offset
            contents[offset] = b""
        elif isinstance(event, FileData):
            contents[offset] += event.data
    again = nar_of(tree_of_nar([bytes(data)]), lambda file: [contents[file.offset]])
    assert b"".join(again) == data


@given(TEXT_TREES)
def test_a_tree_is_read_back_from_its_listing(tree: Node) -> None:
    data = write_listing(tree)
    assert parse_listing(data, nar_size=nar_size(tree)) == with_offsets(tree)
    assert write_listing(parse_listing(data, nar_size=None)) == data


@given(TEXT_TREES, st.integers(480, 700))
@settings(max_examples=15)
def test_a_deep_listing_is_read_as_a_shallow_one(tree: Node, depth: int) -> None:
    deep = tree
    for _ in range(depth):
        deep = Directory(((b"d", deep),))
    found = parse_listing(write_listing(deep), nar_size=nar_size(deep))
    for _ in range(depth):
        assert isinstance(found, Directory)
        ((_, found),) = found.entries
    assert with_offsets(found) == with_offsets(tree)


@given(INFOS)
def test_a_narinfo_is_read_back(info: UnverifiedPathInfo) -> None:
    assert parse_narinfo(write_narinfo(info), store_dir=info.store_dir) == info


@given(INFOS, st.binary(min_size=32, max_size=32))
def test_a_signature_covers_exactly_what_it_should(info: UnverifiedPathInfo, seed: bytes) -> None:
    key = SecretKey.generate("key-1")
    signature = key.sign(fingerprint(info))
    verify = PublicKey.parse(str(key.public_key())).verify
    shuffled = dataclasses.replace(
        info, references=(*reversed(info.references), *info.references), url="x", ca="y"
    )
    assert verify(fingerprint(shuffled), signature)
    other = Hash("sha256", seed)
    renamed = StorePath(info.store_path.hash_part, info.store_path.name + "x")
    assume(other != info.nar_hash)
    assert not verify(fingerprint(dataclasses.replace(info, nar_hash=other)), signature)
    assert not verify(fingerprint(dataclasses.replace(info, nar_size=info.nar_size + 1)), signature)
    assert not verify(fingerprint(dataclasses.replace(info, store_path=renamed)), signature)


@given(st.binary(max_size=80))
def test_nix32_is_read_back(data: bytes) -> None:
    assert nix32_decode(nix32_encode(data)) == data


@given(HASHES)
def test_a_hash_is_read_back_from_every_spelling(value: Hash) -> None:
    assert Hash.parse(value.nix32) == Hash.parse(value.hex) == Hash.parse(value.sri) == value


@given(PATHS)
def test_a_store_path_is_read_back(path: StorePath) -> None:
    assert StorePath.parse(path.basename) == StorePath.parse_absolute(path.absolute()) == path


@given(st.booleans(), st.integers(-100, 10_000))
def test_a_cache_description_is_read_back(mass: bool, priority: int) -> None:
    info = CacheInfo("/nix/store", mass, priority)
    assert parse_cache_info(write_cache_info(info)) == info


WORDS = st.from_regex(r"[a-z0-9:/.=+-]{1,8}", fullmatch=True)


@given(
    st.dictionaries(
        st.from_regex(r"x[a-z0-9-]{0,8}", fullmatch=True), st.lists(WORDS, max_size=4), max_size=5
    )
)
def test_settings_are_read_back(values: dict[str, list[str]]) -> None:
    text = "".join(f"{name} =\t{'  '.join(words)} # {name}\n" for name, words in values.items())
    assert parse_nix_conf(text) == {name: " ".join(words) for name, words in values.items()}
