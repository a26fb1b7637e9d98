"""What one session (a run and its helpers) looked up, waited for and moved: the figures of ``veneer run``'s report."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from veneer.model.errors import VeneerError, printable
from veneer.model.path_info import PathInfo
from veneer.model.store_path import StorePath

from . import access


@dataclass(slots=True)
class PathCount:
    """Bytes moved for one store path: over the wire (all its objects) and of NAR."""

    wire: int = 0
    nar: int = 0
    requests: int = 0


@dataclass(slots=True)
class Prefetched:
    """What came of a trace that was brought, in its paths. ``changed``: another path stood for it. ``unmatched``: nobody has it, nor one like it.
    ``skipped``: the cache may not hold it as well. ``bytes``: of NARs, wanted of those that are done."""

    paths: int
    done: int = 0
    changed: int = 0
    unmatched: int = 0
    skipped: int = 0
    failed: int = 0
    bytes: int = 0

    def report(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True, eq=False)
class Account:
    """Counters of one session. Memory: a row per store path known to the session."""

    wire_bytes: int = 0
    requests: int = 0
    paths: dict[StorePath, PathCount] = field(default_factory=dict)
    closure: dict[StorePath, int] = field(default_factory=dict)
    """Every path of the closures looked up, with its NAR size."""
    closure_bytes: int = 0
    asked: dict[StorePath, int] = field(default_factory=dict)
    """Paths whose content a reader wanted, with the bytes read of each as far as they are known."""
    asked_bytes: int = 0
    """Of whole NARs."""
    scanned_paths: int = 0
    scanned_bytes: int = 0
    ahead: dict[StorePath, None] = field(default_factory=dict)
    """Paths fetched unasked."""
    ahead_bytes: int = 0
    ahead_wants: int = 1
    """The least ``access.allowance`` at which more would be fetched unasked."""
    linked: dict[tuple[int, int], None] = field(default_factory=dict)
    """(path number, offset in the NAR) of programs and libraries that were looked into."""
    linked_bytes: int = 0
    """Of libraries that were loaded unasked."""
    prefetched: Prefetched | None = None
    """Of the trace that was brought, as far as it is by now."""
    traced: set[StorePath] = field(default_factory=set)
    """Paths of traces that were brought: what will be wanted of them is known."""
    guided: set[StorePath] = field(default_factory=set)
    """Those of them that are still being loaded."""
    postponed: dict[StorePath, PathInfo] | None = None
    """As long as nothing else was looked up: those of its paths that were, of whose references nothing is asked for."""

    def is_guided(self, path: StorePath) -> bool:
        """Whether what is wanted of the path is on its way, because a trace told: waiting for it is no evidence for more."""
        return path in self.guided

    def ask(self, path: StorePath, nar_size: int) -> None:
        """Note that the content of ``path`` was wanted by a reader."""
        if path not in self.asked:
            self.asked[path] = 0
            self.asked_bytes += nar_size

    def ask_part(self, path: StorePath, size: int) -> None:
        """Note that ``size`` bytes of the content of ``path`` were wanted, which comes in parts."""
        self.asked.setdefault(path, 0)
        self.asked_bytes += size

    def read(self, path: StorePath, nar_size: int, size: int, *, listed: bool) -> None:
        """Note that ``size`` bytes more of ``path`` were read; what is read twice counts twice.

        ``listed``: its root directory was listed, as scans do, and programs that know their files do not.
        """
        self.ask(path, nar_size)
        before = self.asked[path]
        self.asked[path] = before + size
        if listed and before < access.SCANNED * nar_size <= before + size:
            self.scanned_paths += 1
            self.scanned_bytes += nar_size

    def know(self, path: StorePath, nar_size: int) -> None:
        """Note a path of a closure that was looked up."""
        if path not in self.closure:
            self.closure[path] = nar_size
            self.closure_bytes += nar_size
            self.ahead_wants = 1

    @property
    def evidence(self) -> access.Evidence:
        return access.Evidence(
            len(self.asked), self.asked_bytes, self.scanned_paths, self.scanned_bytes, self.closure_bytes
        )

    def meter(self, path: StorePath) -> Callable[[int], None]:
        """A ``sources.base.Meter`` that books on ``path``; making it counts one request."""
        count = self.paths.setdefault(path, PathCount())
        count.requests += 1
        self.requests += 1

        def book(size: int) -> None:
            count.wire += size
            self.wire_bytes += size

        return book

    def book_metadata(self, size: int) -> None:
        """Wire bytes of a narinfo, whose store path is not known before it arrived."""
        self.wire_bytes += size

    def report(self) -> dict[str, object]:
        return {
            "wire_bytes": self.wire_bytes,
            "requests": self.requests,
            "closure_paths": len(self.closure),
            "closure_bytes": self.closure_bytes,
            **({} if self.prefetched is None else {"prefetched": self.prefetched.report()}),
            "paths": {
                str(path): {"fetched_wire": c.wire, "fetched_nar": c.nar, "requests": c.requests}
                for path, c in self.paths.items()
            },
        }


@dataclass(frozen=True, slots=True)
class Story:
    """One failure that somebody saw or that a fall-back hid. ``time``: seconds since the epoch."""

    time: float
    kind: str
    path: str
    text: str


class Stories:
    """The newest failures, for ``veneer status``; the store's one place to put them."""

    def __init__(self, clock: Callable[[], float], limit: int = 200) -> None:
        self._clock = clock
        self._rows: deque[Story] = deque(maxlen=limit)

    def add(self, path: str, error: Exception) -> Story:
        text = error.story() if isinstance(error, VeneerError) else f"{type(error).__name__}: {error}"
        story = Story(self._clock(), type(error).__name__, printable(path), printable(text))
        self._rows.append(story)
        return story

    def rows(self) -> list[Story]:
        return list(self._rows)
