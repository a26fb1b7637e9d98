"""Undoing a NAR's compression while it is read: pull based, with bounded memory, for worker threads.

``open_decoder(name, encoded)`` gives an object whose ``read(n)`` yields 1 to ``n`` decoded bytes, ``b""`` at the end.
One ``read`` holds at most one input piece, ``n`` bytes of output and the codec's window, however far the input would
blow up; how much output is too much is the caller's business (it knows the NAR's signed size).

| name in a narinfo | format | accepted |
|---|---|---|
| none | the bytes themselves | |
| xz | .xz | several streams, stream padding (zeros, a multiple of 4), as the .xz specification 1.2.1 allows; 256 MiB of memory |
| zstd | RFC 8878 | several frames, skippable frames, windows up to 128 MiB |
| br | RFC 7932 | one stream (the format has no mark for a next one) |
| bzip2, "" | bzip2 | several streams |
| gzip | RFC 1952 | several members |
| lz4 | LZ4 frame format 1.6 | several frames |

FormatError: corrupt, truncated (TruncatedError), trailing garbage, unknown name. An empty input is truncated for every format but none.
The bindings leave gaps that are closed here: zstandard's reader takes a frame cut in the middle for a good end (hence
``FrameScanner``), brotli overshoots its output limit (the rest is kept), and one xz decoder stops at the first stream's end.
Errors of the encoded reader itself pass through unchanged.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Protocol, cast

import brotli
import lz4.frame
import zstandard

from veneer.model.errors import FormatError, TruncatedError

INPUT_PIECE = 256 << 10
"""Encoded bytes asked for at a time."""
OUTPUT_PIECE = 1 << 20
"""What ``read`` without a size gives at most."""
XZ_MEMORY = 256 << 20
"""``xz -9`` needs 65 MiB to decode; a hostile header may ask for 4 GiB."""


class Readable(Protocol):
    """``read`` gives 1 to ``size`` bytes, b"" at the end. A negative size leaves the amount to the reader."""

    def read(self, size: int = -1, /) -> bytes: ...


class _Stream(Protocol):
    """One stream, frame or member, with the interface of ``bz2.BZ2Decompressor``."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


def open_decoder(compression: str, encoded: Readable) -> Readable:
    """A reader of the decoded bytes of ``encoded``. FormatError at once for an unknown name, later for bad bytes."""
    match compression:
        case "none":
            return encoded
        case "zstd":
            return _ZstdReader(encoded)
        case "xz":
            return _StreamReader(
                "xz", encoded, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY), padding=4
            )
        case "bzip2" | "":
            return _StreamReader("bzip2", encoded, bz2.BZ2Decompressor)
        case "gzip":
            return _StreamReader("gzip", encoded, _Gzip)
        case "lz4":
            return _StreamReader("lz4", encoded, _Lz4)
        case "br":
            return _StreamReader("br", encoded, _Brotli, single=True)
    raise FormatError(
        f"unknown compression: {compression[:100]!r}",
        where="narinfo",
        hint="known are none, xz, zstd, br, bzip2, gzip and lz4",
    )


class _StreamReader:
    """Decodes streams one after the other. ``padding``: zeros between streams come in multiples of it; 0: there are none."""

    def __init__(
        self,
        name: str,
        encoded: Readable,
        make: Callable[[], _Stream],
        *,
        padding: int = 0,
        single: bool = False,
    ) -> None:
        self._name = name
        self._encoded = encoded
        self._make = make
        self._padding = padding
        self._single = single
        self._stream: _Stream | None = make()
        self._rest = b""
        """Input after a stream's end, not yet given to the next one."""
        self._ended = False

    def read(self, size: int = -1, /) -> bytes:
        if size < 0:
            size = OUTPUT_PIECE
        if size == 0 or self._ended:
            return b""
        while True:
            if self._stream is None and not self._next_stream():
                self._ended = True
                return b""
            assert self._stream is not None
            piece = self._pull(self._stream, size)
            if self._stream.eof:
                self._rest = self._stream.unused_data
                self._stream = None
            if piece:
                return piece

    def _pull(self, stream: _Stream, size: int) -> bytes:
        data = b""
        if stream.needs_input:
            data, self._rest = self._rest or self._encoded.read(INPUT_PIECE), b""
            if not data:
                raise TruncatedError("truncated", where=self._name)
        try:
            return stream.decompress(data, size)
        except _CODEC_ERRORS as error:
            raise FormatError(f"corrupt: {error}", where=self._name) from error

    def _next_stream(self) -> bool:
        """Begin the next stream; False at the end of the input."""
        zeros = 0
        while True:
            if self._padding:
                stripped = self._rest.lstrip(b"\0")
                zeros += len(self._rest) - len(stripped)
                self._rest = stripped
            if self._rest:
                break
            self._rest = self._encoded.read(INPUT_PIECE)
            if not self._rest:
                break
        if self._padding and zeros % self._padding:
            raise FormatError("trailing garbage: padding of odd length", where=self._name)
        if not self._rest:
            return False
        if self._single:
            raise FormatError("trailing garbage", where=self._name)
        self._stream = self._make()
        return True


