"""Who we are to a server: user and password of an HTTP source, keys of an S3 one.

Sources: netrc as curl and Nix read it (``netrc-file``); AWS's shared ``credentials`` and ``config`` files, whose profile
Nix's ``?profile=`` names. Secrets are asked for by host, leave only in headers to that host, and are in no message.
"""

from __future__ import annotations

import base64
import configparser
import netrc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from veneer.model.errors import UsageError

from .options import SourceConfig


class Logins:
    """HTTP logins: the source URL's own for its origin, the netrc file's by host name for every other server."""

    def __init__(self, config: SourceConfig, netrc_file: Path | None) -> None:
        """UsageError: the netrc file cannot be read. A file that is not there is an empty one, as for Nix."""
        self._origin = origin(config.address)
        self._own = None if config.user is None else _basic(config.user, config.password)
        self._netrc = None if netrc_file is None else _read_netrc(netrc_file)

    def authorization(self, url: str) -> str | None:
        """The Authorization header for ``url``."""
        if self._own is not None and origin(url) == self._origin:
            return self._own
        host = urlsplit(url).hostname
        entry = self._netrc.authenticators(host) if self._netrc is not None and host else None
        if entry is None:
            return None
        login, _, password = entry
        return _basic(login or "", password or "")


def origin(url: str) -> tuple[str, str, int]:
    """(scheme, host, port) of an http(s) URL: what a login is bound to."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


@dataclass(frozen=True, slots=True)
class AwsProfile:
    """What AWS's files say about one profile; "" for what they do not say."""

    key_id: str = ""
    secret: str = ""
    token: str = ""
    region: str = ""


def read_aws_profile(name: str, environ: Mapping[str, str]) -> AwsProfile:
    """Profile ``name`` out of ``~/.aws/credentials`` and ``~/.aws/config`` (or where AWS's variables say)."""
    home = Path(environ.get("HOME", "/")) / ".aws"
    secrets = _read_ini(Path(environ.get("AWS_SHARED_CREDENTIALS_FILE", home / "credentials")), name)
    settings = _read_ini(
        Path(environ.get("AWS_CONFIG_FILE", home / "config")),
        name if name == "default" else f"profile {name}",
    )
    merged = {**settings, **secrets}
    return AwsProfile(
        key_id=merged.get("aws_access_key_id", ""),
        secret=merged.get("aws_secret_access_key", ""),
        token=merged.get("aws_session_token", ""),
        region=settings.get("region", "") or secrets.get("region", ""),
    )


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode("ascii")


def _read_netrc(path: Path) -> netrc.netrc | None:
    try:
        return netrc.netrc(path)
    except FileNotFoundError:
        return None
    except netrc.NetrcParseError as error:
        raise UsageError(f"netrc file: {error.msg}, line {error.lineno}", where=str(path)) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UsageError(f"cannot read the netrc file: {reason}", where=str(path)) from error


def _read_ini(path: Path, section: str) -> Mapping[str, str]:
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    try:
        parser.read_string(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise UsageError(f"cannot read AWS's settings: {reason}", where=str(path)) from error
    return dict(parser[section]) if parser.has_section(section) else {}
