"""What can be told of a path without asking is what asking would have told, and nothing that is not trusted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.golden import PATHS, url
from tests.support.store_bench import Bench, run
from veneer.formats.signature import SecretKey
from veneer.model.errors import NotFoundError, TrustError
from veneer.model.store_path import StorePath

PATH = PATHS["leaf"]


def test_before_the_first_question_nothing_is_remembered_and_after_it_the_same(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        view, resolver = bench.view(url("zstd")), bench.store.resolver
        assert resolver.remembered(view, PATH) is None
        told = await resolver.path_info(view, PATH, bench.account)
        assert resolver.remembered(view, PATH) == told
        later = bench.view(url("zstd"), ttl=11.0)  # its parsed answers come from the index
        assert resolver.remembered(later, PATH) == told

    run(tmp_path, body)


def test_what_is_remembered_counts_only_for_whom_its_key_does(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        resolver = bench.store.resolver
        await resolver.path_info(bench.view(url("zstd")), PATH, bench.account)
        foreign = bench.view(url("zstd"), keys=(str(SecretKey.generate("other-1").public_key()),))
        assert resolver.remembered(foreign, PATH) is None
        with pytest.raises(TrustError):
            await resolver.path_info(foreign, PATH, bench.account)

    run(tmp_path, body)


def test_another_name_with_the_same_hash_part_is_not_remembered(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        view, resolver = bench.view(url("zstd")), bench.store.resolver
        await resolver.path_info(view, PATH, bench.account)
        assert resolver.remembered(view, StorePath(PATH.hash_part, "another")) is None

    run(tmp_path, body)


def test_an_earlier_source_is_passed_over_only_while_its_absence_is_believed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "nix-cache-info").write_text("StoreDir: /nix/store\n")

    async def body(bench: Bench) -> None:
        empty = f"file://{tmp_path / 'empty'}?priority=1"
        view, resolver = bench.view(empty, url("zstd") + "?priority=2"), bench.store.resolver
        told = await resolver.path_info(view, PATH, bench.account)
        assert resolver.remembered(view, PATH) == told
        bench.clock.now += 10
        assert resolver.remembered(view, PATH) is None
        assert await resolver.path_info(view, PATH, bench.account) == told

    run(tmp_path, body)


def test_what_every_source_lacks_is_left_to_asking(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        view, resolver = bench.view(url("zstd")), bench.store.resolver
        nowhere = StorePath("0" * 32, "nowhere")
        for _ in range(2):
            with pytest.raises(NotFoundError):
                await resolver.path_info(view, nowhere, bench.account)
            assert resolver.remembered(view, nowhere) is None

    run(tmp_path, body)
