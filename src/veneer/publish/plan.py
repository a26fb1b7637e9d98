"""What publishing has to upload, and in which order. Pure.

P1  Of one path: NAR file, listing, chunk map, and the narinfo last. Until it is there, nobody asks for the others.
P2  The narinfos of the paths that a path refers to come before its own: whoever sees a path can have its closure.
P3  A path whose narinfo is there already is left as it is, whatever build of it that is, as Nix does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from veneer.formats.chunk_map import SUFFIX
from veneer.model.errors import VeneerError
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath

NAR_NAME = "nar/<file hash>.nar.zst"
"""In a plan: the real name is known when the NAR is encoded."""


@dataclass(frozen=True, slots=True)
class Upload:
    """One path to upload. ``after``: the paths of the plan whose narinfos come first; they stand before it."""

    info: UnverifiedPathInfo
    after: tuple[StorePath, ...]

    def objects(self, *, chunk_map: bool) -> tuple[str, ...]:
        """Names in the order in which they appear (P1)."""
        part = self.info.store_path.hash_part
        chunks = (f"{part}{SUFFIX}",) if chunk_map else ()
        return (NAR_NAME, f"{part}.ls", *chunks, f"{part}.narinfo")


@dataclass(frozen=True, slots=True)
class Plan:
    """``uploads`` in an order that holds P2; ``present``: left as they are; ``other``: those of them that are another build."""

    uploads: tuple[Upload, ...]
    present: tuple[StorePath, ...] = ()
    other: tuple[StorePath, ...] = ()

    @property
    def nar_size(self) -> int:
        """Bytes of all NARs to be read."""
        return sum(upload.info.nar_size for upload in self.uploads)


def make_plan(wanted: Iterable[UnverifiedPathInfo], present: Mapping[StorePath, UnverifiedPathInfo]) -> Plan:
    """``present``: what the target says of those that it has. VeneerError when paths refer to each other in a circle."""
    by_path = {info.store_path: info for info in wanted}
    missing = {path: info for path, info in by_path.items() if path not in present}
    there = tuple(sorted(path for path in by_path if path in present))
    uploads = tuple(
        Upload(missing[path], tuple(sorted(_needs(missing, path)))) for path in _references_first(missing)
    )
    other = tuple(path for path in there if present[path].nar_hash != by_path[path].nar_hash)
    return Plan(uploads, there, other)


def unsigned(plan: Plan) -> list[StorePath]:
    """The paths to upload that nobody has signed."""
    return [upload.info.store_path for upload in plan.uploads if not upload.info.signatures]


def _needs(infos: Mapping[StorePath, UnverifiedPathInfo], path: StorePath) -> set[StorePath]:
    return {reference for reference in infos[path].references if reference in infos and reference != path}


def _references_first(infos: Mapping[StorePath, UnverifiedPathInfo]) -> Iterator[StorePath]:
    """Every path after those that it refers to; otherwise in order of their names."""
    done: set[StorePath] = set()
    for root in sorted(infos):
        stack = [(root, iter(sorted(_needs(infos, root))))]
        under_way = {root}
        while stack:
            path, needs = stack[-1]
            if path in done:
                under_way.discard(stack.pop()[0])
                continue
            for need in needs:
                if need in under_way:
                    raise VeneerError("it and another path refer to each other", where=path.basename)
                if need not in done:
                    under_way.add(need)
                    stack.append((need, iter(sorted(_needs(infos, need)))))
                    break
            else:
                done.add(path)
                under_way.discard(stack.pop()[0])
                yield path
