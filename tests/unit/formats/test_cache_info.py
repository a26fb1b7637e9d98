"""nix-cache-info: Nix's defaults, and pages that are not a cache's."""

from __future__ import annotations

import pytest

from veneer.formats.cache_info import MAX_SIZE, CacheInfo, parse_cache_info, write_cache_info
from veneer.model.errors import FormatError, LimitError


def test_all_fields() -> None:
    data = b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n"
    info = CacheInfo("/nix/store", True, 40)
    assert parse_cache_info(data) == info
    assert write_cache_info(info) == data


def test_missing_fields_have_nix_defaults() -> None:
    assert parse_cache_info(b"") == CacheInfo("/nix/store", False, 50)
    assert write_cache_info(CacheInfo()) == b"StoreDir: /nix/store\n"


def test_what_nix_tolerates_is_tolerated() -> None:
    data = b"comment\r\nUnknown: x:y\r\nStoreDir:/gnu/store/\r\nPriority:  -3 \nWantMassQuery: true"
    assert parse_cache_info(data) == CacheInfo("/gnu/store", False, -3)


@pytest.mark.parametrize(
    "data",
    [
        b"<html>\n<title>Log in: hotel</title>",
        b"StoreDir: nix/store\n",
        b"StoreDir:\n",
        b"Priority: high\n",
        b"Priority: 99999999999\n",
        b"StoreDir: /\xff\n",
        b"StoreDir: /a\x1b[0m\n",
    ],
)
def test_what_is_not_a_description_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        parse_cache_info(data)


def test_a_huge_answer_is_refused() -> None:
    with pytest.raises(LimitError):
        parse_cache_info(b"StoreDir: /nix/store\n" + b" " * MAX_SIZE)
