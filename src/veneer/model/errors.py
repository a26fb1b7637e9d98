"""Every error that a user or a reader of the mount can meet.

An error says what happened, where, and what to do, as fields (for ``status`` and JSON) and as text.
``errno`` is what a reader of the mount gets; ``exit_code`` is what the command line returns.

Exit codes: 1 general failure, 2 wrong usage (click's own), 3 not found in any source, 4 not trusted (signature or
hash), 5 a source cannot be reached, 6 the machine lacks something (FUSE, user namespaces), 7 the cache cannot be used,
8 the daemon cannot be reached. ``veneer run`` passes the command's own status through, 125 for our own failures before
it starts, 126 and 127 as a shell gives them.
"""

from __future__ import annotations

import errno as _errno
from typing import ClassVar


class VeneerError(Exception):
    """Base of all errors. Not a dataclass: the interpreter assigns ``__traceback__``.

    ``what``: one sentence. ``where``: URL, file or store path. ``hint``: the next step for the user. Both may be "".
    """

    errno: ClassVar[int] = _errno.EIO
    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = self.what
        if self.where:
            text += f" ({self.where})"
        if self.hint:
            text += f"\nhint: {self.hint}"
        return text

    def story(self) -> str:
        """One line without the hint, with control characters made visible, for logs and ``status``."""
        return printable(f"{self.what} ({self.where})" if self.where else self.what)


class FormatError(VeneerError):
    """Bytes that do not follow their format. ``where`` names the format and, when known, the offset."""


class TruncatedError(FormatError):
    """Bytes that end before their format does; what came before may well be right."""


class LimitError(FormatError):
    """A declared or real size beyond what we accept."""


class UsageError(VeneerError):
    exit_code = 2


class NotFoundError(VeneerError):
    """No source has it. The only error that a reader sees as ENOENT, and only for a store path's own name."""

    errno = _errno.ENOENT
    exit_code = 3


class TrustError(VeneerError):
    """No trusted signature, or content that differs from what was signed."""

    exit_code = 4


class HashMismatchError(TrustError):
    """Content whose digest or size is not the signed one."""


class SourceError(VeneerError):
    """A source failed: connect, time limit, 5xx, truncated body, missing NAR of a known narinfo."""

    exit_code = 5


class SourceMissingError(SourceError):
    """The source answered that it does not have the object (404, 410, 403). Not a failure of the source."""


class MachineError(VeneerError):
    """The machine lacks something: /dev/fuse, user namespaces, a kernel feature."""

    exit_code = 6


class CacheError(VeneerError):
    """The cache directory cannot be used: permissions, disk full, newer schema, owned by another daemon."""

    exit_code = 7


class CacheInUseError(CacheError):
    """Another daemon holds the cache's lock."""


class CacheFullError(CacheError):
    """No space left in the cache's file system: evict and try again.

    EIO all the same for a reader of the mount, who wrote nothing.
    """


class DaemonError(VeneerError):
    """The store daemon is not there, or broke the protocol."""

    exit_code = 8


def printable(text: str) -> str:
    """``text`` with control characters escaped: nothing from a source may drive a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
