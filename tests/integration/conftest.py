"""Fixtures of the end-to-end tests: who calls veneer, and what real Nix unpacks."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.callers import Caller
from tests.support.debian import DebianError
from tests.support.nix import VERSIONS, RealNix, fetch_nix
from tests.support.places import NoPlaceError
from tests.support.probe import Row, census
from tests.support.sample import SampleStore


@pytest.fixture
def as_root(open_directory: Path) -> Iterator[Caller]:
    home = open_directory / f"root-{secrets.token_hex(4)}"
    home.mkdir()
    caller = Caller.root(home)
    yield caller
    caller.wait_for_daemons_end()
    assert caller.lost_errors() == []


@pytest.fixture
def unprivileged(request: pytest.FixtureRequest) -> Iterator[Caller]:
    caller = Caller.user(request.getfixturevalue("as_user"))
    yield caller
    caller.wait_for_daemons_end()
    assert caller.lost_errors() == []


@pytest.fixture(params=["root", "user"])
def caller(request: pytest.FixtureRequest) -> Caller:
    """Root, then an ordinary user."""
    caller = request.getfixturevalue("as_root" if request.param == "root" else "unprivileged")
    assert isinstance(caller, Caller)
    return caller


@pytest.fixture(scope="session")
def unpacked(nix_cache: SampleStore) -> dict[str, dict[str, Row]]:
    """Absolute store path -> census of what ``nix copy`` makes of it, for every path of the sample."""
    place = nix_cache.nix.home / "unpacked"
    roots = list(nix_cache.paths.values())
    cache = nix_cache.cache("xz")
    words = ["copy", "--no-check-sigs", "--from", f"file://{cache}", "--to", f"local?root={place}", *roots]
    nix_cache.nix.run("nix", *words)
    return {path: census(f"{place}{path}") for path in roots}


@pytest.fixture(scope="module", params=list(VERSIONS), ids=list(VERSIONS.values()))
def each_nix(request: pytest.FixtureRequest, open_directory: Path) -> Callable[[], RealNix]:
    """Makes Nix of each version with an empty store."""
    try:
        programs = fetch_nix(request.param)
    except (DebianError, NoPlaceError) as error:
        pytest.skip(f"Nix of {request.param} cannot be fetched: {error}")

    def make() -> RealNix:
        nix = RealNix(programs, open_directory / f"nix-{secrets.token_hex(4)}")
        if request.param == "bookworm":  # its build hook is a program of its own
            (nix.home / "build-remote").symlink_to(programs / "nix")
            nix.environment["NIX_CONFIG"] = f"build-hook = {nix.home}/build-remote"
        return nix

    return make
