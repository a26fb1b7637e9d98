"""Settings: flags, then the configuration file, then the user's nix.conf, then defaults; and the view made of them.

Each setting is looked for on its own: a configuration file without sources still takes them from nix.conf. ``--cache``
replaces all configured sources, ``--trusted-public-key`` all configured keys; with both given nix.conf is not read.
What nix.conf does not set has Nix's own default, as for Nix.

The file is TOML (``~/.config/veneer/config.toml``, for root ``/etc/veneer/config.toml``); KEYS and SOURCE_KEYS below are
its grammar, and the reference page is made from them. Unknown keys are refused, because a misspelt one would be silent.
"""

from __future__ import annotations

import binascii
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from veneer.cli.limits import parse_limits
from veneer.cli.output import parse_size
from veneer.model.errors import UsageError, printable

if TYPE_CHECKING:
    from veneer.formats.nix_conf import NixSettings

SCHEMES = ("http", "https", "file", "s3", "gs", "az")
NIX_SPECIAL = ("auto", "daemon", "local", "dummy")
"""Store names that nix.conf may hold and that are no substituters of ours."""
Verify = Literal["strict", "deferred"]


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the configuration file. ``kind``: the TOML type, in words."""

    name: str
    kind: str
    types: tuple[type, ...]
    default: str
    purpose: str


KEYS = (
    Key("cache-dir", "string", (str,), "as --cache-dir", "Directory that keeps fetched content."),
    Key(
        "environments-dir", "string", (str,), "below the state directory", "Directory of named environments."
    ),
    Key("max-size", "string or integer", (str, int), "no limit", "Size limit of the cache, such as `20G`."),
    Key(
        "trusted-public-keys",
        "array of strings",
        (list,),
        "nix.conf",
        "Keys (`name:base64`) whose signatures count.",
    ),
    Key("require-signatures", "boolean", (bool,), "true", "Refuse paths that no trusted key signed."),
    Key("netrc-file", "string", (str,), "nix.conf", "Credentials for HTTP sources."),
    Key("ssl-cert-file", "string", (str,), "nix.conf", "CA certificates; NIX_SSL_CERT_FILE goes first."),
    Key("negative-ttl", "number", (int, float), "10", "Seconds for which `no source has it` is believed."),
    Key("limits", "table", (dict,), "", "What bounds daemons and mounts that are started now; below."),
    Key("source", "array of tables", (list,), "nix.conf", "The sources, in order of preference."),
)
SOURCE_KEYS = (
    Key(
        "url",
        "string",
        (str,),
        "required",
        "A Nix store URL: http, https, file, s3, gs, az, local, or a directory with a binary cache.",
    ),
    Key("priority", "integer", (int,), "the cache's own", "Lower is asked first."),
    Key("trusted", "boolean", (bool,), "false", "Believe this source without signatures."),
    Key(
        "verify", "string", (str,), "strict", "`strict`, or `deferred` to serve bytes while they are checked."
    ),
    Key(
        "bytes-per-second",
        "string or integer",
        (str, int),
        "no limit",
        "Not faster than this, such as `2M`; at least 16K. Not for local.",
    ),
    Key(
        "requests-per-second",
        "number",
        (int, float),
        "no limit",
        "Not more questions than this. Not for local.",
    ),
)


@dataclass(frozen=True, slots=True)
class SourceSetting:
    """One source: an absolute store URL and how its bytes are verified."""

    url: str
    verify: Verify = "strict"


@dataclass(frozen=True, slots=True)
class Settings:
    """All that a command needs to know. ``max_bytes`` concerns only a daemon that is started now."""

    cache_dir: Path
    environments_dir: Path
    sources: tuple[SourceSetting, ...]
    keys: tuple[str, ...]
    require_signatures: bool = True
    netrc: str | None = None
    ca_file: str | None = None
    negative_ttl: float = 10.0
    max_bytes: int | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    """Of the ``[limits]`` table, those that were given, by name; for a daemon or a mount that is started now."""
    borrowed: bool = False
    """The cache directory is another user's, and nobody named sources or keys: its daemon's own view is used."""

    def view(self, session: str = "") -> dict[str, object]:
        """The view for the daemon (HELLO of the request protocol). ``session``: whose account the figures go to."""
        if self.borrowed:
            return {"session": session}
        return {
            "sources": [{"url": s.url, "verify": s.verify} for s in self.sources],
            "keys": list(self.keys),
            "require_signatures": self.require_signatures,
            "netrc": self.netrc,
            "ca_file": self.ca_file,
            "negative_ttl": self.negative_ttl,
            "session": session,
        }


@dataclass(frozen=True, slots=True)
class Flags:
    """What the command line said; None or empty where it said nothing."""

    cache_dir: str | None = None
    caches: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    verify: str | None = None
    config_file: str | None = None
    max_size: str | None = None
    warn: Callable[[str], None] = field(default=lambda _: None, compare=False)
    """Takes a sentence about what has no effect."""


def load_settings(flags: Flags, environ: Mapping[str, str] | None = None, uid: int | None = None) -> Settings:
    """The settings of this call. UsageError names the file and key at fault."""
    environ = os.environ if environ is None else environ
    uid = os.geteuid() if uid is None else uid
    document = read_file(flags.config_file, environ, uid)
    verify: Verify = "deferred" if flags.verify == "deferred" else "strict"

    configured = document.get("source")
    keys = flags.keys or _strings(document, "trusted-public-keys")
    nix = None if (flags.caches or configured) and keys is not None else nix_settings(environ)
    if flags.caches:
        sources = tuple(SourceSetting(source_url(url), verify) for url in flags.caches)
    elif isinstance(configured, list):
        sources = tuple(_configured_source(row, flags.verify) for row in configured)
    else:
        assert nix is not None
        sources = tuple(SourceSetting(source_url(u), verify) for u in nix.substituters if is_binary_cache(u))
    if keys is None:
        assert nix is not None
        keys = nix.trusted_public_keys
    for key in keys:
        _check_key(key)
    _warn_of_unknown_keys(sources, flags.warn)
    require = document.get("require-signatures", nix.require_sigs if nix is not None else True)
    ttl = document.get("negative-ttl", 10.0)
    limit = flags.max_size if flags.max_size is not None else document.get("max-size")
    cache_dir = _directory(flags.cache_dir or document.get("cache-dir"), default_cache_dir(environ, uid))
    return Settings(
        cache_dir=cache_dir,
        environments_dir=_directory(document.get("environments-dir"), default_environments_dir(environ, uid)),
        sources=sources,
        keys=keys,
        require_signatures=bool(require),
        netrc=_text(document, "netrc-file") or _netrc(environ, nix),
        ca_file=environ.get("NIX_SSL_CERT_FILE")
        or _text(document, "ssl-cert-file")
        or (nix.ssl_cert_file if nix is not None else None)
        or environ.get("SSL_CERT_FILE"),
        negative_ttl=float(ttl) if isinstance(ttl, int | float) else 10.0,
        max_bytes=parse_size(str(limit)) if limit is not None else None,
        limits=parse_limits(document.get("limits", {}), "limits"),
        borrowed=not flags.caches and not flags.keys and _is_of_another(cache_dir, uid),
    )


def default_cache_dir(environ: Mapping[str, str], uid: int) -> Path:
    return Path("/var/cache/veneer") if uid == 0 else _xdg(environ, "XDG_CACHE_HOME", ".cache") / "veneer"


def default_environments_dir(environ: Mapping[str, str], uid: int) -> Path:
    if uid == 0:
        return Path("/var/lib/veneer/environments")
    return _xdg(environ, "XDG_STATE_HOME", ".local/state") / "veneer" / "environments"


def default_config_file(environ: Mapping[str, str], uid: int) -> Path:
    if uid == 0:
        return Path("/etc/veneer/config.toml")
    return _xdg(environ, "XDG_CONFIG_HOME", ".config") / "veneer" / "config.toml"


def read_file(name: str | None, environ: Mapping[str, str], uid: int) -> dict[str, object]:
    """The checked configuration file; {} when there is none and none was named."""
    path = Path(name) if name else default_config_file(environ, uid)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if name:
            raise UsageError("no such configuration file", where=str(path)) from None
        return {}
    except OSError as error:
        raise UsageError(f"cannot read the configuration: {error.strerror}", where=str(path)) from error
    return parse_file(data, str(path))


def parse_file(data: bytes, where: str) -> dict[str, object]:
    """``data`` as checked TOML: known keys of the right types. UsageError otherwise."""
    import tomllib

    try:
        document = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"not TOML: {error}", where=where) from error
    _check(document, KEYS, where)
    parse_limits(document.get("limits", {}), f"{where}, limits")
    for row in document.get("source", []):
        if not isinstance(row, dict):
            raise UsageError(
                "source must be tables", where=where, hint='write [[source]] and below it url = "…"'
            )
        _check(row, SOURCE_KEYS, f"{where}, source")
        if "url" not in row:
            raise UsageError("a source without url", where=where, hint='url = "https://cache.example.org"')
        if row.get("verify", "strict") not in ("strict", "deferred"):
            raise UsageError(f"verify must be strict or deferred, not {row['verify']!r}", where=where)
    for text in document.get("trusted-public-keys", []):
        if not isinstance(text, str):
            raise UsageError("trusted-public-keys must be strings", where=where)
    return document


def _is_of_another(directory: Path, uid: int) -> bool:
    """Whether a user other than us (and we are not root) owns the directory."""
    try:
        return uid not in (0, directory.stat().st_uid)
    except OSError:
        return False  # whoever opens it will say why not


def _check_key(text: str) -> None:
    """UsageError unless ``text`` is "name:base64 of 32 bytes"; without the cryptography that would use it."""
    name, _, encoded = text.partition(":")
    try:
        size = len(binascii.a2b_base64(encoded, strict_mode=True)) if encoded else 0
    except ValueError:
        size = 0
    if not name or size != 32:
        raise UsageError(
            f"not a public key: {printable(text)!r}", hint="keys look like cache.example.org-1:BASE64"
        )


def _check(table: Mapping[str, object], keys: Sequence[Key], where: str) -> None:
    known = {key.name: key for key in keys}
    for name, value in table.items():
        key = known.get(name)
        if key is None:
            import difflib

            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise UsageError(f"unknown key {printable(name)!r}", where=where, hint=hint)
        # TOML's booleans are Python's, and bool is an int.
        if not isinstance(value, key.types) or (isinstance(value, bool) and bool not in key.types):
            raise UsageError(f"{name} must be {key.kind}", where=where)


def source_url(text: str) -> str:
    """A store URL that means the same in any directory. UsageError for what is neither a binary cache nor a store."""
    if text == "local" or text.startswith(("local?", "local://")):
        return text
    if "://" not in text:
        if text in NIX_SPECIAL:
            raise UsageError(f"{text} is no binary cache", hint=_CACHE_HINT)
        from urllib.parse import quote

        path, mark, query = text.partition("?")
        return "file://" + quote(str(Path(path).resolve())) + mark + query
    scheme = text.partition("://")[0]
    if scheme not in SCHEMES:
        raise UsageError(
            f"no binary cache can be reached by {printable(scheme)}://", where=text, hint=_CACHE_HINT
        )
    return text


def _warn_of_unknown_keys(sources: Sequence[SourceSetting], warn: Callable[[str], None]) -> None:
    for url in dict.fromkeys(source.url for source in sources if "?" in source.url):
        from veneer.sources.options import unknown_keys, without_secrets

        for key in unknown_keys(url):
            warn(f"unknown option '{key}' of {without_secrets(url)} is ignored")


_CACHE_HINT = (
    f"a cache is a directory or a URL with one of {', '.join(SCHEMES)}; a store is local or local?root=DIR"
)


def is_binary_cache(text: str) -> bool:
    """Whether a substituter of nix.conf is one that we can ask; others (ssh, daemons) are left to Nix."""
    return text not in NIX_SPECIAL and ("://" not in text or text.partition("://")[0] in SCHEMES)


def _configured_source(row: object, verify_flag: str | None) -> SourceSetting:
    assert isinstance(row, dict)
    url = source_url(row["url"])
    values = {name: row.get(name) for name in ("priority", "trusted", "requests-per-second")}
    if (rate := row.get("bytes-per-second")) is not None:
        values["bytes-per-second"] = parse_size(str(rate))
    for name, value in values.items():
        if value is not None:
            url += f"{'&' if '?' in url else '?'}{name}={str(value).lower()}"
    return SourceSetting(url, "deferred" if (verify_flag or row.get("verify")) == "deferred" else "strict")


def nix_conf_files(environ: Mapping[str, str]) -> list[Path]:
    """Nix's configuration files in the order in which they are applied: later ones win."""
    system = Path(environ.get("NIX_CONF_DIR") or "/etc/nix") / "nix.conf"
    named = environ.get("NIX_USER_CONF_FILES")
    if named:
        users = [Path(name) for name in named.split(":") if name]
    else:
        directories = (environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":")
        users = [_xdg(environ, "XDG_CONFIG_HOME", ".config") / "nix" / "nix.conf"]
        users += [Path(directory) / "nix" / "nix.conf" for directory in directories if directory]
    return [system, *reversed(users)]


