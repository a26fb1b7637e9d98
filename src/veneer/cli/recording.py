"""``--trace FILE``: what mount servers note while a command runs (``formats.touches``), and the trace that is made of it.

The notes lie in a temporary file, which survives every server; its path is what servers and their successors are told. The trace
is written when the block ends, however it ends: then with what was touched until then.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from veneer.cli.client import Client
from veneer.cli.output import Output, count
from veneer.cli.private_daemon import WatchedDaemon
from veneer.formats import touches, trace
from veneer.formats.trace import Trace, TracedFile, TracedPath
from veneer.formats.tree_index import Kind, TreeIndex, tree_file
from veneer.model.errors import FormatError, LimitError, UsageError, VeneerError
from veneer.model.hashes import Hash
from veneer.model.program import Program
from veneer.model.store_path import StorePath

TREE_SECONDS = 5.0
"""How long the daemon may take to have a tree again that was evicted."""

Known = tuple[Hash, int, TreeIndex | None]
"""A path's NAR hash, NAR size, and tree."""
Recall = Callable[[int, StorePath, bool], Known | None]
"""(path number, its name, whether files of it were read: then its tree is wanted) -> what is known of it; None: nothing any more."""


@contextlib.contextmanager
def recorded(file: str, cache_dir: Path, client: Callable[[], Client], output: Output) -> Iterator[Path]:
    """Gives the path of the notes, for ``RunSpec.notes``; writes the trace to ``file`` at the end.

    ``client``: the daemon at the end. UsageError: the file cannot be written. VeneerError at the end, unless the block
    raised: then a warning.
    """
    target = Path(file).absolute()  # the command may take the directory away from under us
    if target.is_dir() or not os.access(target.parent, os.W_OK | os.X_OK):
        raise UsageError("a trace cannot be written there", where=file)
    fd, name = tempfile.mkstemp(prefix="veneer-touches-")
    os.close(fd)
    notes = Path(name)
    try:
        yield notes
    except BaseException:
        try:
            _finish(notes, target, cache_dir, client, output)
        except VeneerError as error:
            output.warning(f"no trace: {error.story()}")
        raise
    else:
        _finish(notes, target, cache_dir, client, output)
    finally:
        notes.unlink(missing_ok=True)


def _finish(notes: Path, target: Path, cache_dir: Path, client: Callable[[], Client], output: Output) -> None:
    data = notes.read_bytes()
    if len(data) > touches.MAX_SIZE - 2 * touches.ROW_SIZE - 256:
        output.warning("the trace is cut off: more was read than it can hold")
    made = made_of(touches.parse(data), _Paths(cache_dir, client).recall)
    with contextlib.suppress(LimitError):
        write(target, trace.encode(made))
        output.note(f"trace of {count(len(made), 'store path')} in {target}")
        return
    half = made
    while half:
        half = half[: len(half) // 2]
        with contextlib.suppress(LimitError):
            write(target, trace.encode(half))
            output.warning(f"the trace is cut off after {count(len(half), 'store path')}: it is too large")
            return


def made_of(rows: Iterable[touches.Touched], recall: Recall) -> Trace:
    """The trace. Paths of which nothing is known are left out, and reads of what is no file."""
    names: dict[int, StorePath] = {}
    reads: dict[int, dict[int, list[tuple[int, int]]]] = {}
    for row in rows:
        if row.name is not None:
            names.setdefault(row.number, row.name)
        else:
            reads.setdefault(row.number, {}).setdefault(row.entry, []).append((row.offset, row.size))
    paths = []
    for number, name in names.items():
        known = recall(number, name, number in reads)
        if known is not None:
            nar_hash, nar_size, tree = known
            files = () if tree is None else tuple(_files(tree, reads.get(number, {})))
            paths.append(TracedPath(name, nar_hash, nar_size, files))
    return trace.from_rows(trace.to_rows(tuple(paths)))  # a path that was condemned has two numbers


def _files(tree: TreeIndex, reads: dict[int, list[tuple[int, int]]]) -> Iterator[TracedFile]:
    for number, ranges in reads.items():
        try:
            entry = tree.entry(number)
            name = tree.path(number)
        except FormatError:
            continue
        if entry.kind <= Kind.EXECUTABLE:
            clipped = trace.clip(ranges, entry.size)
            if clipped:
                yield TracedFile(name, entry.size, clipped)


def write(target: Path, data: bytes) -> None:
    """The file, whole or as it was before. VeneerError."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise VeneerError(f"cannot write the trace: {error.strerror}", where=str(target)) from error


def read(file: str) -> Trace:
    """A trace's file. UsageError: it cannot be read. FormatError: it is none."""
    try:
        with open(file, "rb") as opened:
            data = opened.read(trace.MAX_SIZE + 1)
    except OSError as error:
        raise UsageError(f"cannot read the trace: {error.strerror}", where=file) from error
    try:
        return trace.decode(data)
    except FormatError as error:
        where = f"{file}: {error.where}" if error.where else file
        raise FormatError(error.what, where=where, hint=error.hint) from error


def request(made: Trace, roots: Sequence[str] = ()) -> dict[str, object]:
    """Arguments of the daemon's ``prefetch``."""
    return {"trace": trace.to_rows(made), "roots": list(roots)}


@dataclass(slots=True)
class Prefetching:
    """Has the daemon, and each that follows it, prefetch a trace as long as we are connected. Implements ``environment.Companion``."""

    daemon: WatchedDaemon
    wanted: dict[str, object]
    told: Client | None = None

    def begin(self) -> Prefetching:
        """Does not wait for the daemon."""
        if self.daemon.client is not self.told:
            self.told = self.daemon.client
            with contextlib.suppress(VeneerError):  # it has gone; the next one is asked
                self.told.tell("prefetch", self.wanted)
        return self

    def fileno(self) -> int:
        return self.daemon.fileno()

    def readable(self) -> bool:
        is_there = self.daemon.readable()
        if is_there:
            self.begin()
        return is_there

    def adopt(self, program: Program) -> None:
        self.daemon.adopt(program)


@dataclass(slots=True)
class _Paths:
    """Of the cache directory. A tree that was evicted meanwhile is asked for again; of a directory that was never looked into there may be none."""

    cache_dir: Path
    client: Callable[[], Client]
    gone: bool = field(default=False)
    """The daemon does not answer."""

    def recall(self, number: int, name: StorePath, was_read: bool) -> Known | None:
        try:
            return self._mapped(number)
        except FileNotFoundError:
            pass
        except (OSError, VeneerError):
            return None
        if self.gone:
            return None
        try:
            if not was_read:
                return self._told(name)
            self.client().control("tree", {"path": name.basename}, seconds=TREE_SECONDS)
            return self._mapped(number)
        except FileNotFoundError:
            return None  # it has another number by now
        except (OSError, VeneerError):
            self.gone = True
            return None

    def _mapped(self, number: int) -> Known:
        with open(self.cache_dir / tree_file(number), "rb") as file:
            tree = TreeIndex(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return Hash("sha256", tree.nar_hash), tree.nar_size, tree

    def _told(self, name: StorePath) -> Known:
        """By the daemon, which remembers the path's narinfo."""
        said = self.client().control(
            "closure", {"paths": [name.basename], "alone": True}, seconds=TREE_SECONDS
        )
        rows = said["paths"]
        assert isinstance(rows, list)
        return Hash.parse(str(rows[0]["nar_hash"])), int(rows[0]["nar_size"]), None
