"""The operations of the Nix worker protocol, answered from one view.

What "valid" means: the view trusts the path's info, so the mount would show the path (a lookup that fails later fails with
EIO and a story, never with ENOENT). No content is fetched to say so.

What is never claimed: that a realisation is known, that anything can be built or substituted, or that a path has referrers or
valid derivers beyond those that this view was asked about (a binary cache cannot list them).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import BinaryIO, cast

from veneer.cache.index import PathRow
from veneer.formats import worker_wire as wire
from veneer.formats.worker_wire import Request, Value
from veneer.model.errors import FormatError, NotFoundError, UsageError, printable
from veneer.model.path_info import PathInfo
from veneer.model.store_path import StorePath, is_hash_part
from veneer.store.account import Account
from veneer.store.store import Store

from .worker_paths import KnownPaths
from .worker_replies import described

_DONE: tuple[Value, ...] = (1,)
_AT_ONCE = 64
"""Paths of one question that are looked up without letting others in between."""
_OPENS = 3
"""How often a NAR is fetched again when it was evicted between its arrival and its opening."""


class Answers:
    """Reply values for one session. ``seconds``: the longest wait for one path's answer."""

    def __init__(self, store: Store, known: KnownPaths, account: Account, seconds: float) -> None:
        self._store = store
        self._known = known
        self._view = known.view
        self._prefix = known.view.store_dir.rstrip("/") + "/"
        self._account = account
        self._seconds = seconds
        self._later: dict[int, Callable[..., Awaitable[Sequence[Value]]]] = {
            wire.IS_VALID_PATH.number: self._is_valid,
            wire.QUERY_REFERRERS.number: self._referrers,
            wire.ENSURE_PATH.number: self._ensure,
            wire.QUERY_PATH_INFO.number: self._path_info,
            wire.QUERY_PATH_FROM_HASH_PART.number: self._from_hash_part,
            wire.QUERY_VALID_PATHS.number: self._valid_paths,
            wire.QUERY_VALID_DERIVERS.number: self._valid_derivers,
            wire.QUERY_MISSING.number: self._missing,
            wire.BUILD_PATHS.number: self._build,
        }

    def repeated(self, request: bytes) -> bytes | None:
        """The reply to a request, byte for byte, that had it before."""
        kept = self._known.replies.get(request)
        if kept is None:
            return None
        self._account.know(kept.path, kept.nar_size)
        return kept.reply

    def at_once(self, request: Request) -> Sequence[Value] | None:
        """The reply when it is known; None: ``later`` has to be awaited. FormatError: a bad argument."""
        operation = request.operation
        if operation is wire.QUERY_PATH_INFO or operation is wire.IS_VALID_PATH:
            info = self._known.known(self._path(cast(str, request.values[0])))
            if info is None:
                return None
            self._known.replies.keep(info)
            return self._described(info) if operation is wire.QUERY_PATH_INFO else _DONE
        if operation is wire.QUERY_VALID_PATHS:
            texts = cast(list[str], request.values[0])
            if len(texts) > _AT_ONCE or any(self._known.known(self._path(text)) is None for text in texts):
                return None
            return (texts,)
        if operation is wire.SET_OPTIONS:
            return ()
        if operation is wire.ADD_TEMP_ROOT:  # nothing collects garbage here
            return _DONE
        if operation is wire.QUERY_REALISATION:
            return ([],)
        return None

    async def later(self, request: Request, version: int) -> Sequence[Value]:
        """The reply, when it is there. VeneerError: for an ERROR."""
        if request.operation is wire.BUILD_PATHS_WITH_RESULTS:
            await self._build(*request.values)
            return wire.already_valid(cast(list[str], request.values[0]), version)
        return await self._later[request.operation.number](*request.values)

    async def nar(self, request: Request) -> tuple[BinaryIO, int]:
        """The verified NAR, open for reading, and its size. NotFoundError, SourceError, TrustError."""
        path = self._path(cast(str, request.values[0]))
        for _ in range(_OPENS):
            row = await self._store.whole(self._view, path, self._account)
            try:
                return await asyncio.to_thread(self._open, row), row.nar_size
            except FileNotFoundError:
                continue
        raise NotFoundError(f"{path} is evicted as soon as it arrives", hint="give the cache a higher limit")

    def _open(self, row: PathRow) -> BinaryIO:
        return open(self._store.cache.nars.path(row.number), "rb")

    async def _is_valid(self, text: str) -> Sequence[Value]:
        return (0 if await self._info(self._path(text)) is None else 1,)

    async def _path_info(self, text: str) -> Sequence[Value]:
        info = await self._info(self._path(text))
        return (0,) if info is None else self._described(info)

    async def _ensure(self, text: str) -> Sequence[Value]:
        path = self._path(text)
        if await self._info(path) is None:
            raise NotFoundError(f"no source has {path}")
        return _DONE

    async def _build(self, *values: Value) -> Sequence[Value]:
        """Nix "builds" what it is about to copy: fine for paths that are there, refused for everything else."""
        targets = cast(list[str], values[0])
        for text in targets:
            if "!" in text:
                raise UsageError(f"this store can only be read: it does not build {printable(text)[:300]}")
        self._known.ask_ahead([self._path(text) for text in targets], self._account)
        for text in targets:
            await self._ensure(text)
        return _DONE

    async def _valid_paths(self, texts: list[str], substitute: int) -> Sequence[Value]:
        paths = [self._path(text) for text in texts]
        self._known.ask_ahead(paths, self._account)
        return (
            [text for text, path in zip(texts, paths, strict=True) if await self._info(path) is not None],
        )

    async def _missing(self, targets: list[str]) -> Sequence[Value]:
        """Outputs of derivations ("path!names") are not looked into: unknown, whatever is known of the derivation."""
        plain = {text: self._path(text) for text in targets if "!" not in text}
        self._known.ask_ahead(plain.values(), self._account)
        unknown = {text.partition("!")[0] for text in targets if "!" in text}
        for text, path in plain.items():
            if await self._info(path) is None:
                unknown.add(text)
        return [], [], sorted(unknown), 0, 0

    async def _referrers(self, text: str) -> Sequence[Value]:
        path = self._path(text)
        await self._info(path)
        return (sorted(self._absolute(referrer) for referrer in self._known.referrers(path)),)

    async def _valid_derivers(self, text: str) -> Sequence[Value]:
        info = await self._info(self._path(text))
        if info is None or not info.info.deriver:
            return ([],)
        deriver = StorePath.parse(info.info.deriver)
        return ([self._absolute(deriver)] if self._known.known(deriver) is not None else [],)

    async def _from_hash_part(self, hash_part: str) -> Sequence[Value]:
        if not is_hash_part(hash_part):
            raise FormatError(
                f"not the hash part of a store path: {hash_part[:100]!r}", where="worker protocol"
            )
        found = await self._known.by_hash_part(hash_part, self._account, self._seconds)
        return ("" if found is None else self._absolute(found),)

    async def _info(self, path: StorePath) -> PathInfo | None:
        info = await self._known.info(path, self._account, self._seconds)
        if info is not None:
            self._account.know(path, info.info.nar_size)
        return info

    def _described(self, known: PathInfo) -> Sequence[Value]:
        self._account.know(known.store_path, known.info.nar_size)
        return described(known, self._prefix)

    def _path(self, text: str) -> StorePath:
        return StorePath.parse_absolute(text, self._view.store_dir)

    def _absolute(self, path: StorePath) -> str:
        return path.absolute(self._view.store_dir)
