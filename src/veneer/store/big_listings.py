"""Listings too big for the daemon's memory are made into trees by a child (``listing_child``), one after the other."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import IO

from veneer.cache.index import PathRow
from veneer.model.errors import FormatError, printable

from .listing_child import SECONDS

BIG = 8 << 20
"""Bytes of JSON; about 100,000 entries, which are worked on in half a second and 100 MiB."""
_PIECE = 256 << 10
_TOLD = 4096


class BigListings:
    """``generation``: the cache's. Event loop only. ``seconds``: for one listing, its wait for others not counted."""

    def __init__(self, generation: bytes, seconds: float = SECONDS) -> None:
        self._generation = generation
        self._seconds = seconds
        self._one = asyncio.Semaphore(1)

    async def encode(self, row: PathRow, data: bytes, out: IO[bytes]) -> None:
        """Write the tree that ``data`` describes to ``out``, a file. FormatError: refused, or the child died or was too slow."""
        async with self._one:
            child = await self._start(row, out)
            try:
                async with asyncio.timeout(self._seconds):
                    told = await self._converse(child, data)
                    status = await child.wait()
            except TimeoutError:
                raise FormatError(
                    f"a listing of {len(data)} bytes took more than {self._seconds:g} s", where="listing"
                ) from None
            finally:
                with suppress(ProcessLookupError):
                    child.kill()
                await child.wait()
        if status:
            how = f"status {status}" if status > 0 else f"signal {-status}"
            raise FormatError(
                told or f"the process for a listing of {len(data)} bytes ended with {how}", where="listing"
            )

    async def _start(self, row: PathRow, out: IO[bytes]) -> asyncio.subprocess.Process:
        words = (str(row.number), self._generation.hex(), row.nar_hash.digest.hex(), str(row.nar_size))
        try:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "veneer.store.listing_child", *words),
                stdin=asyncio.subprocess.PIPE,
                stdout=out,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            raise FormatError(f"no process for a listing: {error.strerror}", where="listing") from error

    async def _converse(self, child: asyncio.subprocess.Process, data: bytes) -> str:
        """Give it the listing; what it says on standard error."""
        assert child.stdin is not None
        assert child.stderr is not None
        with suppress(ConnectionError), memoryview(data) as view:  # it ended: its status and words tell
            for at in range(0, len(view), _PIECE):
                child.stdin.write(view[at : at + _PIECE])
                await child.stdin.drain()
        child.stdin.close()
        return printable((await child.stderr.read(_TOLD)).decode("utf-8", "replace").strip())
