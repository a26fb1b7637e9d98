"""Valid signatures are checked once ever, and the memory of one vouches for nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import golden
from tests.support.golden import GOLDEN, PATHS
from veneer.cache.index import Index
from veneer.formats.narinfo import parse_narinfo
from veneer.formats.signature import PublicKey, SecretKey, fingerprint
from veneer.model.errors import TrustError
from veneer.model.hashes import Hash
from veneer.model.path_info import PathInfo, UnverifiedPathInfo
from veneer.model.store_path import StorePath
from veneer.store.verify import TrustPolicy, verify_path_info

KEY = PublicKey.parse(golden.KEY)


class CountedIndex(Index):
    """How often a signature was found valid by checking it."""

    checked = 0

    def put_signature_verified(self, digest: bytes) -> None:
        self.checked += 1
        super().put_signature_verified(digest)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[CountedIndex]:
    opened = CountedIndex(tmp_path / "index.sqlite")
    yield opened
    opened.close()


@pytest.fixture
def signed() -> UnverifiedPathInfo:
    """By real Nix."""
    return parse_narinfo((GOLDEN / "zstd" / f"{PATHS['text'].hash_part}.narinfo").read_bytes())


def verified(index: Index, info: UnverifiedPathInfo, *keys: PublicKey) -> PathInfo:
    return verify_path_info(
        TrustPolicy(keys or (KEY,)), info, index, source_url="https://cache.example", source_trusted=False
    )


def test_a_signature_is_checked_once_ever(
    index: CountedIndex, signed: UnverifiedPathInfo, tmp_path: Path
) -> None:
    first = verified(index, signed)
    assert first.signed_by == (KEY.name,)
    assert verified(index, signed) == first
    assert index.checked == 1
    index.flush()
    later = CountedIndex(tmp_path / "index.sqlite")
    assert verified(later, signed) == first
    assert later.checked == 0
    later.close()


def test_unsigned_fields_may_change_and_are_no_reason_to_check_again(
    index: CountedIndex, signed: UnverifiedPathInfo
) -> None:
    verified(index, signed)
    assert verified(index, replace(signed, url="nar/moved.nar", compression="none")).signed_by == (KEY.name,)
    assert index.checked == 1


OTHER = StorePath("0" * 32, "other")
CHANGES: dict[str, Callable[[UnverifiedPathInfo], UnverifiedPathInfo]] = {
    "store path": lambda info: replace(info, store_path=OTHER),
    "NarHash": lambda info: replace(info, nar_hash=Hash("sha256", bytes(32))),
    "NarSize": lambda info: replace(info, nar_size=info.nar_size + 1),
    "references": lambda info: replace(info, references=(*info.references, OTHER)),
    "store directory": lambda info: replace(info, store_dir="/other/store"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_remembered_signature_vouches_for_no_other_content(
    index: CountedIndex,
    signed: UnverifiedPathInfo,
    change: Callable[[UnverifiedPathInfo], UnverifiedPathInfo],
) -> None:
    verified(index, signed)
    with pytest.raises(TrustError):
        verified(index, change(signed))


def test_a_remembered_signature_counts_only_where_its_key_does(
    index: CountedIndex, signed: UnverifiedPathInfo
) -> None:
    verified(index, signed)
    same_name = SecretKey.generate(KEY.name).public_key()
    for keys in ((same_name,), (SecretKey.generate("other-1").public_key(),)):
        with pytest.raises(TrustError):
            verified(index, signed, *keys)
    assert verified(index, signed, same_name, KEY).signed_by == (KEY.name,)


def test_another_signature_of_the_same_key_is_checked(
    index: CountedIndex, signed: UnverifiedPathInfo
) -> None:
    key = SecretKey.generate("mine-1")
    good = key.sign(fingerprint(signed))
    verified(index, replace(signed, signatures=(good,)), key.public_key())
    forged = f"mine-1:{'A' * 86}=="
    for _ in range(2):  # a failure is not remembered as anything
        with pytest.raises(TrustError):
            verified(index, replace(signed, signatures=(forged,)), key.public_key())
    assert index.checked == 1
