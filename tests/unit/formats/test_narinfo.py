"""narinfo: every field, every refusal. What real Nix writes is in tests/golden."""

from __future__ import annotations

import dataclasses

import pytest

from veneer.formats.narinfo import MAX_NAR_SIZE, MAX_SIZE, parse_narinfo, write_narinfo
from veneer.model.errors import FormatError, LimitError
from veneer.model.hashes import Hash
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath

A, B = "0" * 32, "1" * 32
NAR_HASH = Hash("sha256", bytes(range(32)))
MINIMAL = f"StorePath: /nix/store/{A}-a\nURL: nar/x.nar\nNarHash: {NAR_HASH}\nNarSize: 112\n".encode()
FULL = UnverifiedPathInfo(
    store_path=StorePath(A, "a"),
    url="nar/x.nar.zst?hash=1",
    compression="zstd",
    nar_hash=NAR_HASH,
    nar_size=MAX_NAR_SIZE,
    references=(StorePath(A, "a"), StorePath(B, "b")),
    file_hash=Hash("sha512", bytes(64)),
    file_size=1,
    deriver=f"{B}-a.drv",
    signatures=("k-1:AAAA", "k-2:BBBB", "k-1:AAAA"),
    ca="fixed:r:sha256:0",
    extra=(("System", "x86_64-linux"), ("Later", "a: b"), ("System", ""), ("Ünïcode", " ä")),
)


def replaced(old: str, new: str) -> bytes:
    assert old.encode() in MINIMAL
    return MINIMAL.replace(old.encode(), new.encode())


def test_a_full_narinfo_is_read_back_as_written() -> None:
    assert parse_narinfo(write_narinfo(FULL)) == FULL


def test_missing_fields_have_nix_defaults() -> None:
    info = parse_narinfo(MINIMAL)
    assert info == UnverifiedPathInfo(StorePath(A, "a"), "nar/x.nar", "bzip2", NAR_HASH, 112)
    assert (
        parse_narinfo(MINIMAL + b"References:\nDeriver: unknown-deriver\nCompression: \nFileSize: 0\nCA: \n")
        == info
    )


def test_hash_spellings_are_equal() -> None:
    assert parse_narinfo(replaced(str(NAR_HASH), NAR_HASH.hex)) == parse_narinfo(MINIMAL)
    assert parse_narinfo(replaced(str(NAR_HASH), NAR_HASH.sri)) == parse_narinfo(MINIMAL)


def test_another_store_directory_must_be_asked_for() -> None:
    other = replaced("/nix/store/", "/gnu/store/")
    info = parse_narinfo(other, store_dir="/gnu/store")
    assert info.store_dir == "/gnu/store"
    assert write_narinfo(info).startswith(b"StorePath: /gnu/store/")
    with pytest.raises(FormatError):
        parse_narinfo(other)


@pytest.mark.parametrize("key", ["StorePath", "URL", "NarHash", "NarSize"])
def test_a_required_field_is_missed(key: str) -> None:
    data = b"".join(line for line in MINIMAL.splitlines(True) if not line.startswith(key.encode()))
    with pytest.raises(FormatError, match=key):
        parse_narinfo(data)


@pytest.mark.parametrize(
    "line", ["NarSize: 112", "URL: nar/y.nar", "References: ", "CA: ", "Deriver: ", "Compression: xz"]
)
def test_a_second_value_is_refused(line: str) -> None:
    with pytest.raises(FormatError, match=f"second {line.partition(':')[0]}"):
        parse_narinfo(MINIMAL + f"{line}\n{line}\n".encode())


@pytest.mark.parametrize(
    "size", ["0", "-1", "", "1e3", "0x10", "1 ", "٣", str(1 << 63), "9" * 30, "9" * 5000]
)
def test_impossible_sizes_are_refused(size: str) -> None:
    with pytest.raises(FormatError):
        parse_narinfo(replaced("NarSize: 112", f"NarSize: {size}"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        MINIMAL[:-1],
        MINIMAL + b"\n",
        MINIMAL + b"no colon\n",
        MINIMAL + b": value\n",
        MINIMAL.replace(b"\n", b"\r\n"),
        MINIMAL + b"Sig: \xff\n",
        MINIMAL + b"Sig: a\x00b\n",
        MINIMAL + b"References: b\n",
        MINIMAL + f"References: /nix/store/{B}-b\n".encode(),
        MINIMAL + b"Deriver: x.drv\n",
        MINIMAL + b"FileHash: \n",
        replaced("nar/x.nar", ""),
        replaced("nar/x.nar", "nar/\x1b[31m"),
        replaced("nar/x.nar", "../secret"),
        replaced("nar/x.nar", "nar/../../secret"),
        replaced(f"{A}-a", f"{A}-a/b"),
        replaced(str(NAR_HASH), str(Hash("sha1", bytes(20)))),
    ],
)
def test_what_nix_could_not_mean_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        parse_narinfo(data)


def test_a_huge_narinfo_is_refused() -> None:
    with pytest.raises(LimitError):
        parse_narinfo(MINIMAL + b"X: " + b"a" * MAX_SIZE + b"\n")
    with pytest.raises(LimitError):
        write_narinfo(dataclasses.replace(FULL, extra=(("X", "a" * MAX_SIZE),)))


@pytest.mark.parametrize(
    "change",
    [
        {"url": "x\nSig: forged"},
        {"url": ""},
        {"compression": "zstd\n"},
        {"signatures": ("a\n",)},
        {"ca": "\x7f"},
        {"deriver": "not a path"},
        {"nar_size": 0},
        {"nar_size": -1},
        {"file_size": 1 << 63},
        {"extra": (("NarSize", "1"),)},
        {"extra": (("Sig", "x"),)},
        {"extra": (("a:b", "x"),)},
        {"extra": (("", "x"),)},
        {"extra": (("X", "\udcff"),)},
    ],
)
def test_what_would_not_be_read_back_is_not_written(change: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        write_narinfo(dataclasses.replace(FULL, **change))  # type: ignore[arg-type]
