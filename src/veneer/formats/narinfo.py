"""narinfo: what a binary cache says about one store path.

Source: ``nix copy`` of Nix 2.8, 2.26 and 2.34 (tests/golden), the Nix manual ("Serving a Nix store via HTTP").

    file = { line LF }          UTF-8, every line ended (a cut answer is thus seen)
    line = key ":" [ " " ] value

| key | value |
|---|---|
| StorePath | absolute store path, required; its directory must be the ``store_dir`` we ask for |
| URL | where the compressed NAR lies: relative to the cache's root, or absolute; required |
| Compression | none, xz, zstd, ...; absent or empty means bzip2 |
| FileHash, FileSize | of the compressed NAR; optional, size 0 means unknown |
| NarHash, NarSize | of the NAR itself; required; SHA-256 only; 1 to 2^63-1 bytes |
| References | base names of store paths separated by spaces, itself included where it refers to itself; absent means none |
| Deriver | base name of a derivation; ``unknown-deriver`` means unknown |
| Sig | "key name:base64" of ``formats.signature``; any number |
| CA | content address, kept as text |
| others | kept in ``extra`` in their order, as Nix ignores them (older Nix wrote System) |

Limits, enforced here: 1 MiB; sizes as above; no control characters; every key but Sig and unknown ones at most once
(Nix lets most of them repeat and takes the last: two readers could then disagree about what was signed).
Not enforced here: whether the compression is one we know (``sources.compression``) and whether a signature is valid
(``store.verify``). URL may not climb with "..": a narinfo must not choose files outside its cache.

In the wild: no space after the colon with an empty value; hexadecimal hashes; FileHash and FileSize missing; URLs with
a query. Missing final newlines, CRLF and blank lines are refused, as Nix does.
"""

from __future__ import annotations

import re

from veneer.model.errors import FormatError, LimitError
from veneer.model.hashes import Hash
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import DEFAULT_STORE_DIR, StorePath

MAX_SIZE = 1 << 20
MAX_NAR_SIZE = (1 << 63) - 1
DEFAULT_COMPRESSION = "bzip2"
UNKNOWN_DERIVER = "unknown-deriver"

_WHERE = "narinfo"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_CONTROL_IN_LINES = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_SIZE = re.compile(r"[0-9]{1,19}")
_SINGLE = frozenset(
    (
        "StorePath",
        "URL",
        "Compression",
        "FileHash",
        "FileSize",
        "NarHash",
        "NarSize",
        "References",
        "Deriver",
        "CA",
    )
)


def parse_narinfo(data: bytes, *, store_dir: str = DEFAULT_STORE_DIR) -> UnverifiedPathInfo:
    """The narinfo in ``data``, of a path in ``store_dir``. FormatError, LimitError."""
    if len(data) > MAX_SIZE:
        raise LimitError(f"{len(data)} bytes, limit {MAX_SIZE}", where=_WHERE)
    fields, signatures, extra = _fields(data)
    try:
        path, url = fields["StorePath"], fields["URL"]
        nar_hash, nar_size = fields["NarHash"], fields["NarSize"]
    except KeyError as error:
        raise FormatError(f"no {error.args[0]}", where=_WHERE) from error
    file_hash, file_size = fields.get("FileHash"), fields.get("FileSize")
    return UnverifiedPathInfo(
        store_path=StorePath.parse_absolute(path, store_dir),
        url=_url(url),
        compression=fields.get("Compression") or DEFAULT_COMPRESSION,
        nar_hash=_nar_hash(Hash.parse(nar_hash)),
        nar_size=_nar_size(_size("NarSize", nar_size)),
        references=tuple(StorePath.parse(name) for name in fields.get("References", "").split(" ") if name),
        file_hash=None if file_hash is None else Hash.parse(file_hash),
        file_size=None if file_size is None else _size("FileSize", file_size) or None,
        deriver=_deriver(fields.get("Deriver", "")),
        signatures=tuple(signatures),
        ca=fields.get("CA", ""),
        store_dir=store_dir,
        extra=tuple(extra),
    )


