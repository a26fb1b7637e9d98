"""Nix signatures of store paths, and the keys that make and check them.

Source: the Nix manual ("nix key", "Store path signing"); checked against real Nix both ways (tests/golden).

    signature   = key name ":" base64(64 bytes)      Ed25519 over the fingerprint
    public key  = key name ":" base64(32 bytes)
    secret key  = key name ":" base64(64 bytes)      seed, then public key
    fingerprint = "1;" store path ";" NarHash as sha256:nix32 ";" NarSize ";" references

The store path and the references are absolute; references are separated by commas, sorted by bytes, each once,
whatever their order in the narinfo. URL, compression, the file's hash and size, deriver and CA are *not* signed.
Key names: anything printable without colon or space, usually ``host-1``. Base64 without its padding is accepted, as
Nix does. Texts end with no newline; a key file's last newline is ignored.

Ed25519 is deterministic: a signature by us equals Nix's. Who decides which keys count: ``store.verify``.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from veneer.model.errors import FormatError
from veneer.model.path_info import UnverifiedPathInfo

PUBLIC_KEY_SIZE = 32
SECRET_KEY_SIZE = 64
SIGNATURE_SIZE = 64
_MAX_TEXT = 4096


def fingerprint(info: UnverifiedPathInfo) -> bytes:
    """The bytes that a signature of ``info`` covers."""
    references = sorted({path.absolute(info.store_dir) for path in info.references})
    path = info.store_path.absolute(info.store_dir)
    return f"1;{path};{info.nar_hash.nix32};{info.nar_size};{','.join(references)}".encode()


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that signatures are checked with. ``name`` is what signatures mention."""

    name: str
    raw: bytes

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """From "name:base64". FormatError."""
        return cls(*_named(text, PUBLIC_KEY_SIZE, "public key"))

    def verify(self, signed: bytes, signature: str) -> bool:
        """Whether ``signature`` ("name:base64") is this key's over ``signed``. False, too, for text that is none."""
        try:
            name, raw = _named(signature, SIGNATURE_SIZE, "signature")
        except FormatError:
            return False  # one malformed signature must not hide a good one beside it
        if name != self.name:
            return False
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(raw, signed)
        except InvalidSignature:
            return False
        return True

    def __str__(self) -> str:
        return f"{self.name}:{base64.b64encode(self.raw).decode('ascii')}"


@dataclass(frozen=True, slots=True)
class SecretKey:
    """A key that signatures are made with. Its representation hides the secret; ``text()`` shows it."""

    name: str
    raw: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> SecretKey:
        """From "name:base64", as in a file by ``nix key generate-secret``. FormatError without the secret in it."""
        key = cls(*_named(text, SECRET_KEY_SIZE, "secret key"))
        if Ed25519PrivateKey.from_private_bytes(key.raw[:32]).public_key().public_bytes_raw() != key.raw[32:]:
            raise FormatError("the two halves of the secret key do not belong together", where="secret key")
        return key

    @classmethod
    def generate(cls, name: str) -> SecretKey:
        """A new random key."""
        _check_name(name, "secret key")
        private = Ed25519PrivateKey.generate()
        return cls(name, private.private_bytes_raw() + private.public_key().public_bytes_raw())

    def public_key(self) -> PublicKey:
        return PublicKey(self.name, self.raw[32:])

    def sign(self, signed: bytes) -> str:
        """The signature "name:base64" over ``signed``."""
        raw = Ed25519PrivateKey.from_private_bytes(self.raw[:32]).sign(signed)
        return f"{self.name}:{base64.b64encode(raw).decode('ascii')}"

    def text(self) -> str:
        """The key as it stands in a secret key file."""
        return f"{self.name}:{base64.b64encode(self.raw).decode('ascii')}"


def _named(text: str, size: int, what: str) -> tuple[str, bytes]:
    """(name, bytes) of "name:base64". The error quotes the name only: the rest may be a secret."""
    if len(text) > _MAX_TEXT:
        raise FormatError(f"{len(text)} characters are too long", where=what)
    name, colon, encoded = text.removesuffix("\n").partition(":")
    if not colon:
        raise FormatError('not of the form "name:base64"', where=what)
    _check_name(name, what)
    try:
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{name!r} has a value that is not base64", where=what) from error
    if len(raw) != size:
        raise FormatError(f"{name!r} has {len(raw)} bytes, not {size}", where=what)
    return name, raw


def _check_name(name: str, what: str) -> None:
    if not name or ":" in name or " " in name or not name.isprintable():
        raise FormatError(f"not a key name: {name[:100]!r}", where=what)
