"""Replies to Nix's three questions about a path, encoded before they are asked.

Nix asks lower stores three times about each path of a closure and waits for every reply, again with each new database.
What is known of a path is therefore encoded when it becomes known, while Nix is busy, and a question costs a lookup.

Invariant W4: replies are made of a path info that the view trusts, or of nothing: they can neither grow old nor be another
view's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veneer.formats import worker_wire as wire
from veneer.formats.worker_wire import Value
from veneer.model.path_info import PathInfo
from veneer.model.store_path import StorePath

REPLIES_KEPT = 16 << 20
"""Bytes of encoded requests and replies in memory."""

_OVERHEAD = 300
"""Of objects, about, for each reply."""
_DONE, _ZERO, _ONE = wire.reply(()), wire.encode((0,)), wire.encode((1,))
_IS_VALID = wire.encode((wire.IS_VALID_PATH.number,))
_PATH_INFO = wire.encode((wire.QUERY_PATH_INFO.number,))
_VALID_PATHS = wire.encode((wire.QUERY_VALID_PATHS.number,))


@dataclass(frozen=True, slots=True)
class Reply:
    """The encoded ``reply`` to a question about ``path``."""

    reply: bytes
    path: StorePath
    nar_size: int


class Replies:
    """Encoded replies by encoded request, of paths in ``store_dir``."""

    def __init__(self, store_dir: str, limit: int = REPLIES_KEPT) -> None:
        self._prefix = store_dir.rstrip("/") + "/"
        self._limit = limit
        self._size = 0
        self._kept: dict[bytes, Reply] = {}
        self.get = self._kept.get

    @property
    def full(self) -> bool:
        """Whether the next ``keep`` forgets everything before."""
        return self._size > self._limit

    def keep(self, known: PathInfo) -> None:
        """Have the replies about this path ready; beyond the limit they begin anew."""
        path, size = known.store_path, known.info.nar_size
        text = wire.encode((self._prefix + path.basename,))
        if _IS_VALID + text in self._kept:
            return
        if self.full:
            self._kept.clear()
            self._size = 0
        one_path = _ONE + text
        for request, reply in (
            (_IS_VALID + text, _DONE + _ONE),
            (_PATH_INFO + text, wire.reply(described(known, self._prefix))),
            (_VALID_PATHS + one_path + _ZERO, _DONE + one_path),
        ):
            self._kept[request] = Reply(reply, path, size)
            self._size += len(request) + len(reply) + _OVERHEAD


def described(known: PathInfo, prefix: str) -> Sequence[Value]:
    """What QueryPathInfo says of a path that is there. ``prefix``: the store directory with its slash."""
    info = known.info
    deriver = prefix + info.deriver if info.deriver else ""
    references = [prefix + reference.basename for reference in info.references]
    fields = (deriver, info.nar_hash.digest.hex(), references, 0, info.nar_size, 0)
    return 1, *fields, list(info.signatures), info.ca
