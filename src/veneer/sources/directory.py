"""Objects in a directory: ``file://`` binary caches, on this machine or on a network file system.

With the standard library on worker threads, because obstore reads local files in small pieces (measured: 220 MB/s for
4.4 s of processor time per GB, against 0.2 s here). Only regular files are objects; links are followed.
"""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from collections.abc import AsyncGenerator
from io import FileIO
from pathlib import Path
from urllib.parse import unquote

from .transport import Body, Fault, TransferError, too_long
from .workers import Workers


class DirectoryObjects:
    """``transport.Transport`` below one directory."""

    def __init__(self, directory: Path, workers: Workers, stall_seconds: float) -> None:
        self._directory = directory
        self._workers = workers
        self._stall_seconds = stall_seconds

    def fetch(self, path: str, limit: int) -> bytes:
        file, size = self._open(path)
        with file:
            if size > limit:
                raise too_long(size, limit)
            try:
                data = file.read(limit + 1)
            except OSError as error:
                raise self._failure(error) from None
        if len(data) > limit:
            raise too_long(None, limit)
        return data

    async def open(self, path: str, start: int = 0, end: int | None = None, version: str = "") -> Body:
        try:
            async with asyncio.timeout(self._stall_seconds):
                file, size = await self._workers.run(self._open, path, dispose=_close)
        except TimeoutError:
            raise no_answer(self._stall_seconds) from None
        if start:
            file.seek(start)
        return _FileBody(self, file, size, (size if end is None else min(end, size)) - start)

    async def close(self) -> None: ...

    def _open(self, path: str) -> tuple[FileIO, int]:
        """(file, its size)."""
        try:
            name = self._directory / unquote(path).lstrip("/")
            file = FileIO(
                os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            )  # never waits for a fifo's writer
        except ValueError:
            raise TransferError(Fault.FATAL, "not a file's name") from None
        except OSError as error:
            raise self._failure(error) from None
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            file.close()
            raise TransferError(Fault.MISSING, "not a regular file")
        return file, status.st_size

    def _failure(self, error: OSError) -> TransferError:
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            if not self._directory.is_dir():
                return TransferError(Fault.FATAL, "there is no such directory")
            return TransferError(Fault.MISSING, "no such file")
        fault = Fault.FATAL if isinstance(error, PermissionError) else Fault.PASSING
        return TransferError(fault, error.strerror or "read error")


def no_answer(seconds: float) -> TransferError:
    """Of a file system that keeps a thread. It is not tried again: that would keep another one."""
    return TransferError(Fault.FATAL, f"no answer for {seconds:g} s")


def _close(opened: tuple[FileIO, int]) -> None:
    opened[0].close()


class _FileBody:
    """``left``: bytes that belong to the part asked for.

    A file descriptor is never closed under a thread that reads from it: its number could then be somebody else's. While
    a read is under way, closing is left to the reading thread.
    """

    version = ""

    def __init__(self, place: DirectoryObjects, file: FileIO, size: int, left: int) -> None:
        self._place = place
        self._file = file
        self._left = left
        self._reading = threading.Lock()
        self._abandoned = False
        self.size: int | None = size

    async def chunks(self, size: int) -> AsyncGenerator[bytes, None]:
        while self._left > 0 and (chunk := await self._place._workers.run(self._read, min(size, self._left))):
            self._left -= len(chunk)
            yield chunk

    async def close(self) -> None:
        self._abandoned = True
        if self._reading.acquire(blocking=False):
            self._file.close()
            self._reading.release()

    def _read(self, size: int) -> bytes:
        try:
            with self._reading:
                return b"" if self._abandoned else self._file.read(size) or b""
        except OSError as error:
            raise self._place._failure(error) from None
        finally:
            if self._abandoned:
                self._file.close()
