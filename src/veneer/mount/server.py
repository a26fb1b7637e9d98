"""The mount server's threads: some that answer the kernel, one for the daemon, one for notices to the kernel."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import resource
import threading
from collections.abc import Callable
from typing import TypedDict

from veneer.formats import fuse_wire as wire
from veneer.formats.tree_index import Kind, TreeIndex, node_id
from veneer.model.errors import VeneerError

from .content import Contents
from .dispatch import Reply, Shared, Worker
from .misses import MAX_PARKED, MISS_SECONDS, Misses, Parked
from .recording import Recording
from .session import Session
from .stories import Events, Stories, Story, no_events
from .tally import PathReport, Tally
from .trees import Trees

INVALIDATE_RETRY = 0.2
"""Seconds between looks at whether an INVAL_ENTRY can be written without blocking."""


class Report(TypedDict):
    paths: dict[int, PathReport]
    failures: list[Story]
    failure_count: int
    waiting: int
    """Requests parked now."""
    session: dict[str, int] | None


class MountServer:
    """Serves one mount. The descriptors stay the caller's; both must stay open while it runs.

    ``view``: what HELLO brings, see the daemon. ``session``: what a predecessor agreed with the kernel, when this server
    takes over a mount that runs already. ``agreed``: told of a new session before INIT is answered; must not raise.
    ``since``: when the mount's first server began, in monotonic seconds (default: now). ``host_store``: descriptor of a store directory that an overlay has beneath this mount;
    names in it are absent here. It must be one that answers at once, for it is asked by the threads that answer the kernel.
    ``recording``: what notes touches for a trace.
    ``run`` may be called once.
    """

    def __init__(
        self,
        fuse_fd: int,
        cache_dirfd: int,
        view: dict[str, object] | None,
        *,
        threads: int = 2,
        events: Events = no_events,
        miss_seconds: float = MISS_SECONDS,
        session: Session | None = None,
        agreed: Callable[[Session], None] | None = None,
        since: float | None = None,
        host_store: int | None = None,
        recording: Recording | None = None,
        max_parked: int = MAX_PARKED,
    ) -> None:
        self._fd = fuse_fd
        self._threads = threads
        self._stories = Stories(events)
        self._tally = Tally(since)
        # The one before may have died of a page that its disk had lost; who maps that again dies of it as well.
        self._trees = Trees(cache_dirfd) if session is None else Trees(cache_dirfd, read_first=None)
        self._contents = Contents(cache_dirfd)
        self._misses = Misses(
            cache_dirfd,
            view,
            self._trees,
            self._contents,
            self._stories,
            self._tally,
            seconds=miss_seconds,
            max_parked=max_parked,
        )
        self._shared = Shared(
            cache_dirfd,
            self._trees,
            self._contents,
            self._misses,
            self._stories,
            self._tally,
            host_store,
            recording,
        )
        self._shared.session = session
        if agreed is not None:
            self._shared.agreed = agreed
        self._misses.answer = self._answer
        self._misses.quarantined = self._quarantined
        self._misses.renewed = self._renewed
        self._answerer = Worker(self._shared)
        self._notices: queue.SimpleQueue[Callable[[], bool] | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._left = threads
        self._lock = threading.Lock()
        self._crash: BaseException | None = None

    def run(self) -> None:
        """Blocks until unmounted, or until ``stop``. Raises what broke the device, if something did."""
        _allow_many_files()
        session = self._shared.session
        if session is not None and session.can_resend:
            self._write_notice(wire.resend())  # what a predecessor read and did not answer
        jobs = [self._serve] * self._threads + [self._misses.run, self._notify]
        names = [f"fuse-{i}" for i in range(self._threads)] + ["misses", "notices"]
        for name, job in zip(names, jobs, strict=True):
            threading.Thread(target=self._guard, args=(job,), name=name, daemon=True).start()
        self._ended.wait()
        self._misses.stop()
        self._notices.put(None)
        if self._crash is not None:
            raise self._crash

    def stop(self) -> None:
        """Makes ``run`` return. What the kernel still waits for ends with the descriptor, or goes to a successor."""
        self._ended.set()

    def report(self) -> Report:
        """What was read, waited for and refused so far. From any thread."""
        return {
            "paths": self._tally.report(),
            "failures": self._stories.recent(),
            "failure_count": self._stories.count,
            "waiting": self._misses.waiting(),
            "session": None if self._shared.session is None else self._shared.session.to_json(),
        }

    @property
    def session(self) -> Session | None:
        return self._shared.session

    def _guard(self, job: Callable[[], None]) -> None:
        """A thread that dies takes the server down, loudly, rather than leave readers hanging."""
        try:
            job()
        except BaseException as error:  # noqa: BLE001
            self._crash = error
            self._ended.set()

    def _serve(self) -> None:
        Worker(self._shared).serve(self._fd, self._ended.is_set)
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._ended.set()

    # On the misses thread.

    def _answer(self, parked: Parked, code: int) -> None:
        reply: Reply = wire.error_reply(parked.unique, code) if code else self._answerer.handle(parked)
        if reply is None:
            return
        try:
            os.writev(self._fd, reply if isinstance(reply, tuple) else (reply,))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                self._stories.tell_error(error, "reply to a request that waited")

    def _quarantined(self, number: int, name: bytes, index: TreeIndex | None) -> None:
        self._notices.put(lambda: self._forget_pages(number, index))
        self._notices.put(lambda: self._forget_name(name))

    def _renewed(self, names: list[bytes]) -> None:
        for name in names:
            self._notices.put(lambda name=name: self._forget_name(name))  # type: ignore[misc]

    # On the notices thread, because these writes wait for locks that readers hold until we answer them.

    def _notify(self) -> None:
        later: list[Callable[[], bool]] = []
        while True:
            try:
                notice = self._notices.get(timeout=INVALIDATE_RETRY if later else None)
            except queue.Empty:
                later = [n for n in later if not n()]
                continue
            if notice is None:
                return
            if not notice():
                later.append(notice)

    def _forget_name(self, name: bytes) -> bool:
        """False: not now. While a LOOKUP in the root waits, the write would block, and with it all later LOOKUPs."""
        if self._misses.root_lookups():
            return False
        self._write_notice(wire.inval_entry(wire.ROOT_NODE, name))
        return True

    def _forget_pages(self, number: int, index: TreeIndex | None) -> bool:
        files: list[int] = []
        try:
            if index is not None:
                files = [e.number for _, e in index.walk() if e.kind <= Kind.EXECUTABLE]
        except VeneerError as error:
            self._stories.tell_error(error, f"path {number}: files to forget")
        for entry in (0, *files):
            self._write_notice(wire.inval_inode(node_id(number, entry)))
        return True

    def _write_notice(self, notice: bytes) -> None:
        """ENOENT: the kernel does not know it. ENODEV: unmounted. ENOTCONN, EPERM: no INIT yet."""
        with contextlib.suppress(FileNotFoundError):
            try:
                os.write(self._fd, notice)
            except OSError as error:
                if error.errno not in (
                    errno.ENOENT,
                    errno.ENODEV,
                    errno.ENOTDIR,
                    errno.ENOTCONN,
                    errno.EPERM,
                ):
                    self._stories.tell_error(error, "notice to the kernel")


def _allow_many_files() -> None:
    """Each mapped tree and each open NAR costs a descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 1 << 16
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, 1 << 16), hard))
