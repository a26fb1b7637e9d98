"""What is uploaded, and in which order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.model.errors import VeneerError
from veneer.model.hashes import Hash
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath
from veneer.publish.plan import make_plan, unsigned


def path(number: int) -> StorePath:
    return StorePath(f"{number:032d}", "p")


def info(number: int, *references: int, build: int = 0, signed: bool = True) -> UnverifiedPathInfo:
    digest = Hash("sha256", bytes([build]) * 32)
    names = tuple(map(path, references))
    signatures = ("k:AAAA",) if signed else ()
    return UnverifiedPathInfo(path(number), "", "", digest, 100, names, signatures=signatures)


@given(st.integers(0, 30), st.randoms(use_true_random=False))
def test_references_come_before_what_refers_to_them(count: int, choice: random.Random) -> None:
    infos = [info(n, n, *(m for m in range(n) if choice.random() < 0.3)) for n in range(count)]
    choice.shuffle(infos)
    there = {i.store_path: i for i in infos if choice.random() < 0.3}
    plan = make_plan(infos, there)
    seen: set[StorePath] = set()
    for upload in plan.uploads:
        expected = {r for r in upload.info.references if r not in there and r != upload.info.store_path}
        assert set(upload.after) == expected <= seen
        seen.add(upload.info.store_path)
    assert seen | set(plan.present) == {i.store_path for i in infos}
    assert not seen & set(plan.present)
    assert make_plan(sorted(infos, key=lambda i: i.store_path), there) == plan


def test_long_chains_do_not_exhaust_the_stack() -> None:
    plan = make_plan([info(n, *([n + 1] if n < 4999 else [])) for n in range(5000)], {})
    assert [u.info.store_path for u in plan.uploads] == [path(n) for n in reversed(range(5000))]


def test_the_narinfo_is_the_last_of_a_paths_objects() -> None:
    upload = make_plan([info(1)], {}).uploads[0]
    part = path(1).hash_part
    assert upload.objects(chunk_map=True) == (
        "nar/<file hash>.nar.zst",
        f"{part}.ls",
        f"{part}.chunks",
        f"{part}.narinfo",
    )
    assert f"{part}.chunks" not in upload.objects(chunk_map=False)


def test_a_path_that_is_there_is_left_alone_even_when_it_is_another_build() -> None:
    plan = make_plan([info(1), info(2, 1)], {path(1): info(1, build=1), path(2): info(2, 1)})
    assert not plan.uploads
    assert plan.present == (path(1), path(2))
    assert plan.other == (path(1),)


def test_references_that_are_not_published_are_not_waited_for() -> None:
    assert make_plan([info(1, 2, 3)], {}).uploads[0].after == ()


def test_paths_that_nobody_signed_are_named() -> None:
    plan = make_plan([info(1), info(2, signed=False), info(3, signed=False)], {path(3): info(3)})
    assert unsigned(plan) == [path(2)]


def test_a_circle_of_references_is_an_error() -> None:
    with pytest.raises(VeneerError, match="refer to each other"):
        make_plan([info(1, 2), info(2, 3), info(3, 1)], {})
