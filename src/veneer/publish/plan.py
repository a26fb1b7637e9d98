"""What publishing has to upload, and in which order. Pure.

P1  Of one path: NAR file, listing, chunk map, and the narinfo last. Until it is there, nobody asks for the others.
P2  The narinfos of the paths that a path refers to come before its own: whoever sees a path can have its closure.
P3  A path whose narinfo is there already is left as it is, whatever build of it that is, as Nix does. The line that
    announces a bundle may be added to a root's.
P4  A root's bundle comes right before its narinfo, and so after all that is in it.

Roots are the paths asked for that no other one asked for refers to: a whole closure on the command line has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from veneer.formats import bundle
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
    bundled: bool = False
    """Whether it is a root that gets a bundle, if anything of its closure is there."""

    def objects(self, *, chunk_map: bool) -> tuple[str, ...]:
        """Names in the order in which they appear (P1)."""
        part = self.info.store_path.hash_part
        chunks = (f"{part}{SUFFIX}",) if chunk_map else ()
        return (
            NAR_NAME,
            f"{part}.ls",
            *chunks,
            *(bundle_objects(part) if self.bundled else (f"{part}.narinfo",)),
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """``uploads`` in an order that holds P2; ``present``: left as they are; ``other``: those of them that are another build.

    ``bundles``: roots among the present ones that get a bundle, or a new one because more of their closure will be there.
    """

    uploads: tuple[Upload, ...]
    present: tuple[StorePath, ...] = ()
    other: tuple[StorePath, ...] = ()
    bundles: tuple[UnverifiedPathInfo, ...] = ()

    @property
    def nar_size(self) -> int:
        """Bytes of all NARs to be read."""
        return sum(upload.info.nar_size for upload in self.uploads)


def bundle_objects(hash_part: str) -> tuple[str, str]:
    """Names in the order in which they appear (P4)."""
    return hash_part + bundle.SUFFIX, f"{hash_part}.narinfo"


def make_plan(
    wanted: Iterable[UnverifiedPathInfo],
    present: Mapping[StorePath, UnverifiedPathInfo],
    asked: Iterable[StorePath] = (),
) -> Plan:
    """``present``: what the target says of those that it has. ``asked``: the wanted ones that were asked for by name.

    VeneerError when paths refer to each other in a circle.
    """
    by_path = {info.store_path: info for info in wanted}
    missing = {path: info for path, info in by_path.items() if path not in present}
    there = tuple(sorted(path for path in by_path if path in present))
    known = {**by_path, **present}
    roots = _roots(known, asked)
    uploads = tuple(
        Upload(missing[path], tuple(sorted(_needs(missing, path))), path in roots)
        for path in _references_first(missing)
    )
    other = tuple(path for path in there if present[path].nar_hash != by_path[path].nar_hash)
    bundles = tuple(
        present[root]
        for root in there
        if root in roots and (not bundle.is_announced(present[root]) or _reaches(known, root, missing))
    )
    return Plan(uploads, there, other, bundles)


def unsigned(plan: Plan) -> list[StorePath]:
    """The paths to upload that nobody has signed."""
    return [upload.info.store_path for upload in plan.uploads if not upload.info.signatures]


def _roots(infos: Mapping[StorePath, UnverifiedPathInfo], asked: Iterable[StorePath]) -> set[StorePath]:
    """Those asked for that refer to something, and that no other one asked for refers to."""
    names = {path for path in asked if path in infos}
    needed = {reference for path in names for reference in infos[path].references if reference != path}
    return {path for path in names - needed if any(r != path for r in infos[path].references)}


def _reaches(
    infos: Mapping[StorePath, UnverifiedPathInfo], root: StorePath, paths: Mapping[StorePath, object]
) -> bool:
    """Whether one of ``paths`` is in the closure of ``root``."""
    seen, waiting = {root}, [root]
    while waiting:
        path = waiting.pop()
        if path in paths:
            return True
        new = _needs(infos, path) - seen
        seen |= new
        waiting.extend(new)
    return False


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
