"""A small realistic store built by real Nix (``sample.nix``), and binary caches of it in every flavour."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tests.support.nix import RealNix

EXPRESSION = Path(__file__).with_name("sample.nix")


@dataclass
class SampleStore:
    """Attribute names of ``sample.nix`` (``several.dev`` for outputs) and the store paths that they became."""

    nix: RealNix
    paths: dict[str, str]
    """Attribute -> absolute store path."""
    secret: Path
    public: str
    """The key of caches that tests trust."""
    stranger_secret: Path
    stranger_public: str
    """The key of caches that nobody trusts."""
    _caches: dict[str, Path] = field(default_factory=dict)

    def basename(self, attribute: str) -> str:
        return self.paths[attribute].rsplit("/", 1)[1]

    def hash_part(self, attribute: str) -> str:
        return self.basename(attribute)[:32]

    def truth(self, attribute: str) -> Path:
        """The path as real Nix has it on disk. Its absolute links point to /nix/store, which is not there."""
        return self.nix.unpacked(self.paths[attribute])

    def closure(self, attribute: str) -> list[str]:
        """Absolute store paths, references first."""
        return self.nix.closure([self.paths[attribute]])

    def cache(self, compression: str = "zstd", *, listings: bool = True, signed: str = "trusted") -> Path:
        """The directory of a binary cache with every path. Made once per flavour; tests must not change it: copy it.

        ``compression``: none, xz, zstd or what else Nix can write. ``signed``: "trusted", "stranger" or "nobody".
        ``bytes-name`` has no listing in any flavour, because Nix cannot write it.
        """
        name = f"{compression}-{'listings' if listings else 'bare'}-{signed}"
        if name not in self._caches:
            place = self.nix.home / "caches" / name
            secret = {"trusted": self.secret, "stranger": self.stranger_secret, "nobody": None}[signed]
            options = f"compression={compression}" + (f"&secret-key={secret}" if secret else "")
            listable = [path for attribute, path in self.paths.items() if attribute != "bytes-name"]
            self.nix.copy(listable, f"file://{place}?{options}&write-nar-listing={str(listings).lower()}")
            self.nix.copy([self.paths["bytes-name"]], f"file://{place}?{options}")
            self._caches[name] = place
        return self._caches[name]


def build_sample(nix: RealNix) -> SampleStore:
    """Build the store (2 s) and make the keys."""
    paths = nix.build(EXPRESSION)
    secret, public = nix.make_key("trusted-1")
    stranger_secret, stranger_public = nix.make_key("stranger-1")
    return SampleStore(nix, paths, secret, public, stranger_secret, stranger_public)
