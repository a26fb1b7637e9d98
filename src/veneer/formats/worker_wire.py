"""The Nix worker protocol, server side, for a store that is only read: versions 1.21 to 1.38.

Source: NixOS/nix, ``worker-protocol.hh`` and ``daemon.cc``; compared with what Nix 2.8, 2.26 and 2.34 send and accept.

    integer = u64 little-endian          string = length, bytes, zero bytes up to a multiple of 8
    list    = count, items               pairs  = count, count x (string, string)
    version = major << 8 | minor; both sides use the lower of the two

The conversation ("C" the client, "S" this side):

    C: CLIENT_MAGIC                      S: SERVER_MAGIC, version (up to Nix 2.20 or so the client waits for it here)
    C: version
    C: list of features (>= 1.38)        S: list of features (>= 1.38); ours is empty
    C: affinity (0, or 1 and a mask), reserve space
    S: version string (>= 1.33), trust (>= 1.35: 1 trusted, 2 not), LAST
    C: operation, request fields         S: LAST, reply fields    or    ERROR, error        and so on

    error >= 1.26: "Error", level 0, "Error", message, 0, 0 traces        before: message, status 1

After an ERROR to an operation of ``OPERATIONS`` the connection goes on. An ERROR to QueryPathInfo with the words "is not
valid" means "there is no such path" to Nix: ``error_reply`` never writes them.

Limits, enforced here before a body is waited for: MAX_STRING, MAX_ITEMS, MAX_REQUEST over everything that one request
declares. Padding must be zero. Strings are UTF-8; other bytes survive as surrogates. Operations outside ``OPERATIONS`` have
bodies that this module cannot measure: ``Refused`` is the last event, what follows is thrown away, the connection has to end.
``daemon.worker`` enforces times, the number of connections and the order of answers; ``daemon.worker_answers`` what a path is.

In the wild: Nix counts its version up without a change of the wire; clients of later minors get 1.38. Nix >= 2.35 asks for
features (``realisation-with-path-not-hash``), gets none, and then does not send QueryRealisation.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from veneer.model.errors import FormatError, LimitError

VERSION = 0x126
OLDEST = 0x115
CLIENT_MAGIC = 0x6E697863
SERVER_MAGIC = 0x6478696F
LAST = 0x616C7473
ERROR = 0x63787470

FEATURES_SINCE = 0x126
TRUST_SINCE = 0x123
VERSION_STRING_SINCE = 0x121
STRUCTURED_ERRORS_SINCE = 0x11A
CPU_TIMES_SINCE = 0x125
SUBSTITUTE_SINCE = 0x11B
"""From here on the same bytes are the same request in every version, for the operations that ask whether a path is there."""

MAX_STRING = 64 << 10
MAX_ITEMS = 1 << 17
MAX_REQUEST = 16 << 20

_WHERE = "worker protocol"
_U64 = struct.Struct("<Q")
_INVALID_WORDS = "is not valid"

Pairs: TypeAlias = list[tuple[str, str]]
Value: TypeAlias = "int | str | list[str] | Pairs"


class Kind(enum.Enum):
    """Shapes of fields. NAR is the raw archive, unframed, and only ever a reply's last field.

    RESULTS is a count and so many of: target; status; error message; since 1.29 times built, not deterministic, start and
    stop time; since 1.37 two tags of CPU times (0: not there); a map of built outputs. Made by ``already_valid``.
    """

    U64 = "integer"
    STRING = "string"
    STRINGS = "list of strings"
    PAIRS = "list of pairs"
    NAR = "archive"
    RESULTS = "build results"


@dataclass(frozen=True, slots=True)
class Field:
    """``since``: in older versions the field is not there; it then reads as 0."""

    name: str
    kind: Kind
    since: int = 0


@dataclass(frozen=True, slots=True)
class Operation:
    """One message. ``details`` follow the reply only when its first field is not 0."""

    number: int
    name: str
    request: tuple[Field, ...]
    reply: tuple[Field, ...]
    details: tuple[Field, ...] = ()
    since: int = OLDEST


def _integers(*names: str) -> tuple[Field, ...]:
    return tuple(Field(name, Kind.U64) for name in names)


_PATH = Field("path", Kind.STRING)
_PATHS = Field("paths", Kind.STRINGS)
_TARGETS = Field("targets", Kind.STRINGS)
_TRUE = Field("one", Kind.U64)

IS_VALID_PATH = Operation(1, "IsValidPath", (_PATH,), (Field("valid", Kind.U64),))
QUERY_REFERRERS = Operation(6, "QueryReferrers", (_PATH,), (_PATHS,))
BUILD_PATHS = Operation(9, "BuildPaths", (_TARGETS, *_integers("mode")), (_TRUE,))
ENSURE_PATH = Operation(10, "EnsurePath", (_PATH,), (_TRUE,))
ADD_TEMP_ROOT = Operation(11, "AddTempRoot", (_PATH,), (_TRUE,))
SET_OPTIONS = Operation(
    19,
    "SetOptions",
    (
        *_integers("keep_failed", "keep_going", "try_fallback", "verbosity", "max_build_jobs"),
        *_integers("max_silent_time", "use_build_hook", "build_verbosity", "log_type", "print_build_trace"),
        *_integers("build_cores", "use_substitutes"),
        Field("overrides", Kind.PAIRS),
    ),
    (),
)
QUERY_PATH_INFO = Operation(
    26,
    "QueryPathInfo",
    (_PATH,),
    (Field("valid", Kind.U64),),
    (
        Field("deriver", Kind.STRING),
        Field("nar_hash_hex", Kind.STRING),
        Field("references", Kind.STRINGS),
        *_integers("registration_time", "nar_size", "ultimate"),
        Field("signatures", Kind.STRINGS),
        Field("ca", Kind.STRING),
    ),
)
QUERY_PATH_FROM_HASH_PART = Operation(
    29, "QueryPathFromHashPart", (Field("hash_part", Kind.STRING),), (Field("path_or_empty", Kind.STRING),)
)
QUERY_VALID_PATHS = Operation(
    31, "QueryValidPaths", (_PATHS, Field("substitute", Kind.U64, since=SUBSTITUTE_SINCE)), (_PATHS,)
)
QUERY_VALID_DERIVERS = Operation(33, "QueryValidDerivers", (_PATH,), (_PATHS,))
NAR_FROM_PATH = Operation(38, "NarFromPath", (_PATH,), (Field("nar", Kind.NAR),))
QUERY_MISSING = Operation(
    40,
    "QueryMissing",
    (_TARGETS,),
    (
        *(Field(name, Kind.STRINGS) for name in ("to_build", "to_substitute", "unknown")),
        *_integers("download_size", "nar_size"),
    ),
)
QUERY_REALISATION = Operation(
    43,
    "QueryRealisation",
    (Field("output_id", Kind.STRING),),
    (Field("realisations", Kind.STRINGS),),
    since=0x11B,
)
BUILD_PATHS_WITH_RESULTS = Operation(
    46,
    "BuildPathsWithResults",
    (_TARGETS, *_integers("mode")),
    (Field("results", Kind.RESULTS),),
    since=0x122,
)

OPERATIONS = {
    operation.number: operation
    for operation in (
        IS_VALID_PATH,
        QUERY_REFERRERS,
        BUILD_PATHS,
        ENSURE_PATH,
        ADD_TEMP_ROOT,
        SET_OPTIONS,
        QUERY_PATH_INFO,
        QUERY_PATH_FROM_HASH_PART,
        QUERY_VALID_PATHS,
        QUERY_VALID_DERIVERS,
        NAR_FROM_PATH,
        QUERY_MISSING,
        QUERY_REALISATION,
        BUILD_PATHS_WITH_RESULTS,
    )
}

REFUSED_NAMES = {
    7: "AddToStore",
    8: "AddTextToStore",
    12: "AddIndirectRoot",
    13: "SyncWithGC",
    14: "FindRoots",
    20: "CollectGarbage",
    22: "QueryDerivationOutputs",
    23: "QueryAllValidPaths",
    30: "QuerySubstitutablePathInfos",
    32: "QuerySubstitutablePaths",
    34: "OptimiseStore",
    35: "VerifyStore",
    36: "BuildDerivation",
    37: "AddSignatures",
    39: "AddToStoreNar",
    41: "QueryDerivationOutputMap",
    42: "RegisterDrvOutput",
    44: "AddMultipleToStore",
    45: "AddBuildLog",
    47: "AddPermRoot",
}
"""For messages only."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Answer with ``server_hello`` at once."""


