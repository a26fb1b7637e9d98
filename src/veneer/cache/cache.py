"""One cache directory, held by one daemon: the way into this layer.

``Cache.open`` takes the lock, migrates and repairs; after it every row and file can be believed. The numbered
invariants stand with what keeps them: I in ``index``, N in ``nars``, T in ``trees``, R in ``recovery``. Here:

C1  One daemon per directory (flock), one thread for everything but what says "any thread".
C2  A damaged index is moved aside and a new one made, with a new generation and other path numbers; the files of the
    old one go, because nothing says any more what they are.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from veneer.formats import tree_index
from veneer.model.store_path import StorePath

from . import directory, eviction, recovery
from .database import DamagedIndexError, checkpoint, damage_mark
from .index import Index, Unsynced
from .kinds import KINDS
from .nars import Nars
from .trees import Trees

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Evicted(NamedTuple):
    """A file that went (or would go). ``size``: bytes on disk; ``tree``: the tree file, not the NAR."""

    path_number: int
    store_path: StorePath
    size: int
    tree: bool


@dataclass(frozen=True, slots=True)
class Repaired:
    """What ``open`` found to do: for the log and ``status``. ``moved_aside``: where a damaged index went."""

    files_removed: int = 0
    rows_reset: int = 0
    rehashed: int = 0
    moved_aside: Path | None = None


@dataclass(frozen=True, slots=True)
class SyncBatch:
    """Files to make safe from power loss: ``begin_sync``, ``run`` in any thread, ``end_sync``."""

    root: Path
    files: tuple[Unsynced, ...]
    lost: tuple[Unsynced, ...] = ()
    """Files that the disk failed to take. They were removed: the kernel says it once and then takes them for written."""

    def run(self, go_on: Callable[[], bool] = lambda: True) -> SyncBatch:
        """fdatasync of the files, fsync of their directories, then of the index; then the marks. CacheError when one fails.

        What was made safe: less than all where ``go_on``, asked before each file, said no.
        """
        directories: set[Path] = set()
        done: list[Unsynced] = []
        lost: list[Unsynced] = []
        synced: dict[Path, recovery.Version] = {}
        at = self.root
        try:
            for file in self.files:
                if not go_on():
                    break
                at = self.root / KINDS[file.kind].file(file.number)
                try:
                    version = _sync(at, os.fdatasync)
                except OSError as error:
                    if error.errno != errno.EIO or file.kind == "sparse":
                        raise
                    at.unlink(missing_ok=True)
                    lost.append(file)
                    continue
                if version is not None:
                    synced[at] = version
                    directories.update((at.parent, at.parent.parent))
                done.append(file)
            for at in directories:
                _sync(at, os.fsync)
            at = self.root / directory.INDEX
            _sync(
                at.with_name(at.name + "-wal"), os.fdatasync
            )  # a reader may keep the checkpoint from doing it
            checkpoint(at)
            for at, version in synced.items():
                recovery.mark(at, version)
        except OSError as error:
            raise directory.cache_error(error, at, "write to") from error
        return SyncBatch(self.root, tuple(done), tuple(lost))


def _sync(path: Path, sync: Callable[[int], None]) -> recovery.Version | None:
    """What was synced; None: dropped meanwhile, and its mark with it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        version = recovery.version(fd)
        sync(fd)
        return version
    finally:
        os.close(fd)


