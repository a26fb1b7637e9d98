"""From a store path's name to path info that a view trusts."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from veneer.model.errors import FormatError, HashMismatchError, NotFoundError, SourceError, VeneerError
from veneer.model.hashes import Hash
from veneer.model.path_info import PathInfo, UnverifiedPathInfo
from veneer.model.store_path import StorePath
from veneer.sources.base import Source
from veneer.sources.chain import RestingError

from .account import Account, Stories
from .remembered import RememberedSource
from .verify import SignatureMemory, verify_path_info
from .views import View


@dataclass(frozen=True, slots=True)
class Candidate:
    """A source that has a path, and its trusted word about it."""

    source: Source
    info: PathInfo


class AbsentError(NotFoundError):
    """Every source answered that it has no such path. ``seconds``: for how long nobody has to be asked again."""

    def __init__(self, path: StorePath, seconds: float) -> None:
        super().__init__(f"no source has {path}")
        self.seconds = seconds


class Resolver:
    """Asks a view's sources in order. Failures that a later source makes up for go to ``stories``."""

    def __init__(self, stories: Stories, memory: SignatureMemory) -> None:
        self._stories = stories
        self._memory = memory
        self._disputed: set[tuple[StorePath, Hash, Hash]] = set()
        """What was told of by ``_compare``."""

    async def candidates(
        self, view: View, path: StorePath, account: Account
    ) -> AsyncGenerator[Candidate, None]:
        """The sources that have ``path``, best first, each checked by the view's policy.

        After the last one: AbsentError when none had it and all answered; otherwise the first failure, if there was no
        candidate at all. A narinfo for another name with the same hash part counts as absent.
        """
        given = False
        failures: list[Exception] = []
        seen: dict[StorePath, tuple[Source, UnverifiedPathInfo]] = {}
        try:
            async for source, unverified in self._answers(view, path.hash_part, account, failures):
                said: UnverifiedPathInfo | None = unverified
                while said is not None:
                    self._compare(seen, source, said)
                    if said.store_path != path:
                        doubt(source, path)
                    else:
                        try:
                            info = self._verified(view, source, said)
                        except VeneerError as error:
                            doubt(source, path)
                            failures.append(error)
                        else:
                            given = True
                            yield Candidate(source, info)
                    said = await _asked_itself(source, path, account, failures)
        finally:
            for failure in failures:
                if given and isinstance(failure, RestingError):
                    continue  # else there would be a story for each path of a closure
                self._stories.add(str(path), failure)
        if given:
            return
        if failures:
            raise _worst(failures)
        raise AbsentError(path, _believed(view, path))

    async def best(self, view: View, path: StorePath, account: Account) -> Candidate:
        """The first candidate."""
        async with aclosing(self.candidates(view, path, account)) as candidates:
            async for candidate in candidates:
                return candidate
        raise AbsentError(path, _believed(view, path))

    async def path_info(self, view: View, path: StorePath, account: Account) -> PathInfo:
        """The best candidate's path info."""
        return (await self.best(view, path, account)).info

    async def bundled(self, view: View, path: StorePath) -> None:
        """Before questions about many paths: wait for what a bundle under way will tell of this one."""
        for source in view.chain.sources:
            if isinstance(source, RememberedSource):
                await source.bundled(path.hash_part)

    def want_closure(self, view: View, path: StorePath, account: Account) -> None:
        """Before questions about all that the path refers to."""
        for source in view.chain.sources:
            if isinstance(source, RememberedSource):
                source.want_closure(path.hash_part, account.book_metadata)

    def remembered(self, view: View, path: StorePath) -> PathInfo | None:
        """What ``path_info`` would give, where that can be told without asking anybody; None where it cannot.

        One source after the other: an earlier one that has to be asked, has another name or is not trusted may have
        something to tell, and the long way tells it.
        """
        try:
            for source in view.chain.sources:
                known = source.recall(path.hash_part) if isinstance(source, RememberedSource) else None
                if isinstance(known, UnverifiedPathInfo) and known.store_path == path:
                    return self._verified(view, source, known)
                if known is None or isinstance(known, UnverifiedPathInfo):
                    return None
        except VeneerError:
            return None
        return None

    async def by_hash_part(self, view: View, hash_part: str, account: Account) -> PathInfo | None:
        """Path info of the first name with this hash part that the view trusts; None when every source has none.

        Where nothing is trusted, the first failure is raised, as in ``candidates``.
        """
        failures: list[Exception] = []
        seen: dict[StorePath, tuple[Source, UnverifiedPathInfo]] = {}
        async with aclosing(self._answers(view, hash_part, account, failures)) as answers:
            async for source, unverified in answers:
                self._compare(seen, source, unverified)
        for path in seen:
            try:
                return await self.path_info(view, path, account)
            except VeneerError as error:
                failures.append(error)
        if failures:
            raise _worst(failures)
        return None

    def _verified(self, view: View, source: Source, unverified: UnverifiedPathInfo) -> PathInfo:
        return verify_path_info(
            view.policy,
            unverified,
            self._memory,
            source_url=source.url,
            source_trusted=source.url in view.trusted,
        )

    def _compare(
        self,
        seen: dict[StorePath, tuple[Source, UnverifiedPathInfo]],
        source: Source,
        info: UnverifiedPathInfo,
    ) -> None:
        """Tell, once, of a source that has another content for a path than one before it in order. Asks nobody."""
        path = info.store_path
        first, before = seen.setdefault(path, (source, info))
        dispute = (path, before.nar_hash, info.nar_hash)
        if before.nar_hash == info.nar_hash or dispute in self._disputed:
            return
        self._disputed.add(dispute)
        error = HashMismatchError(
            f"two sources have other contents for {path}: {first.url} has {before.nar_hash}, {source.url} has"
            f" {info.nar_hash}; the first that is trusted counts",
            where=source.url,
        )
        self._stories.add(str(path), error)

    async def _answers(
        self, view: View, hash_part: str, account: Account, failures: list[Exception]
    ) -> AsyncGenerator[tuple[Source, UnverifiedPathInfo], None]:
        """Answers from memory as long as the order allows it, then from the sources."""
        done: set[str] = set()
        for source in view.chain.sources:
            known = source.recall(hash_part) if isinstance(source, RememberedSource) else None
            if known is None:
                break
            done.add(source.url)
            if isinstance(known, UnverifiedPathInfo):
                yield source, known
        if len(done) == len(view.chain.sources):
            return
        answers = view.chain.path_infos(hash_part, account.book_metadata)
        told = 0
        async for source, info in answers:
            failures.extend(answers.failures[told:])  # now: many take one answer and leave
            told = len(answers.failures)
            if source.url not in done:
                done.add(source.url)
                yield source, info
        failures.extend(answers.failures[told:])
        for source in view.chain.sources:
            if source.url not in done and isinstance(source, RememberedSource):
                known = source.recall(hash_part, doubted=True)  # better than nothing of a source that fails
                if isinstance(known, UnverifiedPathInfo):
                    yield source, known


