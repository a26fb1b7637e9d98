"""A real program out of a published cache: its libraries are on their way while its loader still waits for the first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.callers import Caller, eventually
from tests.support.faulty_http import FaultyServer, Stall
from tests.support.linked_program import ANSWER, COUNT, find_compiler, make_linked_program, program_at
from tests.support.published_cache import PublishedCache

pytestmark = [pytest.mark.root, pytest.mark.fuse]


@pytest.fixture(scope="module")
def cache(open_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> PublishedCache:
    if find_compiler() is None:
        pytest.skip("needs a C compiler")
    made, references = make_linked_program(tmp_path_factory.mktemp("program"))
    published = PublishedCache(open_directory / "linked", made, references=references)
    published.directory.chmod(0o755)
    return published


def test_its_libraries_are_asked_for_before_its_loader_has_one(
    caller: Caller, cache: PublishedCache, faulty_http: Callable[[Path], FaultyServer]
) -> None:
    server = faulty_http(cache.directory)
    caller.use(server.url, key=cache.key)
    direct = [f"/nar/{cache.nar(f'direct{number}-0').name}" for number in range(1, COUNT + 1)]
    for nar in direct:
        server.fail(nar, Stall())
    process = caller.popen(caller.words("run", "--", program_at()))
    try:
        eventually(lambda: sum(map(bool, map(server.count, direct))) >= 4)  # as many as the background may
        assert process.poll() is None
        server.heal()
        answer, errors = process.communicate(timeout=60)
    finally:
        server.heal()
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert (answer, process.returncode) == (ANSWER, 0), errors


def test_it_costs_no_more_than_the_files_that_are_linked(
    as_root: Caller, cache: PublishedCache, faulty_http: Callable[[Path], FaultyServer]
) -> None:
    server = faulty_http(cache.directory)
    as_root.use(server.url, key=cache.key)
    done = as_root.veneer("run", "--", program_at())
    assert (done.stdout, done.returncode) == (ANSWER, 0), done.stderr
    asked = [(seen.path, seen.range) for seen in server.seen if seen.path.startswith("/nar/")]
    assert len({path for path, _ in asked}) == 2 * COUNT + 1
    assert len(set(asked)) == len(asked)
    assert all(range_ for _, range_ in asked)
