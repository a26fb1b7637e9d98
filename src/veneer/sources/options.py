"""A source as the user writes it: Nix's store URLs, and how patiently and with which secrets they are asked.

Source: the Nix manual, "Store URL format" and the pages of the HTTP, S3 and local binary cache stores.

    url    = scheme "://" [ user [ ":" password ] "@" ] place [ "?" key "=" value { "&" key "=" value } ]
           | path                                        a directory, as file://
         | "local" [ "?" keys ]                         a store directory, as Nix spells it; local:///x is local?root=/x
    scheme = http | https | file | s3 | gs | az

Everything is percent-decoded once. Known keys:

| key | meaning |
|---|---|
| priority | lower is asked first; replaces what the cache says about itself |
| trusted | true: believed without signatures |
| want-mass-query | kept, not used |
| bytes-per-second, requests-per-second | not faster than this; not for local |
| region, endpoint, scheme, profile | s3 only, as in Nix |
| root, real, state, store | local only, as in Nix: the root below which /nix is; the files; Nix's state; the store directory of the paths |

Nix's other keys (IGNORED_KEYS) matter for writing or for Nix's own caches and have no effect. Keys that nobody knows have
none either, and users are told, as by Nix. A near miss of a key with an effect is refused: ``trustd=true`` must not pass.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

from veneer.model.errors import UsageError, printable
from veneer.model.store_path import DEFAULT_STORE_DIR

SCHEMES = ("http", "https", "file", "s3", "gs", "az")
LOCAL_KEYS = ("root", "real", "state", "store")
KEYS = ("priority", "trusted", "want-mass-query")
RATE_KEYS = ("bytes-per-second", "requests-per-second")
S3_KEYS = ("region", "endpoint", "scheme", "profile")
IGNORED_KEYS = frozenset(
    (
        *("addressing-style", "buffer-size", "compression", "compression-level", "index-debug-info"),
        *("local-nar-cache", "log", "log-compression", "ls-compression", "multipart-chunk-size"),
        *("multipart-threshold", "multipart-upload", "narinfo-compression", "parallel-compression"),
        *(
            "path-info-cache-size",
            "read-only",
            "require-sigs",
            "secret-key",
            "secret-keys",
            "storage-class",
            "store",
            "system-features",
        ),
        "write-nar-listing",
    )
)
"""Of Nix's binary cache and local stores (2.8 to 2.34): nothing that is read depends on them."""
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")
_RATE = re.compile(r"[0-9]{1,15}(?:\.[0-9]{1,6})?")
LEAST_BYTES_PER_SECOND = 16 << 10
"""Slower than this a reader would give up before the next piece of content has come."""


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """What all sources of a view share. Times in seconds.

    A body has no time limit as a whole: it fails when nothing arrives for ``stall_seconds`` or when a chunk comes more
    slowly than ``least_rate`` bytes per second. ``tries`` are made per question, and per chunk of a NAR.
    """

    netrc: Path | None = None
    ca_file: Path | None = None
    """CA certificates trusted besides the system's; None: the file that NIX_SSL_CERT_FILE names."""
    store_dir: str = DEFAULT_STORE_DIR
    connect_seconds: float = 10.0
    stall_seconds: float = 30.0
    tries: int = 3
    backoff_seconds: float = 0.25
    """Before the second try; doubled before each further one, and varied by half so that clients spread out."""
    most_backoff_seconds: float = 30.0
    """Also the longest Retry-After that is honoured; a server that wants more counts as failed."""
    least_rate: int = 1024
    in_flight: int = 64
    """Narinfo requests at once."""


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """One source URL, taken apart. ``url`` is its identity; secrets are in no text that is shown."""

    url: str
    scheme: str
    address: str
    """Where requests go: for http(s) the URL without secrets and keys, for file the directory's path, for local the
    directory of the store's files, otherwise the bucket and prefix (``bucket/prefix``)."""
    priority: int | None = None
    trusted: bool = False
    want_mass_query: bool | None = None
    user: str | None = field(default=None, repr=False)
    password: str = field(default="", repr=False)
    s3: tuple[tuple[str, str], ...] = ()
    """Given S3 keys, sorted."""
    state_dir: str = ""
    """local: Nix's state directory."""
    store_dir: str = ""
    """local: the store directory that the URL says the paths are of; "" when it does not say."""
    own_store: bool = False
    """local: this machine's own store, and the URL does not say whether it is trusted."""
    bytes_per_second: int | None = None
    requests_per_second: float | None = None
    unknown: tuple[str, ...] = ()
    """Keys that have no effect and that Nix does not know either."""


def parse_source_url(text: str) -> SourceConfig:
    """A store URL or a directory's path. UsageError; its text holds no password."""
    if is_local(text):
        return _local(text)
    if "://" not in text:
        if re.match(r"[a-z0-9+.-]+:", text) or not text:
            raise _usage("not a store URL", text)
        text = "file://" + quote(str(Path(text).absolute()))
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise _usage("not a URL", text) from error
    if parts.scheme not in SCHEMES:
        raise _usage(
            f"sources of this kind are not supported: {parts.scheme}", text, f"known are {', '.join(SCHEMES)}"
        )
    if parts.fragment:
        raise _usage("a store URL has no #fragment", text)
    known, s3, unknown = _keys(parts.query, parts.scheme, text)
    path = parts.path.rstrip("/")
    if parts.scheme == "file":
        if parts.netloc:
            raise _usage("a file URL names no host", text, f"file:///{parts.netloc}{path}")
        address = unquote(path) or "/"
        url = "file://" + quote(address)
    elif not host:
        raise _usage("no host" if parts.scheme in ("http", "https") else "no bucket", text)
    elif parts.scheme in ("http", "https"):
        url = address = urlunsplit((parts.scheme, _authority(host, port), path, "", ""))
    else:
        place = parts.netloc.rpartition("@")[2]
        address = place + unquote(path)
        query = "&".join(f"{key}={quote(value, safe=':/')}" for key, value in s3)
        url = urlunsplit((parts.scheme, place, path, query, ""))
    return SourceConfig(
        url=printable(url),
        scheme=parts.scheme,
        address=address,
        priority=_integer(known.get("priority"), text),
        trusted=_boolean("trusted", known.get("trusted"), text) or False,
        want_mass_query=_boolean("want-mass-query", known.get("want-mass-query"), text),
        user=None if parts.username is None else unquote(parts.username),
        password=unquote(parts.password or ""),
        s3=s3,
        bytes_per_second=_bytes_per_second(known.get("bytes-per-second"), text),
        requests_per_second=_rate("requests-per-second", known.get("requests-per-second"), text),
        unknown=unknown,
    )


