"""Which roots get a bundle, when, and what is in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.publish.test_publish_plan import info, path
from tests.unit.publish.test_publish_upload import COUNT, INFOS, KEY, contents, opened
from veneer.formats.bundle import LISTING, NARINFO, Entry, is_announced, parse_bundle
from veneer.formats.narinfo import parse_narinfo
from veneer.model.errors import VeneerError
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath
from veneer.publish import bundles
from veneer.publish.bundles import SmallObjects, collect
from veneer.publish.encode import Encoder
from veneer.publish.plan import make_plan
from veneer.publish.target import DirectoryTarget, Target
from veneer.publish.upload import Done, Publisher, begin_cache, present

ROOT = INFOS[-1].store_path
EVERYTHING = {
    f"{number:032d}{suffix}" for number in range(COUNT) for suffix in (".narinfo", ".ls", ".chunks")
}


def publish(
    target: Target,
    infos: Sequence[UnverifiedPathInfo] = INFOS,
    asked: Iterable[StorePath] = (ROOT,),
    jobs: int = 3,
) -> Done:
    begin_cache(target, "/nix/store")
    with Encoder(jobs=2) as encoder:
        plan = make_plan(infos, present(target, infos), asked)
        return Publisher(target, encoder, contents, key=KEY, jobs=jobs).run(plan, lambda _: None)


def bundle_of(place: Path, root: StorePath = ROOT) -> list[Entry]:
    return list(parse_bundle((place / f"{root.hash_part}.bundle").read_bytes(), root.hash_part))


def names(entries: Iterable[Entry]) -> set[str]:
    return {entry.hash_part + entry.suffix for entry in entries}


def narinfo(place: Path, root: StorePath = ROOT) -> UnverifiedPathInfo:
    return parse_narinfo((place / f"{root.hash_part}.narinfo").read_bytes())


def said(known: UnverifiedPathInfo) -> UnverifiedPathInfo:
    """As the target has it once it has a bundle."""
    return replace(known, extra=(("Bundle", f"{known.store_path.hash_part}.bundle"),))


def test_roots_are_those_asked_for_that_no_other_one_asked_for_refers_to() -> None:
    infos = [info(1), info(2, 1), info(3, 2), info(4, 4, 3), info(5, 2)]
    asked = [path(n) for n in (1, 2, 4, 5, 9)]
    plan = make_plan(infos, {}, asked)
    assert [u.info.store_path for u in plan.uploads if u.bundled] == [path(4), path(5)]
    whole = make_plan(infos, {}, [i.store_path for i in infos])
    assert [u.info.store_path for u in whole.uploads if u.bundled] == [path(4), path(5)]
    assert not any(u.bundled for u in make_plan(infos, {}, [path(1)]).uploads)
    assert not any(u.bundled for u in make_plan(infos, {}).uploads)


def test_the_bundle_comes_right_before_the_narinfo() -> None:
    upload = make_plan([info(1), info(2, 1)], {}, [path(2)]).uploads[1]
    assert upload.objects(chunk_map=True)[-3:] == tuple(
        f"{path(2).hash_part}.{suffix}" for suffix in ("chunks", "bundle", "narinfo")
    )


def test_a_root_that_is_there_gets_one_when_it_has_none_or_more_of_its_closure_comes() -> None:
    infos = [info(1), info(2, 1), info(3, 2)]
    there = {i.store_path: i for i in infos}
    asked = [path(3)]
    assert make_plan(infos, there, asked).bundles == (infos[2],)
    has = {**there, path(3): said(infos[2])}
    assert make_plan(infos, has, asked).bundles == ()
    del has[path(1)]
    assert make_plan(infos, has, asked).bundles == (said(infos[2]),)


def test_a_bundle_has_the_targets_own_objects_of_the_whole_closure(tmp_path: Path) -> None:
    with opened(tmp_path) as target:
        assert publish(target).bundles == [ROOT]
    entries = bundle_of(tmp_path)
    assert names(entries) == EVERYTHING
    for entry in entries:
        assert entry.body == (tmp_path / (entry.hash_part + entry.suffix)).read_bytes()
    assert is_announced(narinfo(tmp_path))
    assert sum(is_announced(narinfo(tmp_path, i.store_path)) for i in INFOS) == 1


def test_a_second_run_writes_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as target:
        publish(target)
        before = {file: file.stat().st_ino for file in tmp_path.glob("*.*")}
        done = publish(target)
        assert (done.paths, done.bundles) == ([], [])
    assert all(file.stat().st_ino == ino for file, ino in before.items() if file.is_file())


def test_what_was_there_is_read_from_the_target(tmp_path: Path) -> None:
    with opened(tmp_path) as target:
        publish(target, INFOS[:3], ())
        publish(target, INFOS[3:])
    assert names(bundle_of(tmp_path)) == EVERYTHING


def test_what_is_not_there_is_left_out_and_added_when_it_comes(tmp_path: Path) -> None:
    with opened(tmp_path) as target:
        publish(target, [*INFOS[:2], *INFOS[3:]])
        assert names(bundle_of(tmp_path)) == {n for n in EVERYTHING if int(n.partition(".")[0]) > 2}
        before = (tmp_path / f"{ROOT.hash_part}.narinfo").read_bytes()
        assert publish(target).bundles == [ROOT]
    assert names(bundle_of(tmp_path)) == EVERYTHING
    assert (tmp_path / f"{ROOT.hash_part}.narinfo").read_bytes() == before


def test_a_root_alone_has_no_bundle(tmp_path: Path) -> None:
    with opened(tmp_path) as target:
        assert publish(target, INFOS[-1:]).bundles == []
    assert not list(tmp_path.glob("*.bundle")) and not is_announced(narinfo(tmp_path))


def test_a_narinfo_that_was_there_gains_one_line_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / f"{ROOT.hash_part}.narinfo"
    with opened(tmp_path) as target:
        publish(target, asked=())
        lines = file.read_bytes().splitlines(keepends=True)
        before = b"".join([b"System: x\n", *reversed(lines)])  # not as we would write it
        file.write_bytes(before)
        assert publish(target).bundles == [ROOT]
    assert file.read_bytes() == before + f"Bundle: {ROOT.hash_part}.bundle\n".encode()
    assert bundle_of(tmp_path)[0] == Entry(ROOT.hash_part, NARINFO, file.read_bytes())


def test_narinfos_that_are_of_no_use_count_as_absent(tmp_path: Path) -> None:
    with opened(tmp_path) as target:
        publish(target, asked=())
        (tmp_path / f"{INFOS[-3].store_path.hash_part}.narinfo").write_bytes(b"torn")
        other = (tmp_path / f"{INFOS[0].store_path.hash_part}.narinfo").read_bytes()
        entries = collect(SmallObjects(target), INFOS[-1], b"own")
        assert {e.hash_part for e in entries} == {i.store_path.hash_part for i in INFOS[-2:]}
        (tmp_path / f"{INFOS[-3].store_path.hash_part}.narinfo").write_bytes(other)
        assert collect(SmallObjects(target), INFOS[-1], b"own") == entries


def test_the_smallest_objects_are_kept_when_there_is_not_room_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as target:
        publish(target)
        everything = bundle_of(tmp_path)
        narinfos = sum(len(e.body) for e in everything if e.suffix == NARINFO)
        smallest = min(len(e.body) for e in everything if e.suffix == LISTING)
        monkeypatch.setattr(bundles, "ROOM", narinfos + smallest)
        entries = collect(SmallObjects(target), narinfo(tmp_path), everything[0].body)
        assert [e for e in entries if e.suffix == NARINFO] == everything[:COUNT]
        assert [len(e.body) for e in entries[COUNT:]] == [smallest]
        monkeypatch.setattr(bundles, "MAX_PATHS", 3)
        few = collect(SmallObjects(target), narinfo(tmp_path), everything[0].body)
        assert sum(e.suffix == NARINFO for e in few) == 3


def test_objects_of_this_run_are_not_read_again(tmp_path: Path) -> None:
    class Counting(DirectoryTarget):
        read_names: list[str] = []  # noqa: RUF012

        def read(self, name: str, limit: int) -> bytes | None:
            self.read_names.append(name)
            return super().read(name, limit)

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    target = Counting(tmp_path, scratch, str(tmp_path), fsync=False)
    begin_cache(target, "/nix/store")
    target.read_names.clear()
    with Encoder() as encoder:
        Publisher(target, encoder, contents, key=KEY, jobs=2).run(
            make_plan(INFOS, {}, [ROOT]), lambda _: None
        )
    assert target.read_names == []


def test_a_run_that_fails_before_the_bundle_leaves_no_root(tmp_path: Path) -> None:
    class Failing(DirectoryTarget):
        def put(self, name: str, data: bytes) -> None:
            if name.endswith(".bundle"):
                raise VeneerError("no more", where=name)
            super().put(name, data)

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(VeneerError, match="no more"):
        publish(Failing(tmp_path, scratch, str(tmp_path), fsync=False))
    assert not (tmp_path / f"{ROOT.hash_part}.narinfo").exists()
    with opened(tmp_path) as target:
        assert publish(target).bundles == [ROOT]
