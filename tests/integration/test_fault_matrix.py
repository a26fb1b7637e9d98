"""The fault matrix: what a reader gets, and what stays behind, for each fault of a server, at each thing that is asked for.

Every cell runs the daemon's store against a real HTTP server in four arrangements at once: the bad source alone and
before a good one, each ``strict`` and ``deferred``. In all of them:

- nothing takes longer than ``LIMIT``;
- what is known to exist is never absent: bytes, or an error whose errno is EIO and whose story names the bad source;
- under ``strict`` no byte that is not the signed one is ever given out; under ``deferred`` only the byte that is wrong itself;
- with a good source behind, the content comes from that one (``deferred``: at the latest when it is opened again);
- the cache is clean: nothing in ``incoming``, no parts, every NAR file hashed again, rows and files agree;
- another path is read meanwhile; and once the server is well again, so is the path, after the pauses that are documented.

Time limits are small and pauses between tries are not made, so only what is silent costs time. The second half goes
through ``veneer run`` and the kernel. What single requests do with a fault is in ``test_http_source_faults``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_http_source_faults import Authority
from tests.support.caches import Clock, open_cache, read_ready
from tests.support.callers import Caller, eventually
from tests.support.fault_cells import BYSTANDER, CELLS, CUT, LATE, VICTIM, Cell, Verify
from tests.support.faulty_http import (
    Endless,
    Fault,
    FaultyServer,
    Flipped,
    Reset,
    Status,
    Truncated,
    WrongLength,
)
from tests.support.raw_http import RawServer, response
from tests.support.signed_cache import MadePath, SignedCache, make_path
from tests.support.store_bench import Bench
from veneer.cache.index import NarState, PathRow, TreeState
from veneer.formats.signature import SecretKey
from veneer.formats.tree_index import encode_tree
from veneer.model.errors import VeneerError
from veneer.sources.base import Source
from veneer.sources.chain import SourceChain
from veneer.sources.object_store import ObjectStoreSource
from veneer.sources.options import SourceOptions, parse_source_url
from veneer.store.remembered import RememberedSource
from veneer.store.resolve import AbsentError
from veneer.store.views import SourceSetting, View, ViewConfig, open_view

LIMIT = 10.0
"""Seconds within which a read must have ended, on a busy machine."""
PATIENT = SourceOptions(connect_seconds=5, stall_seconds=5, tries=2, backoff_seconds=0, in_flight=8)
IMPATIENT = replace(PATIENT, stall_seconds=0.25, least_rate=10**8)
QUARANTINE = 3601.0
PIECE = 1 << 20


class Trial(Bench):
    """A store, its cache and the view of one arrangement."""

    def __init__(
        self,
        root: Path,
        urls: Sequence[str],
        key: str,
        verify: Verify,
        options: SourceOptions,
    ) -> None:
        clock = Clock(time.time())
        super().__init__(open_cache(root, clock), clock)
        self.bad = urls[0]
        self.deferred = verify == "deferred"
        self.only = self._view(urls, key, verify, options)
        self.views.append(self.only)

    def _view(self, urls: Sequence[str], key: str, verify: Verify, options: SourceOptions) -> View:
        async def sleep(seconds: float) -> None:
            assert seconds <= options.most_backoff_seconds

        def make_source(url: str) -> tuple[Source, bool]:
            inner = ObjectStoreSource(parse_source_url(url), options, sleep=sleep)
            return RememberedSource(
                inner, self.cache.index, self.clock, negative_ttl=10, store_dir="/nix/store"
            ), False

        config = ViewConfig(
            tuple(SourceSetting(f"{url}?priority={at}", verify) for at, url in enumerate(urls)), (key,)
        )
        return open_view(config, make_source, lambda sources: SourceChain(sources, clock=self.clock))

    async def read_whole(self, made: MadePath) -> tuple[bytes, VeneerError | None]:
        """Open and read the whole NAR as a mount server does: what came, and the error that ended it."""
        data = b""
        began = time.monotonic()
        try:
            async with asyncio.timeout(3 * LIMIT):
                row = await self.looked_up(self.only, made)
                while len(data) < row.nar_size:
                    size = min(PIECE, row.nar_size - len(data))
                    ready = await self.store.content(self.only, row.number, len(data), size, self.account)
                    piece = read_ready(self.cache, ready, len(data), size)
                    assert len(piece) == size, "fewer bytes than were announced"
                    data += piece
            failure = None
        except VeneerError as caught:
            failure = caught
        finally:
            if self.store.busy:
                with contextlib.suppress(VeneerError):  # of a deferred one the end is told to nobody
                    await self.store.whole(self.only, made.path, self.account)
        assert time.monotonic() - began < LIMIT
        return data, failure

    def check_bytes(self, data: bytes, *, flipped: bool) -> None:
        """What was given out is a beginning of the signed NAR (deferred: but for the byte that is wrong itself)."""
        if not (self.deferred and flipped):
            assert data == VICTIM.nar[: len(data)], "wrong bytes were given out"
        assert self.deferred or len(data) in (0, len(VICTIM.nar)), (
            "a part was given out before it was verified"
        )

    def check_cache(self) -> None:
        """Files and rows agree, and every NAR is the signed one."""
        root, index = self.cache.root, self.cache.index
        assert not list((root / "incoming").iterdir())
        rows = {row.number: row for file in index.with_files() if (row := index.path(file.number))}
        nars = {number for number, row in rows.items() if row.nar is NarState.WHOLE}
        trees = {number for number, row in rows.items() if row.tree is not TreeState.NONE}
        assert {file for file in (root / "nars").rglob("*") if file.is_file()} == {
            self.cache.nars.path(n) for n in nars
        }
        assert {file for file in (root / "trees").rglob("*") if file.is_file()} == {
            self.cache.trees.path(n) for n in trees
        }
        for number in nars:
            assert (
                hashlib.sha256(self.cache.nars.path(number).read_bytes()).digest()
                == rows[number].nar_hash.digest
            )
            assert rows[number].tree is TreeState.CHECKED
        for number in trees:
            if rows[number].tree is TreeState.CHECKED:
                self.check_tree(rows[number])
        assert len(list((root / "quarantine").iterdir())) <= 4

    def check_tree(self, row: PathRow) -> None:
        made = {m.path: m for m in (VICTIM, BYSTANDER)}[row.store_path]
        expected = encode_tree(
            made.tree,
            path_number=row.number,
            generation=self.cache.generation,
            nar_hash=row.nar_hash.digest,
            nar_size=row.nar_size,
        )
        assert self.cache.trees.path(row.number).read_bytes() == expected


@contextlib.asynccontextmanager
async def trial(
    root: Path, urls: Sequence[str], key: str, verify: Verify, options: SourceOptions
) -> AsyncIterator[Trial]:
    made = Trial(root, urls, key, verify, options)
    try:
        yield made
    finally:
        await made.close()


async def check(trial: Trial, case: Cell, *, alone: bool, heal: Callable[[], None]) -> None:
    """One cell in one arrangement, before and after the server is well again."""
    flipped = case.kind == "nar" and case.alone == "error"
    data, failure = await trial.read_whole(VICTIM)
    trial.check_bytes(data, flipped=flipped)
    trial.check_cache()
    stories = trial.stories()
    if failure is not None:
        assert failure.errno == (errno.ENOENT if case.alone == "absent" else errno.EIO)
    if case.said:
        assert re.search(case.said, stories), stories
        assert trial.bad in stories or case.alone == "reopened"
    if alone and failure is None and trial.deferred and case.alone != "served":
        data, failure = await trial.read_whole(
            VICTIM
        )  # all bytes were given before the fault was found: it is found now
        assert (failure is None) is (case.alone == "reopened")
    elif alone:
        check_ending(case, data, failure)
    elif trial.deferred or case.alone == "reopened":
        assert trial.deferred or failure is not None
        again, failure = await trial.read_whole(VICTIM)
        assert failure is None, f"not served by the good source: {failure.story()}"
        assert again == VICTIM.nar
    else:
        assert failure is None, f"not served by the good source: {failure.story()}"
        assert data == VICTIM.nar
    if alone and case.alone == "reopened":
        assert await trial.read_whole(VICTIM) == (VICTIM.nar, None)
    trial.clock.now += 10  # a source that failed rests
    assert await trial.read_whole(BYSTANDER) == (BYSTANDER.nar, None)
    heal()
    trial.clock.now += QUARANTINE
    again, failure = await trial.read_whole(VICTIM)
    assert failure is None, f"not served after the server was healed: {failure.story()}"
    assert again == VICTIM.nar
    trial.check_cache()


def check_ending(case: Cell, data: bytes, failure: VeneerError | None) -> None:
    if case.alone == "served":
        assert failure is None, failure.story()
        assert data == VICTIM.nar
    elif case.alone == "absent":
        assert isinstance(failure, AbsentError)
    else:
        assert failure is not None, "served, though it cannot be had"
        assert not isinstance(failure, AbsentError)


ARRANGEMENTS: list[tuple[Verify, int]] = [("strict", 1), ("strict", 2), ("deferred", 1), ("deferred", 2)]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], SignedCache]:
    """Caches of the victim and the bystander, made once; all have one key."""
    made: dict[tuple[str, bool], SignedCache] = {}
    secret = SecretKey.generate("made-1")

    def cache(compression: str, sized: bool) -> SignedCache:
        if (compression, sized) not in made:
            place = tmp_path_factory.mktemp("cache") / "cache"
            made[compression, sized] = SignedCache(
                place, [VICTIM, BYSTANDER], compression=compression, sized=sized, secret=secret
            )
        return made[compression, sized]

    return cache


Servers = Callable[[SignedCache], list[FaultyServer]]


@pytest.fixture(scope="module")
def pool() -> Iterator[Servers]:
    """Servers of a cache: one for each arrangement to break, and one that stays well."""
    pools: dict[SignedCache, list[FaultyServer]] = {}

    def servers(cache: SignedCache) -> list[FaultyServer]:
        if cache not in pools:
            pools[cache] = [FaultyServer(cache.directory) for _ in range(len(ARRANGEMENTS) + 1)]
        return pools[cache]

    yield servers
    for each in pools.values():
        for server in each:
            server.close()


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "NIX_SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def in_all_arrangements(body: Callable[[int, Verify, int], Awaitable[None]], most: int | None = None) -> None:
    """Runs ``body(at, verify, sources)`` for the first ``most`` arrangements at once."""

    async def one(at: int, verify: Verify, count: int) -> None:
        try:
            await body(at, verify, count)
        except BaseException as failed:
            failed.add_note(f"in the arrangement: {verify}, {count} sources")
            raise

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for at, (verify, count) in enumerate(ARRANGEMENTS[:most]):
                group.create_task(one(at, verify, count))

    asyncio.run(main())


@pytest.mark.parametrize("case", CELLS, ids=str)
def test_a_fault_gives_signed_bytes_or_an_error_and_leaves_nothing(
    case: Cell, caches: Callable[[str, bool], SignedCache], pool: Servers, tmp_path: Path
) -> None:
    cache = caches(case.compression, case.sized)
    *broken, well = pool(cache)
    options = IMPATIENT if case.silent else PATIENT

    async def arrangement(at: int, verify: Verify, count: int) -> None:
        bad = broken[at]
        case.break_(bad, cache)
        urls = (bad.url, well.url)[:count]
        try:
            async with trial(tmp_path / str(at), urls, cache.key, verify, options) as one:
                await check(one, case, alone=count == 1, heal=bad.heal)
        finally:
            bad.heal()

    in_all_arrangements(arrangement, 1 if case.heavy else None)


UNREACHABLE = {
    "refused": "Connection refused after 2 tries",
    "unknown host": "host name not found",
    "no TLS there": "connection failed|TLS|corrupt|Invalid",
    "unknown authority": "TLS certificate refused",
}


@pytest.mark.parametrize("kind", UNREACHABLE)
def test_a_server_that_cannot_be_reached_is_an_error_and_the_next_one_serves(
    kind: str, caches: Callable[[str, bool], SignedCache], pool: Servers, tmp_path: Path
) -> None:
    cache = caches("none", True)
    *_, well = pool(cache)
    with (
        FaultyServer(cache.directory) as refusing,
        RawServer(lambda request: [response()], Authority(tmp_path / "authority").context) as secret,
    ):
        refusing.refuse()
        urls = {
            "refused": refusing.url,
            "unknown host": "http://host.invalid",
            "no TLS there": well.url.replace("http:", "https:"),
            "unknown authority": secret.url,
        }

        async def arrangement(at: int, verify: Verify, count: int) -> None:
            sources = (urls[kind], well.url)[:count]
            async with trial(tmp_path / str(at), sources, cache.key, verify, PATIENT) as one:
                data, failure = await one.read_whole(VICTIM)
                assert re.search(UNREACHABLE[kind], one.stories()), one.stories()
                assert urls[kind] in one.stories()
                if count == 1:
                    assert failure is not None
                    assert failure.errno == errno.EIO
                    assert not data
                else:
                    assert (data, failure) == (VICTIM.nar, None)
                one.check_cache()

        in_all_arrangements(arrangement)


@pytest.mark.parametrize("fault", [Flipped(LATE), Status(404)], ids=["quarantined", "absent"])
def test_a_clock_that_was_set_back_prolongs_no_refusal(
    fault: Fault, caches: Callable[[str, bool], SignedCache], pool: Servers, tmp_path: Path
) -> None:
    cache = caches("none", True)
    kind = "nar" if isinstance(fault, Flipped) else "narinfo"

    async def arrangement(at: int, verify: Verify, count: int) -> None:
        bad = pool(cache)[at]
        bad.fail(cache.file("victim", kind), fault)
        async with trial(tmp_path / str(at), (bad.url,), cache.key, verify, PATIENT) as one:
            await one.read_whole(VICTIM)
            _, failure = await one.read_whole(VICTIM)
            assert failure is not None
            bad.heal()
            one.clock.now -= 365 * 86400
            assert await one.read_whole(VICTIM) == (VICTIM.nar, None)

    in_all_arrangements(arrangement)


# Through a real mount.

FAULTS: dict[str, tuple[Fault, str]] = {
    "reset": (Reset(20), "reset|closed|failed"),
    "cut": (Truncated(20), CUT),
    "failing": (Status(500), "HTTP status 500 after 3 tries"),
    "gone": (Status(410), "HTTP status 410"),
    "busy": (Status(503, {"Retry-After": "3600"}), "HTTP status 503"),
    "flipped": (Flipped(5000), "is not the signed one"),
    "flipped-tail": (Flipped(-1), "NAR of"),
    "endless": (Endless(), "wrong size|not a NAR"),
    "circle": (Status(302, {"Location": "/again"}), "redirects"),
    "short": (WrongLength(-5), "wrong size"),
}


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.parametrize(("verify", "count"), [("strict", 1), ("strict", 2), ("deferred", 2)])
def test_programs_get_the_right_bytes_or_an_io_error(
    verify: Verify, count: int, as_root: Caller, faulty_http: Callable[[Path], FaultyServer], tmp_path: Path
) -> None:
    made = {name: make_path(name) for name in (*FAULTS, "whole", "hidden")}
    cache = SignedCache(tmp_path / "cache", list(made.values()))
    bad, well = faulty_http(cache.directory), faulty_http(cache.directory)
    as_root.use(*[f"{bad.url}?priority=1", f"{well.url}?priority=2"][:count], key=cache.key)
    for name, (fault, _) in FAULTS.items():
        bad.fail(cache.file(name, "nar"), fault)
    bad.fail("/again", FAULTS["circle"][0])
    bad.fail(cache.file("hidden", "narinfo"), Status(500))

    def digest(name: str) -> str:
        return hashlib.sha256(made[name].data).hexdigest()

    store = Path("/nix/store")
    as_root.configure(
        negative_ttl=0.2
    )  # also the time after which an overlay looks at a condemned name again
    as_root.sources += ["--verify", verify]
    with as_root.environment_probe() as probe:

        def read(name: str) -> dict[str, Any]:
            answer = probe.ask("read", path=f"{store}/{made[name].path}/data")
            assert answer["seconds"] < LIMIT
            return answer

        def is_served(name: str) -> bool:
            return bool(read(name).get("digest") == digest(name))

        for name in FAULTS:
            answer = read(name)
            if count == 2 and verify == "deferred":  # at the latest when it is opened again
                assert eventually(partial(is_served, name))
            elif count == 2:
                assert (answer.get("error"), answer["digest"]) == (None, digest(name)), name
            else:
                assert (answer["error"], answer["size"]) == ("EIO", 0), name
        assert read("whole")["digest"] == digest("whole")
        hidden = read("hidden")
        assert hidden.get("error") == ("EIO" if count == 1 else None), hidden
        stories = as_root.stories()
        for name, (_, said) in FAULTS.items():
            assert re.search(f"-{name}: .*({said})", stories), (name, stories)
        bad.heal()
        for name in ("reset", "gone", "circle"):  # no hour to wait for
            assert is_served(name)
    assert not list((as_root.cache / "incoming").iterdir())
    assert not list((as_root.cache / "nars").rglob("*.part"))