def is_local(text: str) -> bool:
    """Whether this is the URL of a store directory, well-formed or not."""
    return text == "local" or text.startswith(("local?", "local://"))


def without_secrets(text: str) -> str:
    """A URL without user, password, query and fragment: fit for messages, whatever it holds."""
    if is_local(text):
        return printable(text)[
            :500
        ]  # all that tells one from another is in its query, and no key of it is secret
    text = re.sub(r"[?#].*", "", text, flags=re.DOTALL)
    return printable(re.sub(r"(://)[^/]*@", r"\1", text))[:500]


def unknown_keys(url: str) -> tuple[str, ...]:
    """Keys of a store URL to tell the user about. What is wrong with the URL is said by whoever opens it."""
    try:
        return parse_source_url(url).unknown
    except UsageError:
        return ()


def _usage(what: str, url: str, hint: str = "") -> UsageError:
    return UsageError(what, where=without_secrets(url), hint=hint)


def _authority(host: str, port: int | None) -> str:
    host = f"[{host}]" if ":" in host else host
    return host if port is None else f"{host}:{port}"


def _keys(
    query: str, scheme: str, url: str
) -> tuple[dict[str, str], tuple[tuple[str, str], ...], tuple[str, ...]]:
    """(keys for every source, keys of the scheme, unknown keys)."""
    known: dict[str, str] = {}
    own: dict[str, str] = {}
    unknown: list[str] = []
    general = KEYS if scheme == "local" else KEYS + RATE_KEYS
    mine = general + {"s3": S3_KEYS, "local": LOCAL_KEYS}.get(scheme, ())
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key in general:
            known[key] = value
        elif key in mine:
            own[key] = value
        elif key in IGNORED_KEYS:
            continue
        elif near := _near(key, mine):
            raise _usage(f"unknown key in a store URL: {key[:100]!r}", url, f"did you mean {near[0]}?")
        else:
            unknown.append(printable(key)[:100])
    return known, tuple(sorted(own.items())), tuple(dict.fromkeys(unknown))


def _local(text: str) -> SourceConfig:
    place, _, query = text.partition("?")
    known, given, unknown = _keys(query, "local", text)
    keys = {key: _directory(key, value, text) for key, value in given}
    if path := unquote(place.removeprefix("local").removeprefix("://")):
        if "root" in keys:
            raise _usage("two roots in a store URL", text, "local?root=/DIR")
        keys["root"] = _directory("root", path, text)
    keys = {key: value for key, value in keys.items() if value}
    root = keys.get("root", "").rstrip("/")
    named = "&".join(f"{key}={quote(keys[key], safe=':/')}" for key in LOCAL_KEYS if key in keys)
    return SourceConfig(
        url=printable(f"local?{named}" if named else "local"),
        scheme="local",
        address=keys.get("real", f"{root}{DEFAULT_STORE_DIR}"),
        priority=_integer(known.get("priority"), text),
        trusted=_boolean("trusted", known.get("trusted"), text) or False,
        want_mass_query=_boolean("want-mass-query", known.get("want-mass-query"), text),
        unknown=unknown,
        state_dir=keys.get("state", f"{root}/nix/var/nix"),
        store_dir=keys.get("store", ""),
        own_store="trusted" not in known and not named,
    )


def _directory(key: str, path: str, url: str) -> str:
    """``path`` without a slash at its end; "" stays as it is: not given, as in Nix."""
    if path and (not path.startswith("/") or "\0" in path):
        raise _usage(f"{key} is not an absolute path: {path[:100]!r}", url)
    return path.rstrip("/") or path[:1]


def _near(key: str, known: tuple[str, ...]) -> list[str]:
    import difflib  # for the odd URL only

    return difflib.get_close_matches(key, known, 1, 0.8)


def _integer(text: str | None, url: str) -> int | None:
    if text is None:
        return None
    if _INTEGER.fullmatch(text) is None:
        raise _usage(f"priority is not a number: {text[:100]!r}", url)
    return int(text)


def _bytes_per_second(text: str | None, url: str) -> int | None:
    rate = _rate("bytes-per-second", text, url)
    if rate is not None and rate < LEAST_BYTES_PER_SECOND:
        raise _usage(f"bytes-per-second below {LEAST_BYTES_PER_SECOND}: {text}", url)
    return None if rate is None else int(rate)


def _rate(key: str, text: str | None, url: str) -> float | None:
    if text is None:
        return None
    if _RATE.fullmatch(text) is None or not float(text):
        raise _usage(f"{key} is not a positive number: {text[:100]!r}", url)
    return float(text)


def _boolean(key: str, text: str | None, url: str) -> bool | None:
    if text is None:
        return None
    value = _BOOLEANS.get(text)
    if value is None:
        raise _usage(f"{key} is neither true nor false: {text[:100]!r}", url)
    return value
