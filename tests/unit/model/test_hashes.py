"""Hashes in each of Nix's spellings. The nix32 examples are from real Nix (tests/golden holds more)."""

from __future__ import annotations

import hashlib

import pytest

from veneer.model.errors import FormatError
from veneer.model.hashes import Hash, nix32_decode, nix32_encode

EMPTY = Hash("sha256", hashlib.sha256(b"").digest())
EMPTY_NIX32 = "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73"  # nix-hash --to-base32 --type sha256


def test_nix32_of_a_known_hash() -> None:
    assert EMPTY.nix32 == f"sha256:{EMPTY_NIX32}"
    assert str(EMPTY) == EMPTY.nix32
    assert nix32_encode(b"") == ""
    assert nix32_decode("") == b""


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha256", "sha512"])
def test_every_spelling_is_read_back(algorithm: str) -> None:
    value = Hash(algorithm, hashlib.new(algorithm, b"x").digest())
    base64 = f"{algorithm}:{value.sri.partition('-')[2]}"
    for text in (
        value.nix32,
        value.hex,
        value.sri,
        base64,
        value.hex.upper().replace(algorithm.upper(), algorithm),
    ):
        assert Hash.parse(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256",
        "sha256:",
        "sha256-",
        EMPTY_NIX32,
        f"sha255:{EMPTY_NIX32}",
        f"sha256:{EMPTY_NIX32[:-1]}",
        f"sha256:e{EMPTY_NIX32[1:]}",
        f"sha256:z{EMPTY_NIX32[1:]}",  # bits beyond the last byte
        f"sha256:{'0' * 63}g",
        f"sha256:{' ' * 2}{'0' * 62}",
        f"sha256:{'0' * 62}ä0",
        f"sha256-{EMPTY.digest.hex()}",
        "sha256-AAAA",
        "sha256-" + "ä" * 44,
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        Hash.parse(text)


def test_hasher_makes_the_digest() -> None:
    hasher = EMPTY.hasher()
    hasher.update(b"")
    assert hasher.digest() == EMPTY.digest
