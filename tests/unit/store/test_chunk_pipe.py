"""The pipe between the event loop and a worker thread: order, bound, ends and failures."""

from __future__ import annotations

import asyncio

import pytest

from veneer.model.errors import SourceError
from veneer.store.pipe import ChunkPipe


def drain(pipe: ChunkPipe, size: int = -1) -> bytes:
    parts = []
    while part := pipe.read(size):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("size", [-1, 1, 3, 1000])
def test_bytes_arrive_in_order_whatever_the_read_size(size: int) -> None:
    async def main() -> bytes:
        pipe = ChunkPipe()
        reading = asyncio.create_task(asyncio.to_thread(drain, pipe, size))
        for n in range(50):
            assert await pipe.put(bytes([n]) * (n + 1))
        pipe.end()
        return await reading

    assert asyncio.run(main()) == b"".join(bytes([n]) * (n + 1) for n in range(50))


def test_the_producer_waits_while_the_pipe_is_full() -> None:
    async def main() -> None:
        pipe = ChunkPipe(limit=10)
        await pipe.put(b"x" * 10)
        waiting = asyncio.create_task(pipe.put(b"y"))
        done, _ = await asyncio.wait({waiting}, timeout=0.05)
        assert not done
        assert await asyncio.to_thread(pipe.read) == b"x" * 10
        assert await asyncio.wait_for(waiting, 5)

    asyncio.run(main())


def test_a_failure_of_the_producer_reaches_the_reader_after_the_bytes_before_it() -> None:
    async def main() -> None:
        pipe = ChunkPipe()
        await pipe.put(b"before")
        pipe.fail(SourceError("reset"))
        assert await asyncio.to_thread(pipe.read) == b"before"
        with pytest.raises(SourceError, match="reset"):
            await asyncio.to_thread(pipe.read)

    asyncio.run(main())


def test_a_reader_that_gives_up_lets_the_producer_go() -> None:
    async def main() -> None:
        pipe = ChunkPipe(limit=1)
        await pipe.put(b"xx")
        waiting = asyncio.create_task(pipe.put(b"y"))
        await asyncio.to_thread(pipe.abandon)
        assert await asyncio.wait_for(waiting, 5) is False

    asyncio.run(main())
