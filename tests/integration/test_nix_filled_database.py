"""Real Nix of each version on a store whose files and database it has not made itself."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.support.callers import Caller, eventually
from tests.support.nix import NixError, RealNix, missing_for_builds
from tests.support.sample import EXPRESSION, SampleStore
from tests.support.small_disk import small_disk
from veneer.environment.nix.database import Registration, fill, registration
from veneer.environment.nix.version import NixVersion, detect
from veneer.formats.narinfo import parse_narinfo
from veneer.model.errors import VeneerError
from veneer.model.path_info import PathInfo

pytestmark = pytest.mark.nix

ON_TOP = """
derivation {
  name = "top";
  system = builtins.currentSystem;
  builder = "/bin/sh";
  PATH = "/usr/bin:/bin";
  args = [ "-euc" "cat ${builtins.storePath "%s"}/bin/greet > $out; echo ${builtins.storePath "%s"} >> $out" ];
}
"""
AFTER_DERIVATION = """
derivation {
  name = "after";
  system = builtins.currentSystem;
  builder = "/bin/sh";
  PATH = "/usr/bin:/bin";
  args = [ "-euc" "cat ${(import %s).several.dev}/include/path.h > $out" ];
}
"""


@dataclass(frozen=True)
class Known:
    """What a cache says: a row of every path of the sample, with the closure of one derivation."""

    rows: list[Registration]
    derivation: str
    cache: Path
    sample: SampleStore


@pytest.fixture(scope="module")
def known(nix_cache: SampleStore) -> Known:
    nix = nix_cache.nix
    derivation = nix.run("nix-instantiate", EXPRESSION, "-A", "several").split()[0].partition("!")[0]
    cache = nix.home / "with-derivations"
    nix.copy(list(nix_cache.paths.values()), f"file://{cache}?secret-key={nix_cache.secret}")
    nix.copy([derivation], f"file://{cache}?secret-key={nix_cache.secret}")
    rows = []
    for file in cache.glob("*.narinfo"):
        info = parse_narinfo(file.read_bytes())
        absolute = info.store_path.absolute()
        text = nix.unpacked(absolute).read_bytes() if absolute.endswith(".drv") else None
        rows.append(registration(PathInfo(info, ("trusted-1",)), text))
    return Known(rows, derivation, cache, nix_cache)


@pytest.fixture
def filled(each_nix: Callable[[], RealNix], known: Known) -> RealNix:
    """Copies of the sample's files, and a database that we made."""
    nix = each_nix()
    copy_files(known, nix)
    assert fill(state(nix), reversed(known.rows), now=int(time.time())) == len(known.rows)
    return nix


def state(nix: RealNix) -> Path:
    return nix.store / "nix" / "var" / "nix"


def copy_files(known: Known, nix: RealNix) -> None:
    place = nix.store / "nix" / "store"
    place.mkdir(parents=True)
    files = [known.sample.nix.unpacked(row.path.absolute()) for row in known.rows]
    subprocess.run(["cp", "-a", *files, place], check=True)


def on_top(nix: RealNix, known: Known) -> Path:
    file = nix.home / "top.nix"
    file.write_text(ON_TOP % (known.sample.paths["greet"], known.sample.paths["selfish"]))
    return file


def builds_or_skip() -> None:
    reason = missing_for_builds()
    if reason:
        pytest.skip(reason)


def schema(file: Path) -> set[tuple[str, str, str]]:
    """(kind, name, SQL without comments and spaces)."""
    with contextlib.closing(sqlite3.connect(file)) as db:
        found = db.execute(
            "select type, name, sql from sqlite_master where name not like 'sqlite_%'"
        ).fetchall()
    plain = {
        (kind, name, "".join(line.partition("--")[0] for line in sql.splitlines()))
        for kind, name, sql in found
    }
    return {(kind, name, "".join(sql.lower().split())) for kind, name, sql in plain}


def test_the_version_is_detected(each_nix: Callable[[], RealNix]) -> None:
    nix = each_nix()
    version = detect(None, nix.environment, 60)
    assert version is not None
    assert version.family == "Nix"
    assert detect(str(nix.programs / "nix-store"), nix.environment, 60) == version
    assert version.has_local_overlay is (version.numbers > NixVersion.parse("nix (Nix) 2.21.9").numbers)