@dataclass(frozen=True, slots=True)
class Features:
    """Answer with ``features``."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Greeted:
    """Answer with ``greeting``; requests follow. ``version``: the one that both speak."""

    version: int


@dataclass(frozen=True, slots=True)
class Request:
    """Answer with ``reply`` or ``error_reply``. ``values`` stand in the order of ``operation.request``."""

    operation: Operation
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """An operation that is not of this store or not of this version. Answer with ``error_reply`` and end."""

    number: int


@dataclass(frozen=True, slots=True)
class TooOld:
    """A client below OLDEST. Answer with ``error_reply`` in its version and end."""

    version: int


@dataclass(frozen=True, slots=True)
class Malformed:
    """Not the protocol, or beyond its limits: end. Before ``Greeted`` the peer may be no Nix and would not read an ERROR."""

    error: FormatError


Event: TypeAlias = Hello | Features | Greeted | Request | Refused | TooOld | Malformed
_Parse: TypeAlias = Generator["Event | None", None, "Event | None"]


class RequestDecoder:
    """What a client sends, cut anywhere. After Refused, TooOld and Malformed every byte is thrown away."""

    def __init__(self) -> None:
        self.version = 0
        """The one that both speak; known from ``Greeted`` on."""
        self._buffer = bytearray()
        self._declared = 0
        self._between = False
        self._machine = self._run()

    @property
    def held(self) -> int:
        """Bytes that an unfinished request occupies here, about."""
        return len(self._buffer) + self._declared

    @property
    def between_requests(self) -> bool:
        """Whether the next byte is the first of a request."""
        return self._between and not self._buffer

    def feed(self, data: bytes | memoryview) -> list[Event]:
        """Every event that is complete with ``data``."""
        self._buffer += data
        events = []
        while (event := next(self._machine)) is not None:
            events.append(event)
        return events

    def _run(self) -> Generator[Event | None, None, None]:
        try:
            last = yield from self._converse()
        except FormatError as error:
            last = Malformed(error)
        yield last
        self._declared = 0
        while True:
            self._buffer.clear()
            yield None

    def _converse(self) -> _Parse:
        if (yield from self._integer()) != CLIENT_MAGIC:
            raise FormatError("the client does not speak the Nix worker protocol", where=_WHERE)
        yield Hello()
        theirs = yield from self._integer()
        if theirs < OLDEST:
            return TooOld(theirs)
        if theirs >> 8 != VERSION >> 8:
            raise FormatError(f"the client speaks version {theirs >> 8}.{theirs & 0xFF}", where=_WHERE)
        self.version = min(theirs, VERSION)
        if self.version >= FEATURES_SINCE:
            yield Features(tuple((yield from self._strings())))
        if (yield from self._integer()):
            yield from self._integer()  # the processor to stay on
        yield from self._integer()  # disk space to reserve
        yield Greeted(self.version)
        while True:
            self._declared = 0
            self._between = True
            number = yield from self._integer()
            self._between = False
            operation = OPERATIONS.get(number)
            if operation is None or operation.since > self.version:
                return Refused(number)
            values = yield from self._fields(operation.request)
            yield Request(operation, values)

    def _fields(self, fields: Sequence[Field]) -> Generator[None, None, tuple[Value, ...]]:
        values: list[Value] = []
        for field in fields:
            if field.since > self.version:
                values.append(0)
            elif field.kind is Kind.STRING:
                values.append((yield from self._string()))
            elif field.kind is Kind.U64:
                values.append((yield from self._integer()))
            elif field.kind is Kind.STRINGS:
                values.append((yield from self._strings()))
            else:
                pairs = []
                for _ in range((yield from self._count(16))):
                    name = yield from self._string()
                    pairs.append((name, (yield from self._string())))
                values.append(pairs)
        return tuple(values)

    def _strings(self) -> Generator[None, None, list[str]]:
        strings = []
        for _ in range((yield from self._count(8))):
            strings.append((yield from self._string()))  # noqa: PERF401 - no comprehension can wait
        return strings

    def _count(self, smallest: int) -> Generator[None, None, int]:
        count = yield from self._integer()
        if count > MAX_ITEMS:
            raise LimitError(f"list of {count} items announced", where=_WHERE)
        self._declare(count * smallest)
        return count

    def _string(self) -> Generator[None, None, str]:
        size = yield from self._integer()
        if size > MAX_STRING:
            raise LimitError(f"string of {size} bytes announced", where=_WHERE)
        self._declare(size)
        if not size:
            return ""
        padded = yield from self._take(size + -size % 8)
        if any(padded[size:]):
            raise FormatError("padding that is not zero", where=_WHERE)
        return padded[:size].decode("utf-8", "surrogateescape")

    def _declare(self, size: int) -> None:
        self._declared += size
        if self._declared > MAX_REQUEST:
            raise LimitError(f"request of more than {MAX_REQUEST} bytes", where=_WHERE)

    def _integer(self) -> Generator[None, None, int]:
        while len(self._buffer) < 8:
            yield
        value: int = _U64.unpack_from(self._buffer)[0]
        del self._buffer[:8]
        return value

    def _take(self, size: int) -> Generator[None, None, bytes]:
        while len(self._buffer) < size:
            yield
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken


def server_hello() -> bytes:
    return encode((SERVER_MAGIC, VERSION))


def features(names: Sequence[str] = ()) -> bytes:
    return encode((list(names),))


def greeting(version: int, program: str, *, trusted: bool) -> bytes:
    """``program``: what ``nix store info`` shows. ``trusted``: whether the client may change the store."""
    values: list[Value] = []
    if version >= VERSION_STRING_SINCE:
        values.append(program)
    if version >= TRUST_SINCE:
        values.append(1 if trusted else 2)
    return encode((*values, LAST))


def reply(values: Sequence[Value]) -> bytes:
    """LAST and the fields of the operation's row, in order; a NAR follows from elsewhere."""
    return encode((LAST, *values))


