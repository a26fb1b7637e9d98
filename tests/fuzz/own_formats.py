"""Targets for our own files: bundles, traces, and what mount servers note for traces."""

from __future__ import annotations

import functools
from itertools import pairwise
from pathlib import Path

import zstandard

from veneer.formats import bundle, nar, touches, trace, tree_index
from veneer.formats.trace import Ranges, TracedFile, TracedPath
from veneer.formats.tree_index import node_id
from veneer.model.errors import FormatError
from veneer.model.hashes import Hash
from veneer.model.store_path import StorePath
from veneer.store import trace_match

ROOT = "0" * 32
_PLAIN = b"veneer-bundle-1\n"
_GOLDEN_NAR = Path(__file__).resolve().parent.parent / "golden/outputs.nar"


def run_bundle(data: bytes) -> None:
    """``data`` is what the frame holds. Accepted, it is written as it was."""
    framed = zstandard.ZstdCompressor(level=1).compress(data)
    entries = list(bundle.parse_bundle(framed, ROOT))
    written = bundle.write_bundle(ROOT, entries)
    assert zstandard.ZstdDecompressor().decompress(written) == data
    for entry in entries[1:2]:
        _refused(framed, entry.hash_part if entry.hash_part != ROOT else "1" * 32)


def run_bundle_frame(data: bytes) -> None:
    """``data`` is the whole file."""
    entries = list(bundle.parse_bundle(data, ROOT))
    assert list(bundle.parse_bundle(bundle.write_bundle(ROOT, entries), ROOT)) == entries
    _refused(data + b"x", ROOT)


def _refused(data: bytes, root: str) -> None:
    try:
        list(bundle.parse_bundle(data, root))
    except FormatError:
        return
    raise AssertionError("accepted")


def run_trace(data: bytes) -> None:
    """Written and read again it is the same; what is said twice is said once; its parts lie in their files, and in a NAR."""
    found = trace.decode(data)
    assert data.decode()
    written = trace.encode(found)
    assert trace.decode(written) == found
    assert trace.decode(written + written) == found
    index = _index()
    for traced in found:
        assert len({file.name for file in traced.files}) == len(traced.files)
        for file in traced.files:
            assert file.size == 0 or _apart(file.ranges, file.size)
        assert _apart(trace_match.nar_ranges(traced.files, index), index.nar_size)


def _apart(ranges: Ranges, end: int) -> bool:
    """Whether they are in order, apart from each other, not empty, and within ``end`` bytes."""
    return (
        all(offset >= 0 and size > 0 and offset + size <= end for offset, size in ranges)
        and all(one[0] + one[1] < other[0] for one, other in pairwise(ranges))
    )  # fmt: skip


@functools.cache
def _index() -> tree_index.TreeIndex:
    tree = nar.tree_of_nar([_GOLDEN_NAR.read_bytes()])
    return tree_index.TreeIndex(
        bytes(
            tree_index.encode_tree(
                tree, path_number=7, generation=bytes(16), nar_hash=bytes(32), nar_size=nar.nar_size(tree)
            )
        )
    )


def run_trace_match(data: bytes) -> None:
    """Lines: a letter for where the path is found, one for its hash part, and its name."""
    changed: list[StorePath] = []
    closure: list[StorePath] = []
    kept: list[StorePath] = []
    for line in data.split(b"\n"):
        text = line.decode("ascii", "surrogateescape")
        path = StorePath.parse(text[1:2] * 32 + "-" + text[2:])
        {"c": changed, "k": kept}.get(text[0], closure).append(path)
        base, output = trace_match.stem(path.name)
        assert path.name.startswith(base)
        assert not output or path.name.endswith("-" + output)
    found = trace_match.successors(changed, closure, kept)
    free = set(closure) - set(kept)
    assert found.keys() <= set(changed)
    assert free.issuperset(found.values())
    assert len(set(found.values())) == len(found)
    for path in changed:
        if path not in found:
            alike = {trace_match.stem(other.name) for other in free.difference(found.values())}
            assert trace_match.stem(path.name) not in alike


def run_touches(data: bytes) -> None:
    """Any bytes can be read. Written again they are the same, and cut off anywhere they tell no other name."""
    rows = list(touches.parse(data))
    assert len(rows) <= len(data) // touches.ROW_SIZE
    written = b"".join(_touch(row) for row in rows)
    assert list(touches.parse(written)) == rows
    names = {row.name for row in rows if row.name}
    for cut in range(0, len(written), touches.ROW_SIZE):
        assert names.issuperset(row.name for row in touches.parse(written[:cut]) if row.name)


def _touch(row: touches.Touched) -> bytes:
    if row.name is not None:
        assert (row.entry, row.offset, row.size) == (0, 0, 0)
        return touches.name_row(node_id(row.number, 0), str(row.name).encode())
    assert row.size
    return touches.read_row(node_id(row.number, row.entry), row.offset, row.size)


_ENTRIES = [
    bundle.Entry(ROOT, bundle.NARINFO, b"StorePath: x\n"),
    bundle.Entry(ROOT, bundle.LISTING, b"{}"),
    bundle.Entry("1" * 32, bundle.CHUNKS, b"\0\n 1\n"),
]
_PATH = StorePath("1" * 32, "git-2.39.5")
_TRACE = trace.encode(
    (
        TracedPath(
            _PATH,
            Hash("sha256", bytes(32)),
            1 << 20,
            (TracedFile(b"bin/\xff\n", 9000, ((0, 10), (50, 1))), TracedFile(b"bin/sh", 4, ((0, 4),))),
        ),
        TracedPath(StorePath("2" * 32, "glibc-2.37"), Hash("sha256", bytes(32)), 9, ()),
    )
)

BUNDLES = tuple(
    _PLAIN + b"".join(entry.header + entry.body for entry in _ENTRIES[:count]) for count in (1, 2, 3)
)
BUNDLE_FRAMES = (bundle.write_bundle(ROOT, _ENTRIES), bundle.write_bundle(ROOT, _ENTRIES[:1]))
TRACES = (_TRACE, _TRACE + _TRACE)
MATCHES = (
    b"c1openssl-3.0.7-dev\nn2openssl-3.0.8-dev\nn3openssl-3.0.8\nk4zlib-1.3\nc5zlib-1.3\nn4zlib-1.3",
    b"c1a\nc2a\nn3a\nn4a-1",
)
TOUCHES = (
    touches.name_row(node_id(7, 0), str(_PATH).encode())
    + touches.read_row(node_id(7, 3), 4097, 10)
    + touches.read_row(node_id(7, 3), 1 << 60, 1 << 60),
)
