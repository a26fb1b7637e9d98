"""Uploading to a directory: order, repetition, refusals, leftovers."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from veneer.formats.chunk_map import parse_chunk_map
from veneer.formats.listing import parse_listing
from veneer.formats.nar import nar_of, nar_size, tree_of_nar
from veneer.formats.narinfo import parse_narinfo
from veneer.formats.signature import SecretKey, fingerprint
from veneer.model.errors import HashMismatchError, UsageError, VeneerError
from veneer.model.hashes import Hash
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath
from veneer.model.tree import RegularFile
from veneer.publish.contents import Content, Contents, directory_tree, in_pieces
from veneer.publish.encode import Encoder
from veneer.publish.plan import make_plan
from veneer.publish.target import INCOMING, DirectoryTarget, Target, open_target
from veneer.publish.upload import Done, Publisher, begin_cache, present
from veneer.sources.options import parse_source_url

KEY = SecretKey.generate("k-1")
COUNT = 8


def path(number: int) -> StorePath:
    return StorePath(f"{number:032d}", "p")


def text(number: int) -> bytes:
    return b"content of %d" % number * 1000


def nar(number: int) -> bytes:
    return b"".join(nar_of(RegularFile(len(text(number)), False, 96), lambda _: [text(number)]))


def info(number: int) -> UnverifiedPathInfo:
    """Refers to itself and the one before."""
    digest = Hash("sha256", hashlib.sha256(nar(number)).digest())
    references = tuple(path(n) for n in (number - 1, number) if n >= 0)
    return UnverifiedPathInfo(path(number), "", "", digest, len(nar(number)), references)


@contextmanager
def contents(wanted: UnverifiedPathInfo) -> Iterator[Content]:
    number = int(wanted.store_path.hash_part)
    yield RegularFile(len(text(number)), False, 96), in_pieces([nar(number)])


INFOS = [info(n) for n in range(COUNT)]


@contextmanager
def opened(place: Path) -> Iterator[Target]:
    with open_target(parse_source_url(str(place))) as target:
        yield target


def publish(target: Target, source: Contents = contents, key: SecretKey | None = KEY) -> Done:
    begin_cache(target, "/nix/store")
    with Encoder(jobs=2) as encoder:
        plan = make_plan(INFOS, present(target, INFOS))
        return Publisher(target, encoder, source, key=key, jobs=3).run(plan, lambda _: None)


def narinfos(place: Path) -> set[int]:
    return {int(file.stem) for file in place.glob("*.narinfo")}


def check_whole(place: Path) -> None:
    """Every path that is visible is whole, and so is all that it refers to."""
    for number in narinfos(place):
        found = parse_narinfo((place / f"{number:032d}.narinfo").read_bytes())
        file = (place / found.url).read_bytes()
        assert found.file_hash == Hash("sha256", hashlib.sha256(file).digest())
        assert {int(r.hash_part) for r in found.references} <= narinfos(place)


def test_published_paths_are_whole_signed_and_mapped(tmp_path: Path) -> None:
    with opened(tmp_path) as target:
        assert len(publish(target).paths) == COUNT
    check_whole(tmp_path)
    assert narinfos(tmp_path) == set(range(COUNT))
    for expected in INFOS:
        part = expected.store_path.hash_part
        found = parse_narinfo((tmp_path / f"{part}.narinfo").read_bytes())
        assert KEY.public_key().verify(fingerprint(expected), found.signatures[0])
        chunk_map = parse_chunk_map((tmp_path / f"{part}.chunks").read_bytes())
        assert chunk_map.belongs_to(found)
        assert KEY.public_key().verify(chunk_map.fingerprint(), chunk_map.signatures[0])
        parse_listing((tmp_path / f"{part}.ls").read_bytes(), nar_size=expected.nar_size)
    assert not (tmp_path / INCOMING).exists()


def test_signatures_that_were_there_stay_and_one_is_added_once(tmp_path: Path) -> None:
    own = KEY.sign(fingerprint(INFOS[0]))
    given = replace(INFOS[0], signatures=("upstream-1:AAAA", own))
    with opened(tmp_path) as target, Encoder() as encoder:
        Publisher(target, encoder, contents, key=KEY, jobs=1).run(make_plan([given], {}), lambda _: None)
    found = parse_narinfo((tmp_path / f"{path(0).hash_part}.narinfo").read_bytes())
    assert found.signatures == ("upstream-1:AAAA", own)


def test_without_a_key_there_are_no_chunk_maps(tmp_path: Path) -> None:
    with opened(tmp_path) as target:
        publish(target, key=None)
    assert not list(tmp_path.glob("*.chunks"))


def test_a_second_run_writes_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as target:
        publish(target)
        before = {file: file.stat().st_ino for file in tmp_path.rglob("*")}
        done = publish(target)
    assert (done.paths, done.sent) == ([], 0)
    assert {file: ino for file, ino in before.items() if INCOMING not in str(file)} == {
        file: file.stat().st_ino for file in tmp_path.rglob("*")
    }


def test_nar_files_that_are_there_are_not_sent_again(tmp_path: Path) -> None:
    with opened(tmp_path) as target:
        publish(target)
        for file in tmp_path.glob("*.narinfo"):
            file.unlink()
        done = publish(target)
    assert (len(done.paths), done.sent) == (COUNT, 0)


def test_a_file_of_the_wrong_size_is_replaced(tmp_path: Path) -> None:
    with opened(tmp_path) as target:
        publish(target)
        for file in (*tmp_path.glob("*.narinfo"), *tmp_path.glob("nar/*")):
            file.write_bytes(b"torn")
        publish(target)
    check_whole(tmp_path)
    assert narinfos(tmp_path) == set(range(COUNT))


def test_content_that_is_not_the_registered_one_is_never_visible(tmp_path: Path) -> None:
    @contextmanager
    def wrong(wanted: UnverifiedPathInfo) -> Iterator[Content]:
        with contents(wanted) as (tree, whole):
            data = b"".join(whole([wanted.nar_size]))
            if wanted == INFOS[3]:
                data = data.replace(b"of 3", b"of 4")
            yield tree, in_pieces([data])

    with opened(tmp_path) as target:
        with pytest.raises(HashMismatchError, match="not what is registered"):
            publish(target, wrong)
        check_whole(tmp_path)
        assert max(narinfos(tmp_path), default=0) < 3
        assert len(list(tmp_path.glob("nar/*"))) < COUNT
        publish(target)
    assert narinfos(tmp_path) == set(range(COUNT))


def test_failures_at_any_object_leave_a_valid_cache(tmp_path: Path) -> None:
    class Failing(DirectoryTarget):
        left = 0
        lock = threading.Lock()

        def put_file(self, name: str, file: Path) -> None:
            with self.lock:
                self.left -= 1
                if self.left < 0:
                    raise VeneerError("no more", where=name)
            super().put_file(name, file)

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for allowed in range(4 * COUNT + 1):
        place = tmp_path / str(allowed)
        place.mkdir()
        target = Failing(place, scratch, str(place), fsync=False)
        target.left = allowed
        with pytest.raises(VeneerError, match="no more"):
            publish(target)
        check_whole(place)


def test_a_cache_of_another_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nix-cache-info").write_text("StoreDir: /gnu/store\n")
    with opened(tmp_path) as target, pytest.raises(UsageError, match="/gnu/store"):
        begin_cache(target, "/nix/store")


def test_the_description_of_a_cache_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "nix-cache-info").write_text("StoreDir: /nix/store\nPriority: 7\n")
    with opened(tmp_path) as target:
        begin_cache(target, "/nix/store")
    assert "Priority: 7" in (tmp_path / "nix-cache-info").read_text()


def test_leftovers_of_a_killed_run_go_and_those_of_a_live_one_stay(tmp_path: Path) -> None:
    dead = tmp_path / INCOMING / "dead"
    dead.mkdir(parents=True)
    (dead / "half").write_bytes(b"half")
    with opened(tmp_path) as live:
        assert not dead.exists()
        (live.scratch / "mine").write_bytes(b"")
        with opened(tmp_path) as other:
            assert other.scratch != live.scratch
            assert (live.scratch / "mine").exists()
        assert (live.scratch / "mine").exists()
    assert not (tmp_path / INCOMING).exists()


@pytest.mark.parametrize("url", ["https://cache.example", "http://cache.example"])
def test_places_that_cannot_be_written_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match="cannot publish"), open_target(parse_source_url(url)):
        pass


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    @contextmanager
    def full(wanted: UnverifiedPathInfo) -> Iterator[Content]:
        with contents(wanted) as (tree, _):
            yield tree, in_pieces(failing())

    def failing() -> Iterator[bytes]:
        yield b"begun"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with opened(tmp_path) as target, pytest.raises(VeneerError, match="no space left") as failure:
        publish(target, full)
    assert "stays valid" in failure.value.hint


def test_objects_are_synced_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with open_target(parse_source_url(str(tmp_path)), fsync=True) as target:
        target.put("a", b"a")
    assert len(synced) == 2


def test_a_directory_becomes_the_tree_that_nix_would_archive(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "b").mkdir(parents=True)
    (top / "b" / "exe").write_bytes(b"#!")
    (top / "b" / "exe").chmod(0o555)
    (top / "b.txt").write_bytes(b"x" * 100)
    (top / "a").symlink_to("b")
    (top / os.fsdecode(b"\xff")).write_bytes(b"")
    tree, whole = directory_tree(top)
    data = b"".join(whole([nar_size(tree)]))
    assert tree_of_nar([data]) == tree
    assert b"#!" in data and b"x" * 100 in data
    single, whole = directory_tree(top / "b.txt")
    assert single == RegularFile(100, False, 96)
    assert b"x" * 100 in b"".join(whole([nar_size(single)]))
    os.mkfifo(top / "fifo")
    with pytest.raises(VeneerError, match="neither a file"):
        directory_tree(top)
