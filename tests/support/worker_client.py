"""A client of the Nix worker protocol that says exactly what a test wants said. Blocking, with time limits."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from veneer.formats import worker_wire as wire
from veneer.formats.worker_wire import Field, Kind, Operation, Value

SECONDS = 20.0


class RefusedError(Exception):
    """The server said ERROR."""


class EndedError(Exception):
    """The server ended the connection."""


class WorkerClient:
    """One connection, greeted unless ``greet`` is False."""

    def __init__(self, path: Path | str, version: int = wire.VERSION, *, greet: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(SECONDS)
        self.socket.connect(str(path))
        self.version = version
        self.program = ""
        self.trust = 0
        if greet:
            self.greet()

    def greet(self) -> None:
        self.send(client_hello(self.version))
        assert self.integer() == wire.SERVER_MAGIC
        assert self.integer() == wire.VERSION
        if self.version >= wire.FEATURES_SINCE:
            assert self.strings() == []
        if self.version >= wire.VERSION_STRING_SINCE:
            self.program = self.string()
        if self.version >= wire.TRUST_SINCE:
            self.trust = self.integer()
        assert self.integer() == wire.LAST

    def ask(self, operation: Operation, *values: Value) -> list[Value]:
        """The reply's fields; RefusedError with the message of an ERROR."""
        self.send(encode_request(operation, values, self.version))
        return self.reply(operation)

    def reply(self, operation: Operation) -> list[Value]:
        self.expect_last()
        got = [self.field(field) for field in operation.reply]
        if operation.details and got[0]:
            got += [self.field(field) for field in operation.details]
        return got

    def expect_last(self) -> None:
        word = self.integer()
        if word == wire.ERROR:
            raise RefusedError(self._error())
        assert word == wire.LAST, hex(word)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def integer(self) -> int:
        return int(struct.unpack("<Q", self.read(8))[0])

    def string(self) -> str:
        size = self.integer()
        return self.read(size + -size % 8)[:size].decode("utf-8", "surrogateescape")

    def strings(self) -> list[str]:
        return [self.string() for _ in range(self.integer())]

    def field(self, field: Field) -> Value:
        match field.kind:
            case Kind.U64:
                return self.integer()
            case Kind.STRING:
                return self.string()
            case _:
                return self.strings()

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                piece = self.socket.recv(min(size - len(data), 1 << 20))
            except ConnectionResetError:
                piece = b""
            if not piece:
                raise EndedError(f"after {len(data)} of {size} bytes")
            data += piece
        return data

    def ended(self) -> bool:
        """Whether the server ends the connection without another byte."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _error(self) -> str:
        if self.version < wire.STRUCTURED_ERRORS_SINCE:
            message = self.string()
            assert self.integer() == 1
            return message
        assert self.string() == "Error"
        self.integer()
        self.string()
        message = self.string()
        assert (self.integer(), self.integer()) == (0, 0)
        return message


def client_hello(version: int = wire.VERSION) -> bytes:
    """All that a client sends before its first request."""
    features: tuple[Value, ...] = ([],) if version >= wire.FEATURES_SINCE else ()
    return wire.encode((wire.CLIENT_MAGIC, version, *features, 0, 0))


def encode_request(operation: Operation, values: Sequence[Value], version: int) -> bytes:
    """The number and those fields that the version has."""
    there = [value for field, value in zip(operation.request, values, strict=True) if field.since <= version]
    return wire.encode((operation.number, *there))
