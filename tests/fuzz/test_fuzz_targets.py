"""Every codec accepts any input or refuses it with a documented error. Nothing else may come out: no other exception,
no endless loop, no memory beyond its limit.

Each row of ``TARGETS`` is one codec: what to call, and files to begin from. To add a codec, add a row.

- pytest runs every target over random and changed inputs for a moment.
- ``python tests/fuzz/test_fuzz_targets.py TARGET [libFuzzer options]`` runs one for long, guided by coverage, where
  ``atheris`` is installed (crashes are written to the working directory; they belong into a unit test).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veneer.formats import cache_info, listing, nar, narinfo, nix_conf, request_wire, signature
from veneer.model.errors import FormatError
from veneer.model.hashes import Hash, nix32_decode
from veneer.model.store_path import StorePath
from veneer.model.tree import Node

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


@dataclass(frozen=True)
class Target:
    """``run`` is given bytes and may raise FormatError only. ``seeds``: glob patterns in tests/golden, or bytes."""

    run: Callable[[bytes], object]
    seeds: tuple[str | bytes, ...]

    def seed_bytes(self) -> list[bytes]:
        found: list[bytes] = []
        for seed in self.seeds:
            if isinstance(seed, bytes):
                found.append(seed)
            else:
                found += [path.read_bytes() for path in sorted(GOLDEN.glob(seed))]
        return found


def run_nar(data: bytes) -> None:
    """Whole and in pieces: both must agree on acceptance and on the tree."""

    def tree(step: int) -> Node | None:
        try:
            return nar.tree_of_nar(data[at : at + step] for at in range(0, len(data), step))
        except FormatError:
            return None

    whole = tree(len(data) + 1)
    assert whole == tree(11)
    if whole is None:
        raise FormatError("refused")
    assert whole == nar.with_offsets(whole)
    assert nar.nar_size(whole) == len(data)


def run_listing(data: bytes) -> None:
    """Both JSON readers, which must agree on what a listing is (but for what the slow one documents)."""
    tree = listing.parse_listing(data, nar_size=None)
    assert listing.parse_listing(listing.write_listing(tree), nar_size=nar.nar_size(tree)) == tree


def run_deep_listing(data: bytes) -> None:
    """The reader for deep listings: what it accepts, the other does, too."""
    try:
        listing._decode_deep(data)
    except ValueError as error:  # msgspec's errors, which parse_listing turns into FormatError
        raise FormatError("refused") from error
    try:
        listing.parse_listing(data, nar_size=None)
    except FormatError as error:
        assert "malformed" not in str(error)
        raise


def run_narinfo(data: bytes) -> None:
    info = narinfo.parse_narinfo(data)
    signature.fingerprint(info)
    assert narinfo.parse_narinfo(narinfo.write_narinfo(info)) == info


def run_cache_info(data: bytes) -> None:
    info = cache_info.parse_cache_info(data)
    assert cache_info.parse_cache_info(cache_info.write_cache_info(info)) == info


def run_texts(data: bytes) -> None:
    """What is parsed from short texts; refusals of one must not hide the others."""
    text = data.decode("utf-8", "surrogateescape")
    parsers: list[Callable[[str], object]] = [
        StorePath.parse,
        StorePath.parse_absolute,
        Hash.parse,
        nix32_decode,
        signature.PublicKey.parse,
        signature.SecretKey.parse,
    ]
    refused = 0
    for parse in parsers:
        try:
            parse(text)
        except FormatError:
            refused += 1
    key = signature.PublicKey("golden-1", bytes(32))
    assert key.verify(b"", text) in (True, False)
    if refused == len(parsers):
        raise FormatError("refused by all")


def run_nix_conf(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    nix_conf.settings(nix_conf.parse_nix_conf(text, include=lambda _: "x = 1"))


TARGETS: dict[str, Target] = {
    "nar": Target(run_nar, ("*.nar",)),
    "listing": Target(run_listing, ("zstd/*.ls",)),
    "deep_listing": Target(run_deep_listing, ("zstd/*.ls",)),
    "listing_bytes": Target(
        lambda data: listing.decode_listing_bytes(data, 1 << 20), ("zstd/*.ls", "zstd/nar/*", "xz/nar/*")
    ),
    "narinfo": Target(run_narinfo, ("*/*.narinfo",)),
    "cache_info": Target(
        run_cache_info, ("none/nix-cache-info", b"StoreDir: /x\nWantMassQuery: 1\nPriority: 40\n")
    ),
    "texts": Target(run_texts, ("key.public", "key.secret", b"sha256:" + b"0" * 52, b"0" * 32 + b"-name")),
    "nix_conf": Target(
        run_nix_conf, (b"a = b c # d\nextra-substituters = x\n!include y\nrequire-sigs = false\n",)
    ),
    "request_wire": Target(
        lambda data: request_wire.Splitter().feed(data),
        (request_wire.Frame(request_wire.Kind.LOOKUP, 7, b"name").encode(),),
    ),
}


def survives(target: Target, data: bytes) -> bool:
    """Whether ``data`` was accepted. Any exception but FormatError goes through: a finding."""
    try:
        target.run(data)
    except FormatError:
        return False
    return True


@st.composite
def changed(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed with some pieces replaced, repeated or cut out, at the places where formats have their joints."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 16)))
        piece = draw(
            st.binary(max_size=12)
            | st.sampled_from([b"\n", b":", b'"', b"{", b"}", b",", b"\0" * 8, b"\xff" * 8, b"-1", b"9" * 20])
            | st.just(bytes(data[start:end]) * 2)
        )
        data[start:end] = piece
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_accepted(name: str) -> None:
    target = TARGETS[name]
    assert target.seed_bytes()
    for seed in target.seed_bytes():
        assert survives(target, seed), seed


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_input_is_accepted_or_refused(name: str, data: st.DataObject) -> None:
    target = TARGETS[name]
    survives(target, data.draw(st.binary(max_size=200) | changed(target.seed_bytes())))


def test_listings_that_both_readers_know_are_equal() -> None:
    for seed in TARGETS["listing"].seed_bytes():
        assert listing._decode_deep(seed).root is not None
        assert json.loads(seed)["version"] == listing._decode_deep(seed).version


def main() -> None:
    """Run one target under libFuzzer."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: {sys.argv[0]} TARGET [libFuzzer options]; targets: {' '.join(TARGETS)}")
    if importlib.util.find_spec("atheris") is None:
        sys.exit("atheris is not installed; pytest tests/fuzz runs the targets without it")
    atheris = importlib.import_module("atheris")
    target = TARGETS[sys.argv.pop(1)]
    seeds = iter(target.seed_bytes())

    def one(data: bytes) -> None:
        survives(target, data or next(seeds, b""))

    atheris.instrument_all()
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
