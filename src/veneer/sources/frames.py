"""The frames of a stored NAR file: parts of it that can be fetched and decompressed by themselves.

| compression | a frame | where it is known from |
|---|---|---|
| none | GRID bytes | nothing |
| zstd | a zstd frame | the seek table at the file's end (``formats.seekable_zstd``); else what the frames say, as they pass |
| xz | a block | the index at the file's end (``formats.xz_index``) |

Everything else, and files of a single frame, have to be read whole.

No I/O here: ``find_frames`` says which bytes of the file it wants, and ``TailKeeper`` has them after a whole download.
All of it comes from an unsigned file: frames that contradict the NAR's size or the file's are refused, but only digests
tell whether the bytes of a frame are the right ones.
"""

from __future__ import annotations

import lzma
import threading
from collections import deque
from collections.abc import Generator

import zstandard

from veneer.formats import seekable_zstd, xz_index
from veneer.formats.chunk_map import MAX_CHUNK
from veneer.formats.seekable_zstd import Frame
from veneer.model.errors import FormatError, TruncatedError

from .compression import OUTPUT_PIECE, XZ_MEMORY, FrameScanner, Readable

GRID = 256 << 10
MAX_FRAMES = 1 << 18
"""A NAR of 64 GiB in the usual frames. About 60 MB of memory."""
MAX_TABLE = 8 * MAX_FRAMES + 64
"""Bytes of a seek table or an index that we ask for."""
TAIL_KEPT = 1 << 20

_FIRST_TAIL = 4 << 10
_TAIL_SHARE = 14
"""A seek table has 8 or 12 bytes per frame: the first question covers it for frames of 192 KiB and more."""
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_WHERE = "frames"
_own = threading.local()

Search = Generator[tuple[int, int], bytes, tuple[Frame, ...] | None]
"""Yields (offset, size) of bytes of the file, is sent exactly these, returns the frames. FormatError."""


def find_frames(compression: str, file_size: int, nar_size: int) -> Search:
    """The frames of a file of ``file_size`` bytes with a NAR of ``nar_size`` bytes, or None: it has to be read whole.

    They follow each other without gaps in the NAR; none is empty, none longer than MAX_CHUNK. Usually asks once, at most
    twice. FormatError when what the file says of itself cannot be.
    """
    if compression == "none":
        frames = _grid(file_size, nar_size)
    elif compression == "zstd":
        frames = yield from _zstd_frames(_Tail(file_size, nar_size))
    elif compression == "xz":
        frames = yield from _xz_frames(_Tail(file_size, nar_size))
    else:
        return None
    if frames is None:
        return None
    total = sum(frame.size for frame in frames)
    if total != nar_size:
        raise FormatError(f"they hold {total} bytes for a NAR of {nar_size}", where=_WHERE)
    frames = tuple(frame for frame in frames if frame.size)
    if not 1 < len(frames) <= MAX_FRAMES:
        return None
    if any(frame.size > MAX_CHUNK or frame.compressed_size > 2 * MAX_CHUNK for frame in frames):
        return None
    return frames


def decode_frame(compression: str, data: bytes, size: int) -> bytes:
    """The ``size`` bytes (1 or more) in ``data``, exactly one frame. FormatError.

    Releases the interpreter lock. Allocates ``size`` bytes and the codec's state, whatever the data say of themselves.
    The checks that a frame carries (zstd: XXH64; xz: CRC32, CRC64, SHA-256) are verified; an xz block from which just
    the check was cut off passes as one without.
    """
    if size < 1:
        raise FormatError(f"a frame of {size} bytes", where=_WHERE)
    match compression:
        case "none":
            decoded = data
        case "zstd":
            decoded = _decode_zstd(data, size)
        case "xz":
            decoded = _decode_xz(data, size)
        case _:
            raise FormatError(f"{compression[:100]!r} has no frames", where=_WHERE)
    if len(decoded) != size:
        raise FormatError(f"{len(decoded)} bytes instead of {size}", where=f"{compression} frame")
    return decoded


