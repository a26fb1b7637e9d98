"""Threads for blocking questions that must not outlive the process.

Why not ``asyncio.to_thread``: its threads are joined at exit, so that one stalled server would hold the daemon's end up.
Why not the object store client's own coroutines for small objects: each awaits twice, and each await costs a wake-up of
the event loop through a system call; measured on narinfos, a blocking call in a thread takes less than half the
processor time. Answers that arrive while the loop is busy share one wake-up here.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
IDLE_SECONDS = 10.0
"""A thread that nobody needed for as long ends: a daemon keeps the sources of many views. The event loop counts, because
``SimpleQueue.get`` with a time limit can wait for ever when several threads do (Python 3.11)."""
_Dispose = Callable[[Any], object] | None
_Job = tuple["asyncio.Future[Any]", Callable[..., Any], tuple[Any, ...], _Dispose]
_Result = tuple["asyncio.Future[Any]", Any, BaseException | None, _Dispose]


class Workers:
    """At most ``most`` daemon threads, started when needed and ended when they are not. One event loop."""

    def __init__(self, most: int, name: str, *, idle_seconds: float = IDLE_SECONDS) -> None:
        self._idle_seconds = idle_seconds
        self._most = most
        self._name = name
        self._threads = 0
        self._open = 0
        """Jobs handed over whose result has not been delivered."""
        self._needed = 0
        """The most of ``_open`` since the timer was set."""
        self._timer: asyncio.TimerHandle | None = None
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._results: deque[_Result] = deque()
        self._waking = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def run(
        self, function: Callable[..., T], *args: object, dispose: Callable[[T], object] | None = None
    ) -> T:
        """``function(*args)`` on a thread. Cancelling lets it run to its end unheard, or drops it if it still waits.

        ``dispose`` gets the result that a cancelled caller did not take: for results that must be closed.
        """
        if self._closed:
            raise RuntimeError("closed")
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._open += 1
        self._needed = max(self._needed, self._open)
        self._jobs.put((future, function, args, dispose))
        if self._threads < min(self._open, self._most):
            self._threads += 1
            threading.Thread(target=self._work, args=(loop,), name=self._name, daemon=True).start()
        try:
            return await future
        except asyncio.CancelledError:
            # It may have come at the moment of cancelling; asking for its exception tells asyncio that it was not lost.
            if not future.cancelled() and future.exception() is None and dispose is not None:
                dispose(future.result())
            raise

    def close(self) -> None:
        """Let the threads end, each after its present job."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for _ in range(self._threads):
            self._jobs.put(None)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            future, function, args, dispose = job
            result, failure = None, None
            if not future.cancelled():
                try:
                    result = function(*args)
                except BaseException as error:  # noqa: BLE001 - delivered to the caller, a panic of native code as well
                    failure = error
            self._results.append((future, result, failure, dispose))
            del job, future, function, args, dispose, result, failure
            if not self._waking:
                self._waking = True
                try:
                    loop.call_soon_threadsafe(self._deliver)
                except RuntimeError:  # the loop is closed: nobody waits any more
                    return

    def _retire(self) -> None:
        """Let the threads end that nobody needed since the timer was set."""
        self._timer = None
        for _ in range(self._threads - self._needed):
            self._threads -= 1
            self._jobs.put(None)
        self._needed = self._open
        self._set_timer()

    def _set_timer(self) -> None:
        if self._threads > self._open and self._timer is None and self._loop is not None and not self._closed:
            self._timer = self._loop.call_later(self._idle_seconds, self._retire)

    def _deliver(self) -> None:
        self._waking = False  # before the results are taken: whoever adds one from now on wakes again
        while self._results:
            future, result, failure, dispose = self._results.popleft()
            self._open -= 1
            if not future.cancelled():
                if failure is None:
                    future.set_result(result)
                else:
                    future.set_exception(failure)
            elif dispose is not None and result is not None:
                dispose(result)
        self._set_timer()