def test_the_schema_is_nixs_own(each_nix: Callable[[], RealNix], tmp_path: Path) -> None:
    nix = each_nix()
    nix.run("nix-store", "--verify")
    fill(tmp_path, [], now=1)
    theirs = schema(state(nix) / "db" / "db.sqlite")
    ours = schema(tmp_path / "db" / "db.sqlite")
    if "2.8." in nix.run("nix-store", "--version"):
        assert ours == theirs
    assert {entry for entry in ours if entry[0] != "index"} <= theirs, "newer Nix may choose its indices"
    assert {name for _, name, _ in theirs - ours} <= {"SchemaMigrations"}
    assert (tmp_path / "db" / "schema").read_text() == (state(nix) / "db" / "schema").read_text()


def test_filled_paths_are_valid_with_all_that_is_known_of_them(filled: RealNix, known: Known) -> None:
    sample = known.sample
    paths = [row.path.absolute() for row in known.rows]
    filled.run("nix-store", "--check-validity", *paths)
    assert filled.closure([sample.paths["everything"]]) == sample.closure("everything")
    several = sample.paths["several"]
    assert filled.run("nix-store", "-q", "--deriver", several).strip() == known.derivation
    assert (
        filled.run("nix-store", "-q", "--outputs", known.derivation).split()
        == sample.nix.run("nix-store", "-q", "--outputs", known.derivation).split()
    )
    for question in ("--references", "--referrers", "--hash", "--size"):
        asked = ["nix-store", "-q", question, sample.paths["selfish"]]
        assert sorted(filled.run(*asked).split()) == sorted(sample.nix.run(*asked).split()), question


def test_verify_finds_nothing_wrong(filled: RealNix, known: Known) -> None:
    filled.run("nix-store", "--verify", "--check-contents")
    assert fill(state(filled), known.rows, now=1) == 0


def test_signatures_count(filled: RealNix, known: Known) -> None:
    verify = ["store", "verify", "--recursive", known.sample.paths["everything"]]
    filled.run("nix", *verify, "--option", "trusted-public-keys", known.sample.public)
    with pytest.raises(NixError):
        filled.run("nix", *verify, "--option", "trusted-public-keys", known.sample.stranger_public)


def test_a_derivation_is_built_on_filled_paths(filled: RealNix, known: Known) -> None:
    builds_or_skip()
    out = filled.run("nix-build", on_top(filled, known), "--no-out-link").strip()
    assert filled.unpacked(out).read_text().endswith(f"{known.sample.paths['selfish']}\n")
    assert known.sample.paths["bash"] in filled.closure([out]), "references of filled paths are followed"


def test_a_derivation_whose_outputs_are_filled_is_not_built(filled: RealNix, known: Known) -> None:
    assert known.sample.paths["several"] in filled.run("nix-store", "-r", known.derivation).split()
    dry = filled.run("nix-build", EXPRESSION, "-A", "several", "--no-out-link", "--max-jobs", "0")
    assert dry.strip() == known.sample.paths["several"]


def test_a_filled_derivation_can_be_depended_on(filled: RealNix) -> None:
    builds_or_skip()
    file = filled.home / "after.nix"
    file.write_text(AFTER_DERIVATION % EXPRESSION)
    out = filled.run("nix-build", file, "--no-out-link").strip()
    assert filled.unpacked(out).read_text().startswith("/nix/store/")


def test_without_rows_of_outputs_nix_does_not_find_them(
    each_nix: Callable[[], RealNix], known: Known
) -> None:
    """Why ``fill`` insists on them. When this fails, Nix has become more patient."""
    nix = each_nix()
    copy_files(known, nix)
    rows = [replace(row, outputs=() if row.outputs else None) for row in known.rows]
    fill(state(nix), rows, now=1)
    with pytest.raises(NixError, match="map::at"):
        nix.run("nix-store", "-r", known.derivation)


def test_gc_keeps_what_a_root_needs(filled: RealNix, known: Known) -> None:
    builds_or_skip()
    link = filled.home / "result"
    out = filled.run("nix-build", on_top(filled, known), "-o", link).strip()
    needed = filled.closure([out])
    filled.run("nix-store", "--gc")
    filled.run("nix-store", "--check-validity", *needed)
    assert all(os.path.lexists(filled.unpacked(path)) for path in needed)


def test_gc_and_delete_leave_filled_paths_alone(filled: RealNix, known: Known) -> None:
    paths = [row.path.absolute() for row in known.rows]
    (filled.home / "own").write_text("own")
    own = filled.run("nix-store", "--add", filled.home / "own").strip()
    (filled.home / "kept").write_text("kept")
    kept = filled.run("nix-store", "--add", filled.home / "kept").strip()
    (state(filled) / "profiles").mkdir(exist_ok=True)
    (state(filled) / "profiles" / "mine").symlink_to(kept)
    filled.run("nix-store", "--gc")
    assert not filled.unpacked(own).exists()
    assert filled.unpacked(kept).exists(), "profiles are roots, too"
    for path in (known.sample.paths["everything"], known.sample.paths["note"]):
        with pytest.raises(NixError, match="alive"):
            filled.run("nix-store", "--delete", path)
    filled.run("nix-store", "--check-validity", *paths)
    assert all(os.path.lexists(filled.unpacked(path)) for path in paths)


