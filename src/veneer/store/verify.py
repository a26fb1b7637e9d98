"""The only place where unverified things become verified.

- ``verify_path_info``: a narinfo becomes ``PathInfo`` when a trusted key signed its fingerprint, or when the source itself
  is trusted, or when the view does not require signatures. Content-addressed paths get no exception: Nix accepts them
  unsigned because it recomputes their address on import; we serve before an import and ask for a signature.
  Invariant S1: a signature that was found valid is remembered under a digest of the key's bytes, the signature's text and
  the signed bytes, and under nothing else. So the memory answers only "are these bytes signed so by this key", which never
  changes. Whose keys count is asked of the policy each time, before the memory: a narinfo that changed in a signed field, another
  signature, a key of the same name with other bytes, a view with other keys, none of them finds what it has no right to.
  Failures are not remembered.
- ``check_chunk_map``: a chunk map is believed when a trusted key signed it, where a narinfo without a signature would not be.
- ``check_chunk``: a chunk's bytes are those of its digest.
- ``check_sparse``: a sparse NAR of which all chunks are here becomes ``VerifiedNar``, as if it had arrived as a stream.
- ``receive_nar``: an encoded NAR stream becomes ``VerifiedNar`` when its decoded bytes have the signed size and hash.
  The NAR's own grammar is checked on the way and gives the tree.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from veneer.cache.nars import IncomingNar, VerifiedNar
from veneer.cache.sparse import SparseNar
from veneer.formats.chunk_map import Chunk, UnverifiedChunkMap
from veneer.formats.nar import NarParser, TreeBuilder
from veneer.formats.signature import PublicKey, fingerprint
from veneer.model.errors import (
    CacheError,
    FormatError,
    HashMismatchError,
    SourceError,
    TruncatedError,
    TrustError,
)
from veneer.model.path_info import PathInfo, UnverifiedPathInfo
from veneer.model.tree import Node
from veneer.sources.compression import open_decoder


class CutError(SourceError):
    """A body that ended before its time, of a source that says neither at first nor at the end how long it is."""


PIECE = 1 << 20
"""Bytes decoded, hashed and written at a time."""


class Readable(Protocol):
    """What a decoder pulls from: ``read`` gives at most ``size`` bytes, b"" at the end."""

    def read(self, size: int = -1, /) -> bytes: ...


class SignatureMemory(Protocol):
    """Digests of valid signatures (S1), kept over restarts; ``cache.index`` is one."""

    def signature_verified(self, digest: bytes) -> bool: ...
    def put_signature_verified(self, digest: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class TrustPolicy:
    """Whose word counts. ``keys`` by name; several keys may share one name."""

    keys: tuple[PublicKey, ...]
    require_signatures: bool = True


def verify_path_info(
    policy: TrustPolicy,
    unverified: UnverifiedPathInfo,
    memory: SignatureMemory,
    *,
    source_url: str,
    source_trusted: bool,
) -> PathInfo:
    """``unverified`` with the names of the trusted keys that signed it. TrustError when nobody vouches for it."""
    signed_by: list[str] = []
    if unverified.signatures and policy.keys:
        signed_by = list(_signers(policy, fingerprint(unverified), unverified.signatures, memory))
    if not signed_by and policy.require_signatures and not source_trusted:
        names = ", ".join(s.partition(":")[0] for s in unverified.signatures)
        trusted = ", ".join(key.name for key in policy.keys)
        raise TrustError(
            f"{unverified.store_path} has no valid signature of a trusted key"
            f" (signed by: {names or 'nobody'}; trusted: {trusted or 'no keys'})",
            where=source_url,
            hint="add the cache's key with --trusted-public-key, or trusted=true to the cache's URL if you trust its every byte",
        )
    return PathInfo(unverified, tuple(signed_by))


def _signers(
    policy: TrustPolicy, text: bytes, signatures: Iterable[str], memory: SignatureMemory
) -> Iterator[str]:
    """Names of the trusted keys that signed ``text``, as far as anybody asks."""
    for signature in signatures:
        name = signature.partition(":")[0]
        if any(key.name == name and _signed(key, text, signature, memory) for key in policy.keys):
            yield name


def _signed(key: PublicKey, text: bytes, signature: str, memory: SignatureMemory) -> bool:
    """``key.verify``, once for each key, text and signature."""
    digest = hashlib.sha256(key.raw)  # of fixed length; a length parts the other two
    said = signature.encode("utf-8", "surrogateescape")
    digest.update(len(said).to_bytes(8, "little") + said + text)
    known = digest.digest()
    if memory.signature_verified(known):
        return True
    if not key.verify(text, signature):
        return False
    with suppress(CacheError):  # the disk may be full: it is checked again then
        memory.put_signature_verified(known)
    return True


def check_chunk_map(
    policy: TrustPolicy,
    unverified: UnverifiedChunkMap,
    memory: SignatureMemory,
    *,
    source_url: str,
    source_trusted: bool,
) -> None:
    """TrustError when nobody vouches for it: the same conditions as for a narinfo."""
    if source_trusted or not policy.require_signatures:
        return
    if any(_signers(policy, unverified.fingerprint(), unverified.signatures, memory)):
        return
    raise TrustError(
        f"the chunk map of {unverified.store_path} has no valid signature of a trusted key", where=source_url
    )


def check_chunk(chunk: Chunk, data: bytes, *, where: str) -> None:
    """HashMismatchError when ``data`` is not the chunk's."""
    if hashlib.sha256(data).digest() != chunk.digest:
        raise HashMismatchError(
            f"the chunk at byte {chunk.offset} of the NAR is not the signed one", where=where
        )