def doubt(source: Source, path: StorePath) -> None:
    """What ``source`` said of ``path`` was of no use: it is asked again, though not at once."""
    if isinstance(source, RememberedSource):
        source.doubt(path.hash_part)


async def _asked_itself(
    source: Source, path: StorePath, account: Account, failures: list[Exception]
) -> UnverifiedPathInfo | None:
    """What the source itself says, where its bundle's word was doubted just now; None where there is nothing more to hear."""
    if not isinstance(source, RememberedSource) or not source.is_misled(path.hash_part):
        return None
    try:
        return await source.path_info(path.hash_part, account.book_metadata)
    except (SourceError, FormatError) as error:
        failures.append(error)
        return None


def _believed(view: View, path: StorePath) -> float:
    """Seconds for which no source has to be asked again: the least of what is left of their answers."""
    left = view.negative_ttl
    for source in view.chain.sources:
        if isinstance(source, RememberedSource):
            known = source.recall(path.hash_part)
            if not isinstance(known, UnverifiedPathInfo):  # that was another name, or one that nobody signed
                left = min(left, known or 0.0)
    return left


def _worst(failures: list[Exception]) -> Exception:
    """What to tell when nothing worked: a broken promise of trust before a source that could not be reached."""
    for failure in failures:
        if isinstance(failure, VeneerError) and not isinstance(failure, SourceError):
            return failure
    return failures[0]
