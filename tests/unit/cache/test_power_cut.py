"""The daemon is killed, or the power goes, at every numbered step of writing; then everything is opened and fetched again.

The steps are those that a recording run of ``work`` reaches, so a new step of the cache is covered by itself. A power cut
takes more than a kill: what nobody had synced is lost in one of the ways of ``LOSSES``, and the machine comes up with
another boot id. VENEER_LONG=1 tries every loss at every step; without it each step has one of them, in turn.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.caches import Clock, until_learnt
from tests.support.caches import row as row_of
from tests.support.signed_cache import MadePath, SignedCache, make_path
from veneer.cache.cache import Cache, Repaired, SyncBatch
from veneer.cache.checking import check_alone
from veneer.cache.directory import INDEX
from veneer.cache.index import NarState
from veneer.daemon.compose import build_view
from veneer.store import access
from veneer.store.account import Account
from veneer.store.store import Limits, Notices, Store
from veneer.store.views import View, ViewConfig

LONG = bool(os.environ.get("VENEER_LONG"))
Told = Callable[[str], None]

MADE = [*(make_path(f"power-{i}", 20_001 + 4096 * i) for i in range(3)), make_path("power-3", 1_400_001)]
LIAR = 2
"""Of MADE: its listing has a name that its NAR has not."""


@dataclass(frozen=True)
class Source:
    cache: SignedCache

    def view(self, cache: Cache) -> View:
        config = {
            "sources": [{"url": f"file://{self.cache.directory}", "verify": "strict"}],
            "keys": [self.cache.key],
        }
        return build_view(ViewConfig.from_json(config), cache, Clock())


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: a real disk would be waited for, and what it keeps is modelled here."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="veneer-power-cut-") as directory:
        yield Path(directory)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setattr(access, "FILE", 0)  # of a NAR in parts what is asked for: the same steps each time
    monkeypatch.setattr(access, "rest_pays", lambda waited, missing, rate, times: False)
    made = SignedCache(tmp_path / "source", MADE)
    listing = made.directory / f"{MADE[LIAR].path.hash_part}.ls"
    listing.write_bytes(listing.read_bytes().replace(b"a-program", b"b-program"))
    return Source(made)


def open_cache(root: Path, boot: str, fault: Told = lambda step: None) -> Cache:
    return Cache.open(root, clock=Clock(), boot_id=lambda: boot, fault=fault)


async def fetched(store: Store, view: View, made: MadePath) -> None:
    """The path as a reader gets it: its tree, then its bytes."""
    account = Account()
    await store.lookup(view, made.path, account)
    row = await store.whole(view, made.path, account)
    data = await asyncio.to_thread(store.cache.nars.path(row.number).read_bytes)
    assert data == made.nar


async def with_store(
    cache: Cache, source: Source, body: Callable[[Store, View], Coroutine[None, None, None]]
) -> None:
    notices = Notices(lambda number: None, lambda number, path: None, lambda path: None)
    store = Store(cache, Clock(), notices, Limits(prefetch=False))
    view = source.view(cache)
    try:
        await body(store, view)
    finally:
        await store.close()
        await view.close()


def work(root: Path, source: Source, fault: Told) -> None:
    """What a daemon does in its days: trees, NARs, a listing that lies, sync, eviction, a pin, parts, an unfinished download."""

    async def day(store: Store, view: View) -> None:
        cache = store.cache
        await fetched(store, view, MADE[0])
        await fetched(store, view, MADE[1])
        sync(cache.begin_sync())
        await fetched(store, view, MADE[LIAR])
        cache.index.pin("ci", [MADE[1].path])
        store.evict(1)
        await fetched(store, view, MADE[0])
        await fetched(store, view, MADE[3])
        row = cache.index.path_of(MADE[3].path, source.cache.infos[MADE[3].path.name].nar_hash)
        assert row is not None
        cache.trees.drop(row.number)
        cache.nars.drop(row.number)
        sync(cache.begin_sync())
        await fetched(store, view, MADE[3])
        await until_learnt(cache, row.number)
        store.evict(1)
        for offset in (0, 900_000):
            await store.content(view, row.number, offset, 1000, Account())
            sync(cache.begin_sync())
        assert row_of(cache, row.number).nar is NarState.SPARSE
        await store.whole(view, MADE[3].path, Account())
        cache.nars.incoming(row.number).write(b"half")
        fault("work.unfinished")

    def sync(batch: SyncBatch) -> None:
        done = batch.run()
        fault("work.synced")
        cache.end_sync(done)

    cache = open_cache(root, "boot-1", fault)
    asyncio.run(with_store(cache, source, day))
    cache.close()
    fault("work.closed")
    cache = open_cache(root, "boot-1", fault)
    cache.close()


# -- what the disk has


@dataclass(frozen=True)
class Disk:
    """Of a cache in ``root``: what was made safe by fsync, told by a child that may die any moment, and every file that had a name."""

    root: Path
    beside: Path

    def watch(self) -> Told:
        """In the child: records what is synced, and keeps each version of each file. To be called at each step."""
        log = os.open(self.beside / "synced", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for name in ("fsync", "fdatasync"):
            real = getattr(os, name)

            def synced(fd: int, real: Callable[[int], None] = real) -> None:
                real(fd)
                os.write(log, f"{os.fstat(fd).st_ino}\n".encode())

            setattr(os, name, synced)

        def step(_: str) -> None:
            for file in published(self.root):
                kept = self.beside / f"{file.name}.{file.stat().st_ino}"
                if file.parent != self.root / "incoming" and not kept.exists():
                    os.link(file, kept)

        return step

    def lost(self) -> Lost:
        """What a power cut may take now."""
        log = self.beside / "synced"
        safe = {int(line) for line in log.read_text().split()} if log.exists() else set()
        unsafe = tuple(
            str(file.relative_to(self.root))
            for file in published(self.root)
            if not {file.stat().st_ino, file.parent.stat().st_ino} <= safe
        )
        return Lost(unsafe, tuple(file for file in self.beside.iterdir() if file != log))


@dataclass(frozen=True)
class Lost:
    """``unsafe``: names of files of which nobody synced bytes and name. ``earlier``: all that ever were, as NAME.INODE."""

    unsafe: tuple[str, ...]
    earlier: tuple[Path, ...]


def published(root: Path) -> list[Path]:
    found = [file for top in ("trees", "nars") for file in sorted((root / top).glob("*/*"))]
    return [*found, *(root / "incoming").glob("*")]


def rewrite(file: Path, data: bytes) -> None:
    file.unlink()
    file.write_bytes(data)
    file.chmod(0o444)


def zeroed(root: Path, lost: Lost) -> None:
    for name in lost.unsafe:
        rewrite(root / name, bytes((root / name).stat().st_size))


def emptied(root: Path, lost: Lost) -> None:
    for name in lost.unsafe:
        rewrite(root / name, b"")


def with_holes(root: Path, lost: Lost) -> None:
    for name in lost.unsafe:
        data = (root / name).read_bytes()
        middle = len(data) // 2 & ~4095
        rewrite(root / name, data[:middle] + bytes(min(4096, len(data) - middle)) + data[middle + 4096 :])


def unnamed(root: Path, lost: Lost) -> None:
    for name in lost.unsafe:
        (root / name).unlink()


def undropped(root: Path, lost: Lost) -> None:
    """Removals that never reached the disk."""
    for kept in lost.earlier:
        name = kept.name.rpartition(".")[0]
        top = "trees" if name.endswith(".tree") else "nars"
        place = root / top / name[10:12] / name
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            shutil.copy2(kept, place)


def without_rows(root: Path, lost: Lost) -> None:
    """Of the index, all that its WAL held."""
    cut_wal(root, 0.0)


def with_half_the_rows(root: Path, lost: Lost) -> None:
    cut_wal(root, 0.5)
    zeroed(root, lost)


def cut_wal(root: Path, part: float) -> None:
    """A commit does not wait for the WAL to be on the disk: a beginning of it is left."""
    wal = root / f"{INDEX}-wal"
    if wal.exists():
        os.truncate(wal, int(wal.stat().st_size * part))


def nothing(root: Path, lost: Lost) -> None:
    """All had reached the disk."""


LOSSES = (zeroed, emptied, with_holes, unnamed, undropped, without_rows, with_half_the_rows, nothing)


# -- the kill


def steps_of(tmp_path: Path, source: Source) -> list[str]:
    steps: list[str] = []
    work(tmp_path / "recorded", source, steps.append)
    return steps


def killed_at(disk: Disk, source: Source, last: int) -> None:
    """Runs ``work`` in a child that kills itself at step ``last``."""
    child = os.fork()
    if child == 0:
        try:
            keep = disk.watch()
            done = 0

            def fault(step: str) -> None:
                nonlocal done
                keep(step)
                if done == last:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1

            work(disk.root, source, fault)
        finally:
            os._exit(1)  # also when the work fails: the parent expects a kill
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def assert_clean(root: Path) -> None:
    """Nothing is wrong in the cache: every file whole and wanted, every row with its file, the index sound."""
    report = check_alone(root, drop=False, clock=Clock())
    assert report.findings == []
    assert report.files == report.nars + report.trees
    with closing(sqlite3.connect(root / INDEX)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def assert_recovers(root: Path, source: Source, boot: str) -> None:
    open_cache(root, boot).close()
    assert_clean(root)

    async def again(store: Store, view: View) -> None:
        for made in MADE:
            await fetched(store, view, made)

    with open_cache(root, boot) as cache:
        assert cache.repaired == Repaired()
        asyncio.run(with_store(cache, source, again))
    assert_clean(root)
    with open_cache(root, boot) as cache:
        assert cache.index.totals().nars == len(MADE)


pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def test_the_work_reaches_every_kind_of_step(tmp_path: Path, source: Source) -> None:
    assert {
        "index.path_added", "index.path_replaced", "index.before_commit",
        "nar.before_rename", "nar.renamed", "nar.recorded", "nar.unlinked",
        "tree.before_rename", "tree.renamed", "tree.recorded", "tree.unlinked",
        "evict.unlinked", "work.synced", "work.unfinished", "work.closed",
    } <= set(steps_of(tmp_path, source))  # fmt: skip


def test_after_a_kill_or_power_cut_at_any_step_only_verified_files_are_left(
    tmp_path: Path, source: Source
) -> None:
    steps = steps_of(tmp_path, source)
    assert len(steps) > 40
    for last, step in enumerate(steps):
        disk = Disk(tmp_path / "cache", tmp_path / "beside")
        disk.beside.mkdir()
        killed_at(disk, source, last)
        for loss in LOSSES if LONG else (LOSSES[last % len(LOSSES)],):
            lost = shutil.copytree(disk.root, tmp_path / "lost", symlinks=True)
            (lost / f"{INDEX}-shm").unlink(missing_ok=True)
            loss(lost, disk.lost())
            with told(f"after {loss.__name__} at step {last}, {step}"):
                assert_recovers(lost, source, "boot-2")
            shutil.rmtree(lost)
        with told(f"killed at step {last}, {step}"):
            assert_recovers(disk.root, source, "boot-1")
        shutil.rmtree(disk.root)
        shutil.rmtree(disk.beside)


@contextmanager
def told(where: str) -> Iterator[None]:
    """Says with a failure where it was."""
    try:
        yield
    except BaseException as error:
        error.add_note(where)
        raise
