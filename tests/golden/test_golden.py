"""Golden data made by real Nix (``regenerate`` in this directory), read and written again, byte for byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from veneer.formats.cache_info import CacheInfo, parse_cache_info, write_cache_info
from veneer.formats.listing import parse_listing, write_listing
from veneer.formats.nar import File, FileData, NarParser, TreeBuilder, nar_of, nar_size, tree_of_nar
from veneer.formats.narinfo import parse_narinfo, write_narinfo
from veneer.formats.signature import PublicKey, SecretKey, fingerprint
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath
from veneer.model.tree import Directory, Node, RegularFile, Symlink

HERE = Path(__file__).resolve().parent
PATHS: dict[str, StorePath] = {
    shape: StorePath.parse_absolute(path)
    for shape, path in json.loads((HERE / "paths.json").read_text()).items()
}
CACHES = ("none", "xz", "zstd", "zstd-without-listings")
NARINFOS = sorted(path for cache in CACHES for path in (HERE / cache).glob("*.narinfo"))
LISTINGS = sorted(path for cache in CACHES for path in (HERE / cache).glob("*.ls"))
SECRET = SecretKey.parse((HERE / "key.secret").read_text())
PUBLIC = PublicKey.parse((HERE / "key.public").read_text())


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def nar(shape: str) -> bytes:
    return (HERE / f"{shape}.nar").read_bytes()


def info(shape: str) -> UnverifiedPathInfo:
    cache = "zstd-without-listings" if shape == "bytes-name" else "zstd"
    return parse_narinfo((HERE / cache / f"{PATHS[shape].hash_part}.narinfo").read_bytes())


def shape_of(hash_part: str) -> str:
    return next(shape for shape, path in PATHS.items() if path.hash_part == hash_part)


def parsed(data: bytes, step: int) -> tuple[Node, dict[int, bytes]]:
    """(tree, content by offset) of a NAR fed in pieces of ``step`` bytes."""
    parser, builder = NarParser(contents=True), TreeBuilder()
    contents: dict[int, bytes] = {}
    offset = -1
    for at in range(0, len(data), step):
        events = parser.feed(data[at : at + step])
        builder.add(events)
        for event in events:
            if isinstance(event, File):
                offset = event.offset
                contents[offset] = b""
            elif isinstance(event, FileData):
                contents[offset] += event.data
    parser.finish()
    return builder.tree(), contents


def test_all_golden_data_are_there() -> None:
    assert len(PATHS) == 13
    assert len(NARINFOS) == 3 * 12 + 1
    assert len(LISTINGS) == 3 * 12


@pytest.mark.parametrize("shape", PATHS)
@pytest.mark.parametrize("step", [1, 17, 1 << 20])
def test_a_nar_by_nix_is_parsed_and_written_again(shape: str, step: int) -> None:
    data = nar(shape)
    tree, contents = parsed(data, step)
    for offset, content in contents.items():
        assert data[offset : offset + len(content)] == content
    assert b"".join(nar_of(tree, lambda file: [contents[file.offset]])) == data
    assert nar_size(tree) == len(data)


@pytest.mark.parametrize("shape", PATHS)
def test_a_nar_by_nix_is_what_its_narinfo_says(shape: str) -> None:
    assert hashlib.sha256(nar(shape)).digest() == info(shape).nar_hash.digest
    assert len(nar(shape)) == info(shape).nar_size
    assert info(shape).store_path == PATHS[shape]


@pytest.mark.parametrize("path", NARINFOS, ids=name)
def test_a_narinfo_by_nix_is_written_again(path: Path) -> None:
    data = path.read_bytes()
    parsed_info = parse_narinfo(data)
    assert parsed_info.extra == ()
    assert write_narinfo(parsed_info) == data
    compressed = (path.parent / parsed_info.url).read_bytes()
    assert parsed_info.file_hash is not None
    assert hashlib.sha256(compressed).digest() == parsed_info.file_hash.digest
    assert len(compressed) == parsed_info.file_size


@pytest.mark.parametrize("path", NARINFOS, ids=name)
def test_a_signature_by_nix_is_verified_and_made_again(path: Path) -> None:
    parsed_info = parse_narinfo(path.read_bytes())
    signed = fingerprint(parsed_info)
    assert [PUBLIC.verify(signed, signature) for signature in parsed_info.signatures] == [True]
    assert parsed_info.signatures == (SECRET.sign(signed),)
    assert not PUBLIC.verify(signed + b"x", parsed_info.signatures[0])


def test_the_keys_belong_together() -> None:
    assert SECRET.public_key() == PUBLIC
    assert str(PUBLIC) == (HERE / "key.public").read_text()
    assert SECRET.text() == (HERE / "key.secret").read_text()


@pytest.mark.parametrize("path", LISTINGS, ids=name)
def test_a_listing_by_nix_is_the_tree_of_its_nar_and_written_again(path: Path) -> None:
    data = path.read_bytes()
    golden_nar = nar(shape_of(path.stem))
    tree = parse_listing(data, nar_size=len(golden_nar))
    assert tree == tree_of_nar([golden_nar])
    assert write_listing(tree) == data


@pytest.mark.parametrize("path", LISTINGS, ids=name)
def test_offsets_computed_for_a_listing_without_any_are_those_of_nix(path: Path) -> None:
    def strip(node: dict[str, object]) -> Iterator[int]:
        if "narOffset" in node:
            yield int(str(node.pop("narOffset")))
        entries = node.get("entries")
        if isinstance(entries, dict):
            for child in entries.values():
                yield from strip(child)

    data = path.read_bytes()
    listing = json.loads(data)
    offsets = list(strip(listing["root"]))
    bare = json.dumps(listing).encode()
    assert (b"narOffset" in bare) is False
    assert offsets or b"size" not in bare
    assert parse_listing(bare, nar_size=None) == parse_listing(data, nar_size=None)


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_description_by_nix_is_written_again(cache: str) -> None:
    data = (HERE / cache / "nix-cache-info").read_bytes()
    assert parse_cache_info(data) == CacheInfo()
    assert write_cache_info(parse_cache_info(data)) == data


def test_the_shapes_are_what_they_are_called() -> None:
    trees = {shape: tree_of_nar([nar(shape)]) for shape in PATHS}
    assert trees["empty-root"] == RegularFile(0, False, 96)
    assert trees["executable-root"] == RegularFile(10, True, 128)
    assert trees["link-root"] == Symlink(PATHS["leaf"].absolute().encode())
    assert trees["empty-directory"] == Directory(())
    outputs, odd = trees["outputs"], trees["bytes-name"]
    assert isinstance(outputs, Directory)
    assert isinstance(odd, Directory)
    assert {b"two words", "ü".encode(), b"empty", b"zero"} <= dict(outputs.entries).keys()
    assert [entry for entry, _ in odd.entries] == [b"bad\xffname", b"good"]
    assert PATHS["self-reference"] in info("self-reference").references
    assert info("outputs").references == (PATHS["leaf"], PATHS["outputs.lib"])
    assert info("text").ca.startswith("text:sha256:")
    assert info("fixed-output").ca.startswith("fixed:sha256:")
    assert info("content-addressed").ca.startswith("fixed:r:sha256:")
    assert info("text").deriver == ""
    assert info("leaf").deriver.endswith("-leaf.drv")
