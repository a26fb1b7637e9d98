"""Views: which sources and keys a client uses. Several views share one daemon and one cache.

A path is served in a view only when one of the view's sources has it and the view's policy accepts its path info, even
if its bytes came into the cache through another view. Configuration arrives as JSON (HELLO of the request protocol).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec

from veneer.formats.signature import PublicKey
from veneer.model.errors import FormatError, UsageError
from veneer.model.store_path import DEFAULT_STORE_DIR
from veneer.sources.base import Source
from veneer.sources.chain import SourceChain

from .verify import TrustPolicy


class SourceSetting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One source as configured: a Nix store URL and how its bytes are verified."""

    url: str
    verify: Literal["strict", "deferred"] = "strict"


class ViewConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A view as a client sends it. ``session`` names the account its figures go to; it is not part of the identity."""

    sources: tuple[SourceSetting, ...] = ()
    keys: tuple[str, ...] = ()
    require_signatures: bool = True
    netrc: str | None = None
    ca_file: str | None = None
    negative_ttl: float = 10.0
    store_dir: str = DEFAULT_STORE_DIR
    session: str = ""

    @classmethod
    def from_json(cls, data: object) -> ViewConfig:
        """From decoded JSON. FormatError names the wrong field."""
        try:
            return msgspec.convert(data, cls)
        except msgspec.ValidationError as error:
            raise FormatError(str(error), where="view") from error

    def identity(self) -> str:
        """Equal for equal views, whatever their session."""
        plain = msgspec.structs.replace(self, session="")
        return hashlib.sha256(msgspec.json.encode(plain)).hexdigest()


@dataclass(frozen=True, slots=True)
class View:
    """A view at work. ``trusted`` and ``deferred`` hold source URLs."""

    identity: str
    chain: SourceChain
    policy: TrustPolicy
    trusted: frozenset[str]
    deferred: frozenset[str]
    negative_ttl: float
    store_dir: str

    async def close(self) -> None:
        await self.chain.close()


def open_view(
    config: ViewConfig,
    make_source: Callable[[str], tuple[Source, bool]],
    make_chain: Callable[[list[Source]], SourceChain],
) -> View:
    """Build a view. ``make_source`` gives a URL's source and whether the URL says ``trusted``."""
    keys = tuple(_key(text) for text in config.keys)
    sources: list[Source] = []
    trusted: set[str] = set()
    deferred: set[str] = set()
    for setting in config.sources:
        source, is_trusted = make_source(setting.url)
        sources.append(source)
        if is_trusted:
            trusted.add(source.url)
        if setting.verify == "deferred":
            deferred.add(source.url)
    return View(
        config.identity(),
        make_chain(sources),
        TrustPolicy(keys, config.require_signatures),
        frozenset(trusted),
        frozenset(deferred),
        config.negative_ttl,
        config.store_dir,
    )


def _key(text: str) -> PublicKey:
    try:
        return PublicKey.parse(text)
    except FormatError as error:
        raise UsageError(
            f"not a public key: {text!r}", hint="keys look like cache.example.org-1:BASE64"
        ) from error
