"""A signed cache on disk with very many files and no content: narinfos and listings; there are no NARs, so nothing can be read."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

from veneer.formats.cache_info import CacheInfo, write_cache_info
from veneer.formats.listing import write_listing
from veneer.formats.nar import nar_size, with_offsets
from veneer.formats.narinfo import write_narinfo
from veneer.formats.signature import SecretKey, fingerprint
from veneer.model.hashes import Hash, nix32_encode
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import DEFAULT_STORE_DIR, StorePath
from veneer.model.tree import Directory, Node, RegularFile


def tree(entries: int) -> Node:
    """That many entries, the root included: about as many directories as files in each, and all files empty."""
    directories = math.isqrt(entries - 1)
    each, more = divmod(entries - 1 - directories, directories)
    empty = RegularFile(0, executable=False, offset=0)

    def directory(number: int) -> Directory:
        count = each + (number < more)
        return Directory(tuple((f"file-{i:06d}".encode(), empty) for i in range(count)))

    return with_offsets(
        Directory(tuple((f"directory-{i:06d}".encode(), directory(i)) for i in range(directories)))
    )


def write_wide_cache(directory: Path, paths: int, entries: int) -> tuple[list[str], str]:
    """``paths`` store paths of ``entries`` entries each in an empty directory; (the store paths, the public key)."""
    key = SecretKey.generate("wide-1")
    root = tree(entries)
    listing, size = write_listing(root), nar_size(root)
    (directory / "nix-cache-info").write_bytes(write_cache_info(CacheInfo(DEFAULT_STORE_DIR, True, 40)))
    made = []
    for number in range(paths):
        digest = hashlib.sha256(f"wide {paths} {entries} {number}".encode()).digest()
        path = StorePath(nix32_encode(digest[:20]), f"wide-{number}")
        nar_hash = Hash("sha256", digest)
        url = f"nar/{number}.nar"
        unsigned = UnverifiedPathInfo(path, url, "none", nar_hash, size)
        signature = key.sign(fingerprint(unsigned))
        info = UnverifiedPathInfo(path, url, "none", nar_hash, size, signatures=(signature,))
        (directory / f"{path.hash_part}.narinfo").write_bytes(write_narinfo(info))
        (directory / f"{path.hash_part}.ls").write_bytes(listing)
        made.append(f"{DEFAULT_STORE_DIR}/{path.basename}")
    return made, str(key.public_key())