def read_boot_id() -> str:
    """Names this run of the kernel; "" where /proc is not there (then every start counts as after a power loss)."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


class Cache:
    """See the module. A context manager that closes."""

    root: Path
    generation: bytes
    index: Index
    nars: Nars
    trees: Trees
    repaired: Repaired

    def __init__(
        self,
        root: Path,
        index: Index,
        lock: int,
        *,
        clock: Callable[[], float],
        max_bytes: int | None,
        fault: Callable[[str], None],
    ) -> None:
        """``Cache.open`` calls it."""
        self.root = root
        self.index = index
        self.generation = index.generation
        self.nars = Nars(root, index, fault)
        self.trees = Trees(root, index, fault)
        self.max_bytes = max_bytes
        self.repaired = Repaired()
        self._lock = lock
        self._clock = clock
        self._fault = fault

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        clock: Callable[[], float],
        max_bytes: int | None = None,
        shared: bool = False,
        lock_seconds: float = 0,
        boot_id: Callable[[], str] = read_boot_id,
        fault: Callable[[str], None] = lambda step: None,
    ) -> Cache:
        """Makes or opens the cache in ``root``.

        ``clock``: seconds since the epoch. ``max_bytes``: what ``evict`` keeps to; None: no limit. ``shared``: other
        users' mount servers may read. ``lock_seconds``: how long to wait for a daemon that ends. ``fault``: told each numbered step of writing (for crash tests).
        CacheError: another daemon owns it, another user's, written by a newer Veneer, or the file system refuses.
        """
        directory.prepare(root, shared=shared)
        lock = directory.lock(root, seconds=lock_seconds)
        moved: Path | None = None
        try:
            while True:
                try:
                    index = Index(root / directory.INDEX, fault=fault)
                    try:
                        cache = cls(root, index, lock, clock=clock, max_bytes=max_bytes, fault=fault)
                        cache._repair(boot_id(), moved)
                        return cache
                    except BaseException:
                        index.abandon()
                        raise
                except DamagedIndexError:
                    if moved is not None:
                        raise
                    moved = _move_aside(root / directory.INDEX, clock())
        except BaseException:
            os.close(lock)
            raise

    def evict(
        self,
        *,
        max_bytes: int | None = None,
        need: int = 0,
        dry_run: bool = False,
        busy: Set[int] = frozenset(),
    ) -> list[Evicted]:
        """Drops what the limit (or the disk, for ``need`` bytes that are about to be written) asks for.

        ``max_bytes``: another limit, this once. ``busy``: numbers to leave alone. Readers are not disturbed; the caller
        tells mount servers which files to close. It may free less than asked: what is pinned stays.
        """
        limit = self.max_bytes if max_bytes is None else max_bytes
        free = self.nars.free() if need else None
        if free is not None and need > free and not dry_run:
            free += self.nars.empty_quarantine()
        totals = self.index.totals()
        excess = eviction.excess(totals.nar_bytes + totals.tree_bytes, limit, need, free)
        if not excess:
            return []
        steps = eviction.plan(
            (eviction.Candidate(r.number, r.store_path, r.disk_size) for r in self.index.nars()),
            (
                eviction.Candidate(r.number, r.store_path, r.tree_size)
                for r in self.index.trees_unused_since(self._clock() - eviction.TREE_REST)
            ),
            excess=excess,
            pinned={path for paths in self.index.pins().values() for path in paths},
            busy=busy,
        )
        if not dry_run:
            self._drop(steps)
        return [Evicted(step.number, step.store_path, step.size, step.tree) for step in steps]

    def begin_sync(self) -> SyncBatch:
        """What a power loss may still empty (N4). Now and then: ``end_sync(batch)`` after ``batch.run()``."""
        self.index.flush()
        return SyncBatch(self.root, tuple(self.index.unsynced()))

    def end_sync(self, batch: SyncBatch) -> list[int]:
        """Notes what was made safe, and what was lost: the numbers of these NARs, for mount servers to close."""
        listed = self.index.unsynced() if batch.lost else []
        lost = [file for file in batch.lost if file in listed]  # else fetched again meanwhile
        if lost:
            self.index.forget_files(
                trees=[file.number for file in lost if file.kind == "tree"],
                nars=[file.number for file in lost if file.kind == "nar"],
            )
        self.index.mark_synced(batch.files)
        return [file.number for file in lost if file.kind == "nar"]

    def is_in_place(self) -> bool:
        """Whether the directory is still the one that was opened: not deleted, nor another in its place."""
        try:
            return os.path.samestat(os.fstat(self._lock), (self.root / directory.LOCK).stat())
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Commits and gives the lock back."""
        if self._lock < 0:
            return
        try:
            self.index.close()
        finally:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- details

    def _drop(self, steps: Iterable[eviction.Drop]) -> None:
        """N3 for many: the files, then their rows in one transaction, also of those done before a failure."""
        nars: list[int] = []
        trees: list[int] = []
        file = self.root
        try:
            for step in steps:
                for file in (self.trees.path(step.number),) if step.tree else self.nars.files(step.number):
                    file.unlink(missing_ok=True)
                (trees if step.tree else nars).append(step.number)
                self._fault("evict.unlinked")
        except OSError as error:
            raise directory.cache_error(error, file, "remove from") from error
        finally:
            self.index.forget_files(trees=trees, nars=nars)

    def _repair(self, boot: str, moved: Path | None) -> None:
        index = self.index
        power_lost = not boot or index.fact("boot") != boot
        tree_format = str(tree_index.VERSION)
        if index.fact("tree_format") != tree_format:
            index.forget_files(trees=[row.number for row in index.with_files()])
            index.set_fact("tree_format", tree_format)
        doubtful = index.unsynced() if power_lost else []
        steps = recovery.plan(
            index.with_files(), recovery.scan(self.root), doubtful=doubtful, power_lost=power_lost
        )
        recovery.act(self.root, index, steps)
        index.mark_synced(doubtful)  # what was read back came from the disk; what differed is gone
        if boot != index.fact("boot"):
            index.set_fact("boot", boot)
        self.repaired = Repaired(
            files_removed=sum(isinstance(step, recovery.Remove) for step in steps),
            rows_reset=sum(isinstance(step, recovery.Reset) for step in steps),
            rehashed=sum(isinstance(step, recovery.Rehash) for step in steps),
            moved_aside=moved,
        )


def _move_aside(index: Path, now: float) -> Path:
    """Renames a damaged index and its WAL; only the last such index is kept (they can be big)."""
    try:
        for old in index.parent.glob(f"{index.name}.corrupt-*"):
            old.unlink()
        aside = index.with_name(f"{index.name}.corrupt-{int(now)}")
        for suffix in ("", "-wal", "-shm"):
            file = index.with_name(index.name + suffix)
            if file.exists():
                file.rename(aside.with_name(aside.name + suffix))
        damage_mark(index).unlink(missing_ok=True)
    except OSError as error:
        raise directory.cache_error(error, index, "move aside the index of") from error
    return aside