def nix_settings(environ: Mapping[str, str]) -> NixSettings:
    """The user's Nix settings, typed."""
    from veneer.formats.nix_conf import settings

    return settings(nix_values(environ))


def nix_values(environ: Mapping[str, str]) -> dict[str, str]:
    """The user's Nix settings: files, then NIX_CONFIG. Files that cannot be read count as absent, as for Nix."""
    from veneer.formats.nix_conf import parse_nix_conf

    def text_of(name: str) -> str | None:
        try:
            return Path(name).read_text("utf-8", "surrogateescape")
        except OSError:
            return None

    values: dict[str, str] = {}
    for path in nix_conf_files(environ):
        text = text_of(str(path))
        if text is not None:
            values = parse_nix_conf(text, path=str(path), include=text_of, base=values)
    if environ.get("NIX_CONFIG"):
        values = parse_nix_conf(environ["NIX_CONFIG"], path="NIX_CONFIG", include=text_of, base=values)
    if "netrc-file" not in values and environ.get("NIX_CONF_DIR"):
        values["netrc-file"] = str(Path(environ["NIX_CONF_DIR"]) / "netrc")
    return values


def _netrc(environ: Mapping[str, str], nix: NixSettings | None) -> str | None:
    """Nix's netrc file, if it is there: Nix takes a missing one for an empty one."""
    default = Path(environ.get("NIX_CONF_DIR") or "/etc/nix") / "netrc"
    name = nix.netrc_file if nix is not None else str(default)
    return name if os.access(name, os.R_OK) else None


def _xdg(environ: Mapping[str, str], variable: str, default: str) -> Path:
    value = environ.get(variable, "")
    if value.startswith("/"):
        return Path(value)
    home = environ.get("HOME")
    return (Path(home) if home else Path.home()) / default


def _directory(value: object, default: Path) -> Path:
    return Path(value).expanduser().absolute() if isinstance(value, str) else default


def _text(document: Mapping[str, object], name: str) -> str | None:
    value = document.get(name)
    return value if isinstance(value, str) else None


def _strings(document: Mapping[str, object], name: str) -> tuple[str, ...] | None:
    value = document.get(name)
    return tuple(str(text) for text in value) if isinstance(value, list) else None