class TailKeeper:
    """Passes ``encoded`` on and keeps its last bytes: after a whole download its frames are known without a request.

    ``length``: bytes that have passed. Keeps at most ``limit`` bytes and the piece that crosses it; for ``compression`` zstd also where
    each frame began, for files without a seek table.
    """

    def __init__(self, encoded: Readable, compression: str = "", limit: int = TAIL_KEPT) -> None:
        self._encoded = encoded
        self._scanner = FrameScanner() if compression == "zstd" else None
        self._limit = limit
        self._pieces: deque[bytes] = deque()
        self._kept = 0
        self.length = 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._encoded.read(size)
        self.length += len(data)
        if self._scanner is not None:
            try:
                self._scanner.feed(data)
            except FormatError:  # whoever decodes it says so
                self._scanner = None
        self._pieces.append(data)
        self._kept += len(data)
        while self._kept - len(self._pieces[0]) >= self._limit:
            self._kept -= len(self._pieces.popleft())
        return data

    def frames(self, compression: str, nar_size: int) -> tuple[Frame, ...] | None:
        """``find_frames`` of all that has passed; None as well when its table begins before what was kept. FormatError."""
        tail = b"".join(self._pieces)
        start = self.length - len(tail)
        search = find_frames(compression, self.length, nar_size)
        try:
            offset, size = next(search)
            while offset >= start:
                offset, size = search.send(tail[offset - start : offset - start + size])
        except StopIteration as found:
            frames: tuple[Frame, ...] | None = found.value
            return frames or self._passed(nar_size)
        return None

    def _passed(self, nar_size: int) -> tuple[Frame, ...] | None:
        """The frames as they said themselves; None when one did not say, or there is only one."""
        scanner = self._scanner
        if scanner is None or not scanner.complete or len(scanner.frames) >= FrameScanner.KEPT:
            return None
        frames, offset = [], 0
        ends = [start for start, _ in scanner.frames[1:]] + [self.length]
        for (start, size), end in zip(scanner.frames, ends, strict=True):
            if size is None:
                return None
            if size:
                frames.append(Frame(start, end - start, offset, size))
            offset += size
        if offset != nar_size or any(frame.size > MAX_CHUNK for frame in frames):
            return None
        return tuple(frames) if len(frames) > 1 else None


class _Tail:
    """The end of the file, as much as was asked for."""

    def __init__(self, file_size: int, nar_size: int) -> None:
        self.file_size = file_size
        self._first = max(_FIRST_TAIL, min(nar_size >> _TAIL_SHARE, TAIL_KEPT))
        self._data = b""

    def last(self, size: int) -> Generator[tuple[int, int], bytes, bytes]:
        """The last ``size`` bytes, or as many as there are."""
        size = min(size, self.file_size)
        if size > len(self._data):
            start = self.file_size - min(max(size, self._first), self.file_size)
            wanted = self.file_size - len(self._data) - start
            got = yield start, wanted
            if len(got) != wanted:
                raise TruncatedError(f"{len(got)} bytes instead of {wanted}", where=_WHERE)
            self._data = got + self._data
        return self._data[len(self._data) - size :]


def _grid(file_size: int, nar_size: int) -> tuple[Frame, ...] | None:
    if file_size != nar_size:
        raise FormatError(f"{file_size} bytes for a NAR of {nar_size}", where="uncompressed NAR")
    step = max(GRID, 1 << (-(-nar_size // MAX_FRAMES) - 1).bit_length())
    if step > MAX_CHUNK:
        return None
    starts = range(0, nar_size, step)
    return tuple(Frame(start, size, start, size) for start in starts if (size := min(step, nar_size - start)))


def _zstd_frames(tail: _Tail) -> Search:
    size = seekable_zstd.table_size((yield from tail.last(seekable_zstd.FOOTER_SIZE)))
    if size is None or size > MAX_TABLE:
        return None
    return seekable_zstd.parse_seek_table((yield from tail.last(size)), file_size=tail.file_size)


def _xz_frames(tail: _Tail) -> Search:
    footer = xz_index.parse_footer((yield from tail.last(xz_index.FOOTER_SIZE)))
    if footer is None or footer.index_size > MAX_TABLE or footer.check not in xz_index.CHECK_SIZES:
        return None
    end = yield from tail.last(footer.index_size + xz_index.FOOTER_SIZE)
    return xz_index.parse_index(end, file_size=tail.file_size)


def _decode_zstd(data: bytes, size: int) -> bytes:
    if data[:4] != _ZSTD_MAGIC:
        raise FormatError("not a zstd frame", where="zstd frame")
    try:
        told = zstandard.frame_content_size(data)
        if told not in (-1, size):  # the decoder would allocate it
            raise FormatError(f"it says {told} bytes instead of {size}", where="zstd frame")
        decoder = _decompressor() if told == size else zstandard.ZstdDecompressor()
        return decoder.decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"corrupt: {error}", where="zstd frame") from error


def _decompressor() -> zstandard.ZstdDecompressor:
    """This thread's: a new one each time costs a tenth more. Not for frames of unknown size: it would keep their window."""
    decompressor: zstandard.ZstdDecompressor | None = getattr(_own, "decompressor", None)
    if decompressor is None:
        decompressor = _own.decompressor = zstandard.ZstdDecompressor()
    return decompressor


def _decode_xz(data: bytes, size: int) -> bytes:
    before, after = xz_index.around(data, size)
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)
    encoded = b"".join((before, data, after))
    # In pieces: the decoder puts its output together under the interpreter lock, the last join works without it.
    pieces = []
    rest = size
    try:
        while rest and not decoder.eof:
            piece = decoder.decompress(encoded, min(rest, OUTPUT_PIECE))
            if not piece and decoder.needs_input:
                break
            encoded = b""
            pieces.append(piece)
            rest -= len(piece)
        if not decoder.eof:  # no more content comes, but what follows it still has to be checked
            pieces.append(decoder.decompress(encoded, 1))
    except lzma.LZMAError as error:
        raise FormatError(f"corrupt: {error}", where="xz block") from error
    if not decoder.eof or decoder.unused_data:
        raise FormatError("not one block of its size", where="xz block")
    return b"".join(pieces)