def test_a_database_of_nixs_own_is_filled_up(each_nix: Callable[[], RealNix], known: Known) -> None:
    """Nix has used it, and uses it afterwards; what it registered itself stays."""
    nix = each_nix()
    (nix.home / "own").write_text("own")
    own = nix.run("nix-store", "--add", nix.home / "own").strip()
    for row in known.rows:
        subprocess.run(
            ["cp", "-a", known.sample.nix.unpacked(row.path.absolute()), nix.store / "nix/store"], check=True
        )
    assert fill(state(nix), known.rows, now=1) == len(known.rows)
    nix.run("nix-store", "--verify", "--check-contents")
    nix.run("nix-store", "--check-validity", own, known.sample.paths["everything"])


@pytest.fixture
def on_a_mount(as_root: Caller, each_nix: Callable[[], RealNix], known: Known) -> Iterator[RealNix]:
    """The store is an overlay on our mount, which lists as empty; the upper layer is ``home/upper``."""
    nix = each_nix()
    lower, upper, work = (nix.home / name for name in ("lower", "upper", "work"))
    store = nix.store / "nix" / "store"
    for place in (lower, upper, work, store):
        place.mkdir(parents=True)
    as_root.use(f"file://{known.cache}", key=known.sample.public)
    server = as_root.popen(as_root.words("mount", lower))
    try:
        eventually(lambda: f" {lower} fuse" in Path("/proc/self/mounts").read_text() or server.poll())
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        mount = ["mount", "-t", "overlay", "overlay", "-o", options, str(store)]
        subprocess.run(mount, check=True, timeout=30)
        try:
            fill(state(nix), known.rows, now=int(time.time()))
            yield nix
        finally:
            subprocess.run(["umount", store], check=True, timeout=30)
    finally:
        server.terminate()
        server.communicate(timeout=60)


@pytest.mark.root
@pytest.mark.fuse
def test_builds_and_gc_on_a_mount_leave_the_lower_paths_alone(on_a_mount: RealNix, known: Known) -> None:
    builds_or_skip()
    nix, upper = on_a_mount, on_a_mount.home / "upper"
    paths = [row.path.absolute() for row in known.rows]
    junk = nix.run("nix-build", on_top(nix, known), "--no-out-link").strip()
    assert nix.unpacked(junk).exists()
    nix.run("nix-store", "--gc")
    assert not nix.unpacked(junk).exists()
    nix.run("nix-store", "--check-validity", *paths)
    out = nix.run("nix-build", on_top(nix, known), "-o", nix.home / "result").strip()
    nix.run("nix-store", "--gc")
    nix.run("nix-store", "--check-validity", out, *nix.closure([out]))
    assert all(os.path.lexists(nix.unpacked(path)) for path in nix.closure([out]))
    assert not [path for path in upper.iterdir() if path.is_char_device()], "no whiteouts"
    names = {path.name for path in upper.iterdir()}
    assert Path(out).name in names
    assert Path(known.sample.paths["big"]).name not in names, "nothing but what was built or opened"


@pytest.mark.root
@pytest.mark.fuse
def test_verify_on_a_mount_drops_rows_that_filling_brings_back(on_a_mount: RealNix, known: Known) -> None:
    """What this mode cannot do. When this fails, Nix has learned to look names up."""
    nix = on_a_mount
    paths = [row.path.absolute() for row in known.rows]
    with contextlib.suppress(NixError):
        nix.run("nix-store", "--verify")
    with pytest.raises(NixError, match="not valid"):
        nix.run("nix-store", "--check-validity", *paths)
    assert fill(state(nix), known.rows, now=1) > 0
    nix.run("nix-store", "--check-validity", *paths)
    assert nix.closure([known.sample.paths["everything"]]) == known.sample.closure("everything")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    with small_disk(place, "256k"):
        yield place


@pytest.mark.root
def test_a_full_disk_changes_nothing(small: Path, known: Known) -> None:
    rows = [replace(row, references=()) for row in known.rows]
    fill(small, rows[:2], now=1)
    many = [replace(rows[2], path=replace(rows[2].path, name=f"n{i}-{'x' * 190}")) for i in range(2000)]
    with pytest.raises(VeneerError, match="no space"):
        fill(small, many, now=1)
    assert fill(small, rows[:3], now=1) == 1