def check_sparse(info: PathInfo, nar: SparseNar, *, where: str) -> tuple[VerifiedNar, Node]:
    """Check a NAR whose chunks are all here against its hash; blocks, for a worker thread. As ``receive_nar``."""
    with open(os.dup(nar.fileno), "rb", buffering=0) as file:
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        tree = _check(info, lambda: file, lambda piece, size: None, where)
    return VerifiedNar(nar, info.info.nar_hash, info.info.nar_size), tree


def receive_nar(
    info: PathInfo, encoded: Readable, incoming: IncomingNar, progress: Callable[[int], None], *, where: str
) -> tuple[VerifiedNar, Node]:
    """Decode, check and write a whole NAR; blocks, for a worker thread.

    ``progress`` is told the NAR bytes written so far. HashMismatchError or FormatError: the content is bad and nothing
    of ``incoming`` may be used. CutError: it ended early and nobody said how long it is, so it may be good, and it is the
    transfer that is bad. Reads at most one piece beyond the signed size, whatever the stream holds.
    """

    def take(piece: bytes, size: int) -> None:
        incoming.write(piece)
        progress(size)

    tree = _check(info, lambda: open_decoder(info.info.compression, encoded), take, where)
    return VerifiedNar(incoming, info.info.nar_hash, info.info.nar_size), tree


def _check(
    info: PathInfo, decoded: Callable[[], Readable], take: Callable[[bytes, int], None], where: str
) -> Node:
    """The tree of the NAR that ``decoded()`` gives, which is the signed one. ``take`` gets each piece, and the size with it."""
    expected = info.info
    hasher = expected.nar_hash.hasher()
    parser, tree = NarParser(), TreeBuilder()
    size = 0
    try:
        decoder = decoded()
        while piece := decoder.read(PIECE):
            size += len(piece)
            if size > expected.nar_size:
                raise HashMismatchError(
                    f"NAR of {info.store_path} is longer than its signed {expected.nar_size} bytes",
                    where=where,
                )
            hasher.update(piece)
            tree.add(parser.feed(piece))
            take(piece, size)
        parser.finish()
    except FormatError as error:
        if isinstance(error, TruncatedError) and expected.file_size is None:
            raise CutError(
                f"the NAR file of {info.store_path} ended early, at byte {size} of {expected.nar_size}",
                where=where,
            ) from error
        raise FormatError(f"NAR of {info.store_path}: {error.what}", where=where) from error
    digest = hasher.digest()
    if size != expected.nar_size or digest != expected.nar_hash.digest:
        found = type(expected.nar_hash)(expected.nar_hash.algorithm, digest)
        raise HashMismatchError(
            f"NAR of {info.store_path} is not the signed one: expected {expected.nar_hash} and {expected.nar_size} bytes,"
            f" got {found} and {size} bytes",
            where=where,
        )
    return tree.tree()
