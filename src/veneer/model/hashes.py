"""Hashes as Nix writes them: ``sha256:<nix32>``, ``sha256:<hex>``, SRI ``sha256-<base64>``.

Source: Nix manual, "Nix32 encoding" and "Hash"; checked against golden data from real Nix.
Nix32 is base 32 over the alphabet below (no e, o, t, u), least significant 5 bits last, byte order reversed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from typing import Protocol

from .errors import FormatError

NIX32_ALPHABET = "0123456789abcdfghijklmnpqrsvwxyz"
_TO_BASE_32 = str.maketrans(NIX32_ALPHABET, "0123456789abcdefghijklmnopqrstuv")
_FROM_BASE_32 = str.maketrans("0123456789ABCDEFGHIJKLMNOPQRSTUV", NIX32_ALPHABET)
_FOREIGN = re.compile(f"[^{NIX32_ALPHABET}]")
DIGEST_SIZES = {"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64}


class Hasher(Protocol):
    """What ``hashlib`` gives: fed bytes, asked once for a digest."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None: ...
    def digest(self) -> bytes: ...


def nix32_encode(data: bytes) -> str:
    """Nix32 text of ``data``; ``ceil(len*8/5)`` characters."""
    length = (len(data) * 8 + 4) // 5
    whole = -(-length // 8)  # base 32 comes in groups of 5 bytes, 8 characters
    number = int.from_bytes(data, "little") << 5 * (8 * whole - length)
    encoded = base64.b32hexencode(number.to_bytes(5 * whole, "big"))
    return encoded[:length].decode("ascii").translate(_FROM_BASE_32)


def nix32_decode(text: str) -> bytes:
    """Bytes of Nix32 ``text``. FormatError on a foreign character or on bits beyond the last byte."""
    foreign = _FOREIGN.search(text)
    if foreign is not None:
        raise FormatError(f"not a Nix32 character: {foreign[0]!r}", where="nix32")
    number = int(text.translate(_TO_BASE_32), 32) if text else 0
    size = len(text) * 5 // 8
    if number >> (8 * size):
        raise FormatError("Nix32 text has bits beyond its last byte", where="nix32")
    return number.to_bytes(size, "little")


@dataclass(frozen=True, slots=True)
class Hash:
    """An algorithm's name and its digest."""

    algorithm: str
    digest: bytes

    @classmethod
    def parse(cls, text: str) -> Hash:
        """From ``algo:hex``, ``algo:nix32``, ``algo:base64`` or SRI ``algo-base64``. FormatError otherwise."""
        algorithm, sep, rest = text.partition(":")
        sri = False
        if not sep:
            algorithm, sep, rest = text.partition("-")
            sri = True
        size = DIGEST_SIZES.get(algorithm)
        if not sep or size is None:
            raise FormatError(f"not a hash: {text[:100]!r}", where="hash")
        if not sri and len(rest) == size * 2:
            try:
                return cls(algorithm, binascii.unhexlify(rest))  # bytes.fromhex would skip spaces
            except ValueError as error:
                raise FormatError(f"not a hexadecimal hash: {text[:200]!r}", where="hash") from error
        if not sri and len(rest) == (size * 8 + 4) // 5:
            return cls(algorithm, nix32_decode(rest))
        try:
            digest = base64.b64decode(rest, validate=True)
        except (binascii.Error, ValueError) as error:
            raise FormatError(f"not a hash: {text[:200]!r}", where="hash") from error
        if len(digest) != size:
            raise FormatError(f"{algorithm} digest of {len(digest)} bytes, not {size}", where="hash")
        return cls(algorithm, digest)

    @property
    def nix32(self) -> str:
        return f"{self.algorithm}:{nix32_encode(self.digest)}"

    @property
    def hex(self) -> str:
        return f"{self.algorithm}:{self.digest.hex()}"

    @property
    def sri(self) -> str:
        return f"{self.algorithm}-{base64.b64encode(self.digest).decode('ascii')}"

    def hasher(self) -> Hasher:
        """A fresh ``hashlib`` object of this algorithm."""
        return hashlib.new(self.algorithm)

    def __str__(self) -> str:
        return self.nix32
