"""What a path's root is, from the first bytes of its NAR: for whoever asks no more than that, where nobody has a listing.

Like a listing it is metadata without a signature, and the NAR confirms it (``trees``).
"""

from __future__ import annotations

import io

from veneer.formats.nar import DirectoryStart, File, Link, NarParser, nar_size
from veneer.model.errors import FormatError, TruncatedError
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.tree import MAX_TARGET, Directory, Node, RegularFile, Symlink
from veneer.sources.base import Meter, RangesUnsupportedError, Source
from veneer.sources.compression import open_decoder
from veneer.sources.nar_stream import expected_size

LARGE = 2 << 20
"""Bytes of a NAR's file from which on its head is asked for: it costs less than a tenth of it, if all is read after all."""
ENCODED = 136 << 10
"""Bytes of the NAR's file that are asked for: zstd gives nothing before a whole block, which may be 128 KiB."""
_DECODED = MAX_TARGET + 512
"""Bytes of a NAR in which its root is told: a link's target is the longest that may come before."""


async def root_of_head(source: Source, info: UnverifiedPathInfo, meter: Meter) -> Node | None:
    """The root, a directory's without its entries. None: the NAR is to be read whole, for it is small or its head tells nothing.

    SourceError; FormatError without the source in ``where``.
    """
    size = expected_size(info)
    if size is None or size < LARGE:
        return None
    try:
        root = _root(info.compression, await source.part(info, 0, ENCODED, meter))
    except (RangesUnsupportedError, TruncatedError):
        return None
    if isinstance(root, RegularFile | Symlink) and (size := nar_size(root)) != info.nar_size:
        raise FormatError(
            f"the head of its NAR is of one with {size} bytes, but NarSize is {info.nar_size}", where="NAR"
        )
    return root


def _root(compression: str, encoded: bytes) -> Node | None:
    """TruncatedError: it needs more. FormatError: it is no NAR."""
    decoder, parser, left = open_decoder(compression, io.BytesIO(encoded)), NarParser(), _DECODED
    while left > 0 and (data := decoder.read(left)):
        left -= len(data)
        for event in parser.feed(data):
            match event:
                case DirectoryStart():
                    return Directory(())
                case File():
                    return RegularFile(event.size, event.executable, event.offset)
                case Link():
                    return Symlink(event.target)
    return None
