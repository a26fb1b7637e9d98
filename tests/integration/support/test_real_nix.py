"""The sample store of the tests is what it promises, and touches nothing of the machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.nginx import Nginx, nar_requests
from tests.support.nix import NixError, RealNix
from tests.support.sample import SampleStore
from tests.support.trees import differences

pytestmark = pytest.mark.nix


@pytest.mark.parametrize("compression", ["none", "xz", "zstd"])
def test_a_copied_cache_unpacks_to_the_same_tree(
    nix_cache: SampleStore, real_nix: RealNix, compression: str
) -> None:
    cache = nix_cache.cache(compression)
    wanted = [nix_cache.paths["everything"], nix_cache.paths["bytes-name"]]
    key = ["--option", "trusted-public-keys", nix_cache.public]
    real_nix.run("nix", "copy", "--from", f"file://{cache}", *key, *wanted)
    for attribute in ("shapes", "big", "many", "hello", "pointer", "bytes-name", "several.dev"):
        assert differences(nix_cache.truth(attribute), real_nix.unpacked(nix_cache.paths[attribute])) == []


def test_flavours_differ_in_listings_and_signatures(nix_cache: SampleStore) -> None:
    part = nix_cache.hash_part("shapes")
    assert (nix_cache.cache() / f"{part}.ls").exists()
    assert not (nix_cache.cache(listings=False) / f"{part}.ls").exists()
    assert not (nix_cache.cache() / f"{nix_cache.hash_part('bytes-name')}.ls").exists()
    signed = {
        who: (nix_cache.cache(signed=who) / f"{part}.narinfo").read_text()
        for who in ("trusted", "stranger", "nobody")
    }
    assert "Sig: trusted-1:" in signed["trusted"]
    assert "Sig: stranger-1:" in signed["stranger"]
    assert "Sig:" not in signed["nobody"]


def test_closure_has_references_first(nix_cache: SampleStore) -> None:
    closure = nix_cache.closure("greet")
    assert closure[-1] == nix_cache.paths["greet"]
    assert {nix_cache.paths[a] for a in ("bash", "libraries", "note")} < set(closure)


def test_real_nix_refuses_a_stranger_from_nginx_and_takes_a_trusted_key(
    nix_cache: SampleStore, make_real_nix: Callable[[str], RealNix], nginx: Callable[..., Nginx]
) -> None:
    path, key = nix_cache.paths["greet"], nix_cache.public
    with pytest.raises(NixError, match="lacks a signature by a trusted key"):
        server = nginx(nix_cache.cache(signed="stranger"))
        make_real_nix("refusing").run(
            "nix", "copy", "--from", server.url, "--option", "trusted-public-keys", key, path
        )
    server = nginx(nix_cache.cache())
    make_real_nix("taking").run(
        "nix", "copy", "--from", server.url, "--option", "trusted-public-keys", key, path
    )
    assert len(nar_requests(server.requests())) == len(nix_cache.closure("greet"))


def test_differences_are_seen(nix_cache: SampleStore, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(nix_cache.truth("shapes"), copy, symlinks=True)
    assert differences(nix_cache.truth("shapes"), copy) == []
    copy.chmod(0o755)
    (copy / "a").chmod(0o755)
    (copy / "a" / "1").unlink()
    (copy / "zero").chmod(0o755)
    (copy / "a-b").chmod(0o644)
    (copy / "a-b").write_text("ordered by Bytes")
    (copy / "dangling").unlink()
    (copy / "dangling").symlink_to("elsewhere")
    found = differences(nix_cache.truth("shapes"), copy)
    assert len(found) == 4, found
