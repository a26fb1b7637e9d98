"""Reading bodies: each chunk within its time, and whole small ones within their limit."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator
from contextlib import aclosing

from .base import Meter
from .options import SourceOptions
from .pace import Pace
from .transport import CHUNK, Body, Fault, TransferError, too_long


async def paced(body: Body, size: int, options: SourceOptions, pace: Pace) -> AsyncGenerator[bytes, None]:
    """The body in chunks of about ``size`` bytes, not faster than ``pace``. TransferError when one takes too long."""
    limit = options.stall_seconds + size / options.least_rate
    async with aclosing(body.chunks(size)) as chunks:
        while True:
            try:
                async with asyncio.timeout(limit):
                    chunk = await anext(chunks, None)
            except TimeoutError:
                raise TransferError(
                    Fault.PASSING, f"less than {options.least_rate} bytes per second"
                ) from None
            if chunk is None:
                return
            await pace.received(len(chunk))
            yield chunk


async def collected(body: Body, limit: int, meter: Meter, options: SourceOptions, pace: Pace) -> bytes:
    """All bytes of the body. TransferError when there are more than ``limit``."""
    parts = io.BytesIO()  # unlike a list and its join it holds the bytes once
    async with aclosing(paced(body, CHUNK, options, pace)) as chunks:
        async for chunk in chunks:
            meter(len(chunk))
            if parts.tell() + len(chunk) > limit:
                raise too_long(None, limit)
            parts.write(chunk)
    return parts.getvalue()