def already_valid(targets: Sequence[str], version: int) -> list[Value]:
    """RESULTS that say of each target that nothing had to be done."""
    result: list[Value] = [2, "", *[0] * (4 + (2 if version >= CPU_TIMES_SINCE else 0)), []]
    values: list[Value] = [len(targets)]
    for target in targets:
        values += (target, *result)
    return values


def error_reply(version: int, message: str) -> bytes:
    """ERROR, in words that are never taken for "no such path"."""
    message = message.replace(_INVALID_WORDS, "is invalid")
    if len(message.encode("utf-8", "surrogateescape")) > MAX_STRING:
        message = message[: MAX_STRING // 4] + "..."
    if version >= STRUCTURED_ERRORS_SINCE:
        return encode((ERROR, "Error", 0, "Error", message, 0, 0))
    return encode((ERROR, message, 1))


def encode(values: Sequence[Value]) -> bytes:
    """Integers, strings, lists of strings and lists of pairs, one after the other."""
    parts: list[bytes] = []
    for value in values:
        if isinstance(value, int):
            parts.append(_U64.pack(value))
        elif isinstance(value, str):
            _put_string(parts, value)
        else:
            parts.append(_U64.pack(len(value)))
            for item in value:
                for text in (item,) if isinstance(item, str) else item:
                    _put_string(parts, text)
    return b"".join(parts)


def _put_string(parts: list[bytes], text: str) -> None:
    data = text.encode("utf-8", "surrogateescape")
    parts += (_U64.pack(len(data)), data, bytes(-len(data) % 8))