class _Gzip:
    """One gzip member: ``zlib`` with the interface of ``bz2``."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail or data, max(max_length, 0))


class _Lz4:
    """One LZ4 frame."""

    def __init__(self) -> None:
        self._inner = lz4.frame.LZ4FrameDecompressor()

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def needs_input(self) -> bool:
        return bool(self._inner.needs_input)

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data or b""

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        piece: bytes = self._inner.decompress(data, max_length)
        return piece


class _Brotli:
    """One brotli stream.

    ``process`` gives up to 32 KiB more than its limit: the excess waits in ``_excess``. ``can_accept_more_data`` overlooks
    output that the decoder still holds, so the stream counts as drained only once ``process(b"")`` gave nothing.
    """

    unused_data = b""  # input after the end is an error of ``process`` itself

    def __init__(self) -> None:
        self._inner = brotli.Decompressor()
        self._excess = memoryview(b"")
        self._drained = True

    @property
    def eof(self) -> bool:
        return not self._excess and bool(self._inner.is_finished())

    @property
    def needs_input(self) -> bool:
        return self._drained and bool(self._inner.can_accept_more_data())

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        if not self._excess:
            self._excess = memoryview(self._inner.process(data, output_buffer_limit=max_length))
            self._drained = not self._excess
        piece, self._excess = bytes(self._excess[:max_length]), self._excess[max_length:]
        return piece


_CODEC_ERRORS = (lzma.LZMAError, zlib.error, OSError, EOFError, RuntimeError, ValueError, brotli.error)
"""What the codecs raise: bz2 OSError and ValueError, lz4 RuntimeError. The encoded reader is called outside the ``try``."""


class _ZstdReader:
    """zstandard's reader, with the end of its input checked by ``FrameScanner``."""

    def __init__(self, encoded: Readable) -> None:
        self._input = _Scanned(encoded)
        decoder = zstandard.ZstdDecompressor()
        self._reader = decoder.stream_reader(
            cast(IO[bytes], self._input), read_size=INPUT_PIECE, read_across_frames=True
        )

    def read(self, size: int = -1, /) -> bytes:
        try:
            piece: bytes = self._reader.read(OUTPUT_PIECE if size < 0 else size)
        except zstandard.ZstdError as error:
            raise FormatError(f"corrupt: {error}", where="zstd") from error
        if not piece and size != 0 and not self._input.scanner.complete:
            raise TruncatedError("truncated", where="zstd")
        return piece


class _Scanned(io.RawIOBase):
    """``encoded``, with a scanner looking on."""

    def __init__(self, encoded: Readable) -> None:
        super().__init__()
        self._encoded = encoded
        self.scanner = FrameScanner()

    def read(self, size: int = -1, /) -> bytes:
        data = self._encoded.read(size)
        self.scanner.feed(data)
        return data


class FrameScanner:
    """Follows zstd's framing (RFC 8878, 3.1) without decoding, to tell whether the input may end here.

    Jumps from block header to block header, at most 128 KiB of content each: about 1 us per block.
    """

    KEPT = 1 << 18
    _MAGIC = 0xFD2FB528
    _SKIPPABLE = 0x184D2A50

    def __init__(self) -> None:
        self._skip = 0
        """Bytes of content still to pass before the next header."""
        self._header = b""
        """A header of which only the beginning has been seen."""
        self._blocks = False
        """Inside a frame, where a block header comes next."""
        self._checksum = 0
        self._position = 0
        """Of ``_header``, or of what comes next."""
        self.frames: list[tuple[int, int | None]] = []
        """(where it begins, bytes of its content; None when it does not tell) of each frame, 0 bytes in skippable ones; KEPT at most."""
        self._frames = 0

    @property
    def complete(self) -> bool:
        """At least one frame was there and the last one is whole."""
        return self._frames > 0 and not (self._skip or self._header or self._blocks)

    def feed(self, data: bytes) -> None:
        """Follow ``data``. FormatError where neither a frame nor a skippable frame begins."""
        if self._skip >= len(data):
            self._skip -= len(data)
            self._position += len(data)
            return
        if self._header:
            data = self._header + data
            self._header = b""
        at, end = self._skip, len(data)
        self._skip = 0
        while at < end:
            step = self._block(data, at) if self._blocks else self._frame(data, at)
            if step == 0:
                self._header = data[at:]
                self._position += at
                return
            at += step
        self._skip = at - end
        self._position += end

    def _block(self, data: bytes, at: int) -> int:
        """Size of the block (and checksum) whose header begins at ``at``; 0: header not whole."""
        if len(data) - at < 3:
            return 0
        header = int.from_bytes(data[at : at + 3], "little")
        size = 1 if header & 6 == 2 else header >> 3  # kind 1 repeats one byte
        if header & 1:
            self._blocks = False
            size += self._checksum
        return 3 + size

    def _frame(self, data: bytes, at: int) -> int:
        """Size of the frame header, or of the whole skippable frame, that begins at ``at``; 0: not whole."""
        if len(data) - at < 8:  # the shortest frame is magic, descriptor, window and one block header: 9
            return 0
        magic = int.from_bytes(data[at : at + 4], "little")
        if magic & 0xFFFFFFF0 == self._SKIPPABLE:
            self._begin(at, 0)
            return 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        if magic != self._MAGIC:
            raise FormatError("trailing garbage" if self._frames else "not a zstd frame", where="zstd")
        descriptor = data[at + 4]
        single_segment = descriptor >> 5 & 1
        content_size = (single_segment, 2, 4, 8)[descriptor >> 6]
        dictionary = (0, 1, 2, 4)[descriptor & 3]
        before = 5 + (1 - single_segment) + dictionary
        told = data[at + before : at + before + content_size]
        if len(told) < content_size:
            return 0
        size = int.from_bytes(told, "little") + (256 if content_size == 2 else 0) if content_size else None
        self._blocks = True
        self._checksum = 4 if descriptor & 4 else 0
        self._begin(at, size)
        return before + content_size

    def _begin(self, at: int, size: int | None) -> None:
        self._frames += 1
        if self._frames <= self.KEPT:
            self.frames.append((self._position + at, size))
