"""Messages from the environment's init and keeper to the supervisor: one JSON object per packet, some with descriptors.

Both ends are the same program, forked: the packets are not checked. The supervisor's end says EOF when both have
ended, because nobody else keeps the other end.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from veneer.model import errors
from veneer.model.errors import VeneerError, printable

Kind = Literal[
    "init", "ready", "started", "stopped", "lingers", "ended", "server-ended", "adopt", "warning", "failed"
]
_LIMIT = 1 << 16
_MAX_FDS = 4
_TEXT_LIMIT = 4000


@dataclass(frozen=True, slots=True)
class Message:
    """``init``: fds [its pidfd]. ``started``: fds [the command's pidfd]. ``ready``: others may join.
    ``stopped``: number. ``ended``: status, signal as of RunOutcome. ``lingers``: the same; others still use the environment.
    ``server-ended``, ``warning``: text. ``adopt``: program, which the next store daemon is to be. ``failed``: text (what), where, hint, error (class name)."""

    kind: Kind
    fields: dict[str, Any]
    fds: tuple[int, ...] = ()


class Channel:
    """One end. Packets of at most 64 KiB; blocking."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), cls(theirs)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def send(self, kind: Kind, fds: Sequence[int] = (), **fields: Any) -> None:
        """OSError (EPIPE) when the supervisor is gone."""
        packet = json.dumps({"kind": kind, **fields}).encode()
        if fds:
            socket.send_fds(self._socket, [packet], fds)
        else:
            self._socket.sendall(packet)

    def send_failure(self, error: VeneerError) -> None:
        text, where, hint = (part[:_TEXT_LIMIT] for part in (error.what, error.where, error.hint))
        self.send("failed", error=type(error).__name__, text=text, where=where, hint=hint)

    def receive(self) -> Message | None:
        """The next message; None at the end."""
        packet, fds, _, _ = socket.recv_fds(self._socket, _LIMIT, _MAX_FDS)
        if not packet:
            return None
        fields = json.loads(packet)
        return Message(fields.pop("kind"), fields, tuple(fds))


def failure(message: Message) -> VeneerError:
    """The error that the other side meant."""
    fields = message.fields
    kind: type[VeneerError] = getattr(errors, fields["error"], VeneerError)
    return kind(fields["text"], where=printable(fields["where"]), hint=fields["hint"])
