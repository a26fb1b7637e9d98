"""Store paths that a command line names are looked up before the command comes to them, and no more than that."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.callers import Caller, eventually
from tests.support.faulty_http import FaultyServer
from tests.support.signed_cache import SignedCache, make_path

pytestmark = [pytest.mark.root, pytest.mark.fuse]

ABSENT = f"/nix/store/{'0' * 32}-absent"


@pytest.mark.parametrize("listings", [True, False])
def test_named_paths_are_looked_up_and_not_fetched(
    listings: bool, caller: Caller, open_directory: Path, faulty_http: Callable[[Path], FaultyServer]
) -> None:
    store = SignedCache(
        open_directory / f"store-{os.urandom(4).hex()}",
        [make_path(name, 1000) for name in ("tool-1.0", "lib-1.0", "other-1.0")],
        compression="zstd",
        listings=listings,
        references={"tool-1.0": ["lib-1.0"]},
    )
    store.directory.chmod(0o755)
    server = faulty_http(store.directory)
    caller.use(server.url, key=store.key)
    tool, lib, other = (store.paths[name].path for name in ("tool-1.0", "lib-1.0", "other-1.0"))
    words = ["sh", "-c", "echo up; read line", f"/nix/store/{tool}/a-program", f"--with={ABSENT}/x"]
    with caller.running("run", "--", *words) as process:
        eventually(lambda: server.count(f"/{lib.hash_part}.narinfo"))  # of what the named one refers to
        eventually(lambda: server.count(f"/{'0' * 32}.narinfo"))
        assert server.count(f"/{tool.hash_part}.ls") == 1
        assert server.count("/nar/*") == 0
        assert server.count(f"/{other.hash_part}.*") == 0
        _, errors = process.communicate("\n", timeout=60)
    assert process.returncode == 0, errors
    assert "no store path was touched" in errors
