"""A moment of each kind of load on one daemon. For as long as you like: ``./dev bench load``."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from benchmarks.support.wide_cache import write_wide_cache
from tests.support import load
from tests.support.callers import Caller
from tests.support.load import make_stock
from veneer.cli.client import connect

pytestmark = [pytest.mark.root, pytest.mark.fuse]


@pytest.fixture
def home(open_directory: Path, request: pytest.FixtureRequest) -> Path:
    made = open_directory / str(request.node.name)
    made.mkdir()
    return made


def test_many_environments_at_once_over_one_daemon(as_root: Caller, home: Path) -> None:
    stock = make_stock(home, 8, 60_000, 0, 0)
    found = load.environments(as_root, stock, 12, 2)
    assert found["connections"] >= 14
    assert found["reads"] == 14 * 8


def test_hundreds_of_readers_wait_and_are_all_answered(as_root: Caller, home: Path) -> None:
    found = load.readers(as_root, make_stock(home, 40, 150_000, 8, 3_000_000), 500, rate=8_000_000)
    assert found["reads"] == 500


def test_a_daemon_that_ends_before_its_clients_ends_without_a_word(as_root: Caller, home: Path) -> None:
    stock = make_stock(home, 1, 10_000, 0, 0)
    as_root.use(f"file://{stock.directory}", key=stock.key)
    with contextlib.ExitStack() as clients, load.OneDaemon(as_root):
        for n in range(3):
            client = connect(as_root.cache, {"session": f"idle {n}"})
            assert client is not None
            clients.callback(client.close)
            client.control("status", {}, seconds=20)


def test_thousands_of_store_paths_are_looked_up(as_root: Caller, home: Path) -> None:
    paths, key = write_wide_cache(home, 1000, 12)
    assert load.lookups(as_root, home, key, paths, 12_000)["entries"] == 12_000


def test_churn_far_above_the_limit_leaves_memory_and_descriptors_flat(as_root: Caller, home: Path) -> None:
    """NARs that come whole and NARs that come in parts; the daemon with asyncio's checks."""
    stock = make_stock(home, 24, 1_000_000, 6, 6_000_000)
    limit = 12 << 20
    found = load.churn(as_root, stock, f"file://{stock.directory}", limit, 6, 12, debug=True)
    assert stock.size > 4 * limit
    assert found["bytes"] > limit
    assert found["held"] <= limit + (8 << 20)
