"""Checks of the configured sources: reachable, of our store, trusted, in time, and of one mind about a path."""

from __future__ import annotations

import asyncio
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import replace
from email.utils import parsedate_to_datetime
from pathlib import Path

from veneer.doctor.finding import Result, Subject
from veneer.formats.cache_info import CacheInfo
from veneer.formats.signature import PublicKey
from veneer.model.errors import FormatError, VeneerError
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import DEFAULT_STORE_DIR, StorePath
from veneer.sources.base import Source
from veneer.sources.opening import open_source
from veneer.sources.options import SourceOptions, parse_source_url, without_secrets
from veneer.sources.store_directory import is_trusted

SECONDS = 8.0
MOST_SKEW = 300.0
Question = Callable[[Source], Awaitable[object]]


def reachable(subject: Subject) -> Iterator[Result]:
    if not subject.sources:
        yield Result("failed", "no source is configured", "--cache URL, or substituters in nix.conf")
        return
    for url, answer in zip(subject.sources, asyncio.run(_ask_all(subject, _info)), strict=True):
        yield judged(without_secrets(url), answer)


def judged(url: str, answer: object) -> Result:
    """``answer``: what the source says of itself, or why it does not."""
    if isinstance(answer, VeneerError):
        fix = answer.hint or f"is the address right? curl -I {url.rstrip('/')}/nix-cache-info"
        return Result("failed", answer.story() if url in answer.story() else f"{url}: {answer.story()}", fix)
    if isinstance(answer, TimeoutError):
        return Result(
            "failed",
            f"{url} did not answer within {SECONDS:g} s",
            f"curl -I {url.rstrip('/')}/nix-cache-info",
        )
    if not isinstance(answer, CacheInfo):
        return Result("failed", f"{url}: {answer}", "veneer status")
    if answer.store_dir != DEFAULT_STORE_DIR:
        what = f"{url} is for the store directory {answer.store_dir}, ours is {DEFAULT_STORE_DIR}"
        return Result("failed", what, f"leave {url} out of the sources")
    mass = "" if answer.want_mass_query else ", does not ask for mass queries"
    return Result("ok", f"{url} answers, priority {answer.priority}{mass}")


def keys(subject: Subject) -> Iterator[Result]:
    good = 0
    for text in subject.keys:
        try:
            PublicKey.parse(text)
            good += 1
        except FormatError as error:
            yield Result(
                "failed",
                f"not a public key: {text}: {error.what}",
                "keys look like cache.example.org-1:BASE64",
            )
    need = [url for url in subject.sources if not _is_trusted(url)] if subject.require_signatures else []
    if need and not good:
        shown = ", ".join(without_secrets(url) for url in need)
        fix = "--trusted-public-key NAME:BASE64, or trusted-public-keys in nix.conf"
        yield Result("failed", f"no key is trusted, and signatures are needed for {shown}", fix)
    elif good == len(subject.keys):
        yield Result("ok", f"{good} keys" if need else f"{good} keys; no source needs one")


def clock(subject: Subject) -> Iterator[Result]:
    asked = 0
    for url in subject.sources:
        address = parse_source_url(url).address
        if not address.startswith(("http://", "https://")):
            continue
        theirs = _date(address.rstrip("/") + "/nix-cache-info", subject.ca_file)
        if theirs is None:
            continue
        asked += 1
        result = skew(time.time() - theirs, without_secrets(url))
        if result.state != "ok":
            yield result
            return
    yield (
        Result("ok", f"agrees with {asked} sources")
        if asked
        else Result("skipped", "no source told the time")
    )


def skew(seconds: float, url: str) -> Result:
    """``seconds``: how far ours is ahead."""
    if abs(seconds) <= MOST_SKEW:
        return Result("ok", "")
    direction = "ahead of" if seconds > 0 else "behind"
    return Result(
        "warning",
        f"this machine's clock is {abs(seconds):.0f} s {direction} {url}",
        "timedatectl set-ntp true",
    )


def named_paths(subject: Subject) -> Iterator[Result]:
    """Each named path at each source: who has it, and whether they agree."""
    if not subject.paths:
        yield Result("skipped", "no store paths were named: veneer doctor PATH…")
        return
    for path in subject.paths:
        answers = asyncio.run(_ask_all(subject, _has(path)))
        yield agreement(path, dict(zip(map(without_secrets, subject.sources), answers, strict=True)))


def agreement(path: StorePath, answers: dict[str, object]) -> Result:
    have = {url: info for url, info in answers.items() if isinstance(info, UnverifiedPathInfo)}
    if not have:
        errors = [url for url, answer in answers.items() if answer is not None]
        if errors:
            return Result(
                "warning",
                f"{path.basename}: not known, {', '.join(errors)} failed",
                "veneer doctor --source URL",
            )
        return Result(
            "warning",
            f"{path.basename}: no source has it",
            "upload it, or add the cache that has it: --cache URL",
        )
    hashes = {str(info.nar_hash) for info in have.values()}
    if len(hashes) > 1:
        first = next(iter(have))
        what = f"{path.basename} is not the same everywhere: " + ", ".join(
            f"{info.nar_hash} at {url}" for url, info in have.items()
        )
        return Result("warning", what, f"the first in order ({first}) is used; leave out the other one")
    return Result("ok", f"{path.basename}: at {', '.join(have)}")


def _is_trusted(url: str) -> bool:
    try:
        return is_trusted(parse_source_url(url))
    except VeneerError:
        return False


def _has(path: StorePath) -> Question:
    return lambda source: source.path_info(path.hash_part)


async def _info(source: Source) -> CacheInfo:
    info = await source.nix_cache_info()
    return replace(info, priority=source.priority)


async def _ask_all(subject: Subject, question: Question) -> list[object]:
    return await asyncio.gather(*(_ask(subject, url, question) for url in subject.sources))


async def _ask(subject: Subject, url: str, question: Question) -> object:
    """The answer, or the error instead."""
    options = SourceOptions(
        netrc=subject.netrc, ca_file=subject.ca_file, connect_seconds=3.0, stall_seconds=5.0, tries=1
    )
    try:
        source = open_source(parse_source_url(url), options)
        try:
            async with asyncio.timeout(SECONDS):
                return await question(source)
        finally:
            await source.close()
    except (VeneerError, TimeoutError) as error:
        return error


def _date(url: str, ca_file: Path | None) -> float | None:
    """The server's time, from any answer; None when there is none."""
    context = ssl.create_default_context()
    if ca_file is not None:
        context.load_verify_locations(cafile=ca_file)
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "veneer"})
    try:
        with closing(urllib.request.urlopen(request, timeout=3.0, context=context)) as answer:
            date = answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        with error:
            date = error.headers.get("Date")
    except (OSError, ValueError):
        return None
    try:
        return parsedate_to_datetime(date).timestamp() if date else None
    except ValueError:
        return None
