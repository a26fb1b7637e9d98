"""A slow network link in front of a loopback server: a TCP relay that limits the rate and delays every byte.

::

    with ShapedLink(server.port) as link:            # 200 Mbit/s, 20 ms there and back
        ... link.url, link.bytes_down ...

Needs no rights and nothing of the kernel (no netem, no namespaces). The relay is a process of its own. Its model: each direction
is one line with one queue that all connections share in turn; a piece of n bytes occupies the line for n/rate seconds
and arrives half a round trip after it left; at most ``QUEUE_SECONDS`` of pieces wait, then senders are held back.
A new connection's first bytes wait one round trip, which is TCP's handshake. Not modelled: loss, slow start, the
overhead of packet headers (about 3 %).
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import selectors
import socket
import struct
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Self

BITS_PER_SECOND = 200_000_000
ROUND_TRIP = 0.020
QUEUE_SECONDS = 0.020
_PIECE = 32 << 10
_COUNTERS = struct.Struct("<QQQ")


class ShapedLink:
    """The relay to ``127.0.0.1:target_port``, from the benchmark's side. A context manager."""

    def __init__(
        self, target_port: int, bits_per_second: float = BITS_PER_SECOND, round_trip: float = ROUND_TRIP
    ) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._file.truncate(_COUNTERS.size)
        counters = self._file.fileno()
        words = [target_port, bits_per_second, round_trip, counters]
        command = [sys.executable, "-m", "benchmarks.support.shaped_link", *map(str, words)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[counters])
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def counters(self) -> tuple[int, int, int]:
        """(bytes towards the client, bytes towards the server, connections) since the start, headers included."""
        up_to_now: tuple[int, int, int] = _COUNTERS.unpack(os.pread(self._file.fileno(), _COUNTERS.size, 0))
        return up_to_now

    @property
    def bytes_down(self) -> int:
        return self.counters()[0]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Line:
    """One direction. Times are the event loop's."""

    def __init__(self, bytes_per_second: float) -> None:
        self._seconds_per_byte = 1 / bytes_per_second
        self._free_at = 0.0
        self._turn = asyncio.Lock()  # first come, first served: connections take turns

    async def send(self, size: int) -> float:
        """Wait for a place in the queue; the time at which the piece's last byte has left."""
        loop = asyncio.get_running_loop()
        async with self._turn:
            wait = self._free_at - loop.time() - QUEUE_SECONDS
            if wait > 0:
                await asyncio.sleep(wait)
            self._free_at = max(self._free_at, loop.time()) + size * self._seconds_per_byte
            return self._free_at


class _Relay:
    def __init__(
        self, target_port: int, bits_per_second: float, round_trip: float, counters: mmap.mmap
    ) -> None:
        self._target_port = target_port
        self._round_trip = round_trip
        self._down, self._up = _Line(bits_per_second / 8), _Line(bits_per_second / 8)
        self._counters = counters
        self._counts = [0, 0, 0]

    def _count(self, which: int, by: int) -> None:
        self._counts[which] += by
        _COUNTERS.pack_into(self._counters, 0, *self._counts)

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._count(2, 1)
        try:
            server_reader, server_writer = await asyncio.open_connection(
                "127.0.0.1", self._target_port, limit=_PIECE
            )
        except OSError:
            writer.transport.abort()  # the client sees a reset, as if the server's host had refused
            return
        for each in (writer, server_writer):
            each.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.sleep(self._round_trip)
        both = (
            self._direction(reader, server_writer, self._up, 1),
            self._direction(server_reader, writer, self._down, 0),
        )
        try:
            await asyncio.gather(*both)
        except* OSError:  # one side has gone
            writer.transport.abort()
            server_writer.transport.abort()

    async def _direction(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: _Line, which: int
    ) -> None:
        flying: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._arrivals(flying, writer))
            while data := await reader.read(_PIECE):
                left_at = await line.send(len(data))
                self._count(which, len(data))
                flying.put_nowait((left_at + self._round_trip / 2, data))
            now = asyncio.get_running_loop().time()
            flying.put_nowait((now + self._round_trip / 2, b""))

    async def _arrivals(
        self, flying: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            at, data = await flying.get()
            if (wait := at - loop.time()) > 0:
                await asyncio.sleep(wait)
            if not data:
                if writer.can_write_eof():
                    writer.write_eof()
                return
            writer.write(data)
            await writer.drain()


async def _serve(target_port: int, bits_per_second: float, round_trip: float, counters: int) -> None:
    with mmap.mmap(counters, _COUNTERS.size) as shared:
        relay = _Relay(target_port, bits_per_second, round_trip, shared)
        server = await asyncio.start_server(relay.connection, "127.0.0.1", 0, limit=_PIECE, backlog=1024)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()


def main(target_port: int, bits_per_second: float, round_trip: float, counters: int) -> None:
    # select waits to the microsecond, epoll rounds up to the next millisecond; good for 500 connections
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(_serve(target_port, bits_per_second, round_trip, counters))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
