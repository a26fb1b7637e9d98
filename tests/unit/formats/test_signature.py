"""Signatures: what is covered, and what does not count. Agreement with real Nix is in tests/golden."""

from __future__ import annotations

import base64

import pytest

from veneer.formats.signature import PublicKey, SecretKey, fingerprint
from veneer.model.errors import FormatError
from veneer.model.hashes import Hash
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath

A, B = StorePath("0" * 32, "a"), StorePath("1" * 32, "b")
SECRET = SecretKey(
    "test-1",
    bytes.fromhex(
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    ),
)  # fmt: skip - RFC 8032, 7.1, test 1


def info(*references: StorePath) -> UnverifiedPathInfo:
    return UnverifiedPathInfo(A, "u", "none", Hash("sha256", bytes(32)), 5, references)


def test_fingerprint_has_sorted_absolute_references_each_once() -> None:
    expected = f"1;/nix/store/{A};sha256:{'0' * 52};5;/nix/store/{A},/nix/store/{B}".encode()
    assert fingerprint(info(B, A, B)) == expected
    assert fingerprint(info()).endswith(b";5;")


def test_a_known_signature() -> None:
    signature = base64.b64decode(SECRET.sign(b"").partition(":")[2])
    assert signature.hex().startswith("e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155")
    assert SecretKey.parse(SECRET.text() + "\n") == SECRET


def test_a_signature_counts_for_its_key_and_bytes_alone() -> None:
    other = SecretKey.generate("test-1")
    signature = SECRET.sign(b"signed")
    public = PublicKey.parse(str(SECRET.public_key()))
    assert public.verify(b"signed", signature)
    assert public.verify(b"signed", signature.rstrip("="))
    assert not public.verify(b"other", signature)
    assert not other.public_key().verify(b"signed", signature)
    assert not PublicKey("test-2", public.raw).verify(b"signed", signature)
    assert other.public_key().verify(b"x", other.sign(b"x"))


@pytest.mark.parametrize(
    "text", ["", "test-1", "test-1:", "test-1:AAAA", "test-1:!", "test-1:ä", "test-1:" + "A" * 9000]
)
def test_malformed_signatures_do_not_count(text: str) -> None:
    assert not SECRET.public_key().verify(b"signed", text)


@pytest.mark.parametrize(
    "text", ["", "x", ":AAAA", "a b:AAAA", "x:AAAA", "x:" + "A" * 44, "x\x1b:" + "A" * 43 + "="]
)
def test_malformed_keys_are_refused(text: str) -> None:
    with pytest.raises(FormatError):
        PublicKey.parse(text)
    with pytest.raises(FormatError):
        SecretKey.parse(text)


def test_secrets_do_not_leak_into_representations_and_errors() -> None:
    broken = SecretKey("test-1", SECRET.raw[:32] + bytes(32))
    assert SECRET.raw.hex()[:16] not in repr(SECRET)
    assert "raw" not in repr(SECRET)
    with pytest.raises(FormatError) as caught:
        SecretKey.parse(broken.text())
    assert broken.text().partition(":")[2][:16] not in str(caught.value)
    with pytest.raises(FormatError) as caught:
        SecretKey.parse(SECRET.text()[:-10])
    assert SECRET.text().partition(":")[2][:16] not in str(caught.value)


def test_key_names_are_checked_when_generating() -> None:
    with pytest.raises(FormatError):
        SecretKey.generate("a:b")