def write_narinfo(info: UnverifiedPathInfo) -> bytes:
    """The file as Nix writes it, unknown keys last. FormatError for a value that would not be read back as given."""
    lines = [
        ("StorePath", info.store_path.absolute(info.store_dir)),
        ("URL", _url(info.url)),
        ("Compression", info.compression or DEFAULT_COMPRESSION),
    ]
    if info.file_hash is not None:
        lines.append(("FileHash", info.file_hash.nix32))
    if info.file_size:
        lines.append(("FileSize", str(_in_range("FileSize", info.file_size))))
    lines += [
        ("NarHash", _nar_hash(info.nar_hash).nix32),
        ("NarSize", str(_nar_size(info.nar_size))),
        ("References", " ".join(path.basename for path in info.references)),
    ]
    if info.deriver:
        lines.append(("Deriver", _deriver(info.deriver)))
    lines += [("Sig", text) for text in info.signatures]
    if info.ca:
        lines.append(("CA", info.ca))
    for key, value in info.extra:
        if not key or ":" in key or key in _SINGLE or key == "Sig":
            raise FormatError(f"not an unknown key: {key[:100]!r}", where=_WHERE)
        lines.append((key, value))
    for key, value in lines:
        if _CONTROL.search(key) or _CONTROL.search(value):
            raise FormatError(f"control character in {key[:100]!r}", where=_WHERE)
    try:
        data = "".join(f"{key}: {value}\n" for key, value in lines).encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError("a value is not Unicode text", where=_WHERE) from error
    if len(data) > MAX_SIZE:
        raise LimitError(f"{len(data)} bytes, limit {MAX_SIZE}", where=_WHERE)
    return data


def _fields(data: bytes) -> tuple[dict[str, str], list[str], list[tuple[str, str]]]:
    """(single fields, signatures, unknown fields)."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("not UTF-8", where=_WHERE) from error
    if not text.endswith("\n"):
        raise FormatError("last line not ended: empty or cut short", where=_WHERE)
    control = _CONTROL_IN_LINES.search(text)
    if control is not None:
        before, line = text[: control.start()], text[: control.end()].rpartition("\n")[2]
        raise FormatError(
            f"control character: {line[-100:]!r}", where=f"{_WHERE} line {before.count(chr(10)) + 1}"
        )
    fields: dict[str, str] = {}
    signatures: list[str] = []
    extra: list[tuple[str, str]] = []
    for number, line in enumerate(text[:-1].split("\n"), 1):
        key, colon, value = line.partition(":")
        if not colon or not key:
            raise FormatError(f"no key: {line[:100]!r}", where=f"{_WHERE} line {number}")
        value = value.removeprefix(" ")
        if key == "Sig":
            signatures.append(value)
        elif key not in _SINGLE:
            extra.append((key, value))
        elif key in fields:
            raise FormatError(f"second {key}", where=f"{_WHERE} line {number}")
        else:
            fields[key] = value
    return fields, signatures, extra


def _size(key: str, text: str) -> int:
    if _SIZE.fullmatch(text) is None:
        raise FormatError(f"{key} is not a size: {text[:100]!r}", where=_WHERE)
    return _in_range(key, int(text))


def _in_range(key: str, size: int) -> int:
    if not 0 <= size <= MAX_NAR_SIZE:
        raise LimitError(f"{key} {size}, limit {MAX_NAR_SIZE}", where=_WHERE)
    return size


def _nar_size(size: int) -> int:
    if size == 0:
        raise FormatError("NarSize is 0", where=_WHERE)
    return _in_range("NarSize", size)


def _nar_hash(value: Hash) -> Hash:
    if value.algorithm != "sha256":
        raise FormatError(f"NarHash is {value.algorithm}, not sha256", where=_WHERE)
    return value


def _url(text: str) -> str:
    path = text.partition("?")[0]
    if not text or ".." in path.split("/"):
        raise FormatError(f"not a NAR's URL: {text[:200]!r}", where=_WHERE)
    return text


def _deriver(text: str) -> str:
    if text in ("", UNKNOWN_DERIVER):
        return ""
    return StorePath.parse(text).basename
