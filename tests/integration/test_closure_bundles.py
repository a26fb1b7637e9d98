"""Closure bundles end to end: real Nix takes no notice, and a cold start asks a handful of times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.callers import Caller
from tests.support.faulty_http import FaultyServer
from tests.support.nix import RealNix
from tests.support.published import SECRET, closure_path, closure_text, make_closure, publish_closure
from tests.support.sample import SampleStore
from veneer.formats.bundle import LISTING, NARINFO, parse_bundle

COUNT = 60
INFOS = make_closure(COUNT)
ROOT = INFOS[-1].store_path
HANDFUL = 5


@pytest.mark.nix
def test_nix_of_each_version_substitutes_what_has_a_bundle(
    as_root: Caller, nix_cache: SampleStore, each_nix: Callable[[], RealNix]
) -> None:
    as_root.use(f"file://{nix_cache.cache('xz')}", key=nix_cache.public)
    to, root = as_root.home / "published", nix_cache.paths["greet"]
    key: list[str | Path] = ["--key-file", nix_cache.stranger_secret]
    assert as_root.document("publish", "--to", to, *key, root)["bundles"] == [Path(root).name]
    part = nix_cache.hash_part("greet")
    entries = list(parse_bundle((to / f"{part}.bundle").read_bytes(), part))
    assert {e.hash_part for e in entries} == {file.stem for file in to.glob("*.narinfo")}
    store = each_nix()
    options = ["--option", "substituters", f"file://{to}", "--option", "substitute", "true"]
    options += ["--option", "trusted-public-keys", nix_cache.stranger_public]
    store.run("nix-store", *options, "-r", root)
    store.run("nix-store", "--verify", "--check-contents")


@pytest.mark.nix
def test_a_root_that_is_there_gains_a_bundle_and_a_dry_run_tells_so(
    as_root: Caller, nix_cache: SampleStore
) -> None:
    as_root.use(f"file://{nix_cache.cache('xz')}", key=nix_cache.public)
    to, root = as_root.home / "published", nix_cache.paths["greet"]
    closure = sorted(file.stem for file in nix_cache.cache("xz").glob("*.narinfo"))
    assert closure
    part = nix_cache.hash_part("greet")
    alone = as_root.veneer("publish", "--no-closure", "--to", to, root)
    assert alone.returncode == 0, alone.stderr
    before = (to / f"{part}.narinfo").read_bytes()
    assert b"Bundle" not in before and not (to / f"{part}.bundle").exists()
    assert as_root.document("publish", "--dry-run", "--to", to, root)["bundles"] == [
        {"path": Path(root).name, "objects": [f"{part}.bundle", f"{part}.narinfo"]}
    ]
    assert not (to / f"{part}.bundle").exists()
    assert as_root.document("publish", "--to", to, root)["bundles"] == [Path(root).name]
    assert (to / f"{part}.narinfo").read_bytes() == before + f"Bundle: {part}.bundle\n".encode()


@pytest.fixture
def published(as_root: Caller) -> Iterator[FaultyServer]:
    """The closure over HTTP, and nothing of it in the cache."""
    place = as_root.home / "published"
    publish_closure(place, INFOS)
    with FaultyServer(place) as server:
        as_root.use(server.url, key=str(SECRET.public_key()))
        yield server


@pytest.mark.root
def test_everything_about_a_closure_is_known_after_a_handful_of_requests(
    as_root: Caller, published: FaultyServer
) -> None:
    words = ["--metadata", "--closure", ROOT.absolute()]
    assert as_root.veneer("fetch", *words).returncode == 0
    assert published.count() <= HANDFUL, published.seen
    as_root.forget()
    (published.root / f"{ROOT.hash_part}.bundle").unlink()
    assert as_root.veneer("fetch", *words).returncode == 0
    assert published.count(f"*{NARINFO}") == COUNT + 1 and published.count(f"*{LISTING}") == COUNT


@pytest.mark.root
@pytest.mark.fuse
def test_a_cold_run_in_a_closure_asks_a_handful_of_times(as_root: Caller, published: FaultyServer) -> None:
    read = [ROOT, closure_path(0), closure_path(COUNT // 2 + 1)]
    done = as_root.veneer("run", "--", "cat", *(path.absolute() for path in read))
    assert done.stdout.encode() == b"".join(closure_text(int(p.hash_part)) for p in read), done.stderr
    assert published.count(f"/{ROOT.hash_part}.bundle") == 1
    assert published.count() <= HANDFUL + 3 * len(read), published.seen
