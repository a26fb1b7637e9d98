"""INIT: what we offer, what the kernel offers, what holds. Pure; the result fits into JSON, for a hand-over.

A server that takes a running mount over gets no INIT; it continues with the record of its predecessor.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from veneer.formats import fuse_wire as wire
from veneer.model.errors import FormatError, MachineError

MAX_PAGES = 256
"""1 MiB per READ."""
MAX_READ_AHEAD = 1 << 20
MAX_WRITE = 4096
"""The kernel's minimum. Nothing is ever written, and it decides how large a buffer read(2) asks for."""
MAX_BACKGROUND = 0xFFFF
CONGESTION_THRESHOLD = 0xC000
WANTED = (
    wire.ASYNC_READ
    | wire.DO_READDIRPLUS
    | wire.NO_OPEN_SUPPORT
    | wire.PARALLEL_DIROPS
    | wire.MAX_PAGES
    | wire.CACHE_SYMLINKS
    | wire.NO_OPENDIR_SUPPORT
    | wire.EXPLICIT_INVAL_DATA
    | wire.INIT_EXT
    | wire.HAS_RESEND
)


@dataclass(frozen=True, slots=True)
class Session:
    """What was agreed. ``flags``: the bits that both sides know."""

    minor: int
    flags: int
    max_readahead: int

    @property
    def no_open(self) -> bool:
        return bool(self.flags & wire.NO_OPEN_SUPPORT)

    @property
    def no_opendir(self) -> bool:
        return bool(self.flags & wire.NO_OPENDIR_SUPPORT)

    @property
    def can_resend(self) -> bool:
        """Whether a successor gets back what we read and did not answer."""
        return bool(self.flags & wire.HAS_RESEND)

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, int]) -> Session:
        return cls(fields["minor"], fields["flags"], fields["max_readahead"])


def negotiate(request: bytes) -> tuple[bytes, Session | None]:
    """The body of INIT's reply, and the session.

    None: a kernel of a later major version, which will send INIT again in ours. MachineError: the kernel is too old.
    """
    body = request[wire.IN_SIZE :]
    if len(body) < 16:
        raise FormatError(f"INIT of {len(body)} bytes", where="FUSE INIT")
    major, minor, readahead, flags, flags2 = wire.INIT_IN.unpack(body[:64].ljust(64, b"\0"))
    if major > wire.MAJOR:
        return wire.INIT_OUT.pack(wire.MAJOR, wire.MINOR, *(0,) * 10), None
    if major < wire.MAJOR or minor < wire.OLDEST_MINOR:
        raise MachineError(
            f"the kernel speaks FUSE {major}.{minor}", where="FUSE INIT", hint="Linux 5.11 or later is needed"
        )
    offered = flags | flags2 << 32 if flags & wire.INIT_EXT else flags
    agreed = offered & WANTED
    # More than the kernel's own value does no harm: it takes the smaller, and ours may have been raised since.
    session = Session(min(minor, wire.MINOR), agreed, max(readahead, MAX_READ_AHEAD))
    reply = wire.INIT_OUT.pack(
        wire.MAJOR, wire.MINOR, session.max_readahead, agreed & 0xFFFFFFFF, MAX_BACKGROUND, CONGESTION_THRESHOLD,
        MAX_WRITE, 1, MAX_PAGES, 0, agreed >> 32, 0,
    )  # fmt: skip
    return reply, session
