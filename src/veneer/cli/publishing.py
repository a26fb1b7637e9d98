"""What ``publish`` and ``mirror`` have in common: from settings and flags to a plan that is carried out."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from veneer.cli.client import Client
from veneer.cli.config import Settings, source_url
from veneer.cli.output import Output, count, format_size, parse_size
from veneer.cli.private_daemon import open_client
from veneer.cli.reader import StoreReader
from veneer.environment import named
from veneer.formats.signature import SecretKey
from veneer.model.errors import FormatError, TrustError, UsageError
from veneer.model.hashes import Hash
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import DEFAULT_STORE_DIR, StorePath
from veneer.publish.contents import Content, Contents, directory_tree, nar_file
from veneer.publish.encode import Encoder
from veneer.publish.plan import Plan, bundle_objects, make_plan, unsigned
from veneer.publish.target import Target, open_target
from veneer.publish.upload import Done, Publisher, begin_cache, check_cache, present
from veneer.sources.nix_database import NixDatabase
from veneer.sources.options import parse_source_url

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Request:
    """The flags of ``options.publish_flags``, checked."""

    to: str
    key: SecretKey | None
    unsigned: bool
    level: int
    frame_size: int
    jobs: int
    dry_run: bool
    fsync: bool

    @classmethod
    def parse(cls, output: Output, given: Mapping[str, object]) -> Request:
        """UsageError."""
        key_file, level, jobs = given["key_file"], given["level"], given["jobs"]
        assert isinstance(level, int)
        return cls(
            to=source_url(str(given["to"])),
            key=_read_key(Path(str(key_file))) if key_file else None,
            unsigned=bool(given["unsigned"]),
            level=level,
            frame_size=parse_size(str(given["frame_size"])),
            jobs=jobs if isinstance(jobs, int) else len(os.sched_getaffinity(0)),
            dry_run=bool(given["dry_run"]),
            fsync=bool(given["fsync"]),
        )


@dataclass(frozen=True, slots=True)
class Found:
    """Paths to publish and where their contents come from. ``asked``: those that were asked for by name."""

    infos: tuple[UnverifiedPathInfo, ...]
    contents: Contents
    asked: tuple[StorePath, ...]


def publish_all(output: Output, settings: Settings, request: Request, found: Found) -> None:
    """Plan, then upload or print the plan. VeneerError."""
    ca_file = Path(settings.ca_file) if settings.ca_file else None
    encoder = Encoder(level=request.level, frame_size=request.frame_size, jobs=request.jobs)
    with encoder, open_target(parse_source_url(request.to), fsync=request.fsync, ca_file=ca_file) as target:
        check_cache(target, DEFAULT_STORE_DIR)
        plan = make_plan(found.infos, present(target, found.infos), found.asked)
        _check_signed(plan, request)
        for path in plan.other:
            output.warning(f"{target.url} keeps another build of {path}")
        if request.dry_run:
            _print_plan(output, target, plan, request)
            return
        begin_cache(target, DEFAULT_STORE_DIR)
        publisher = Publisher(target, encoder, found.contents, key=request.key, jobs=request.jobs)
        with output.progress("publishing") as advance:
            done = publisher.run(plan, advance)
        _print_done(output, target, plan, done)


@contextmanager
def view_paths(output: Output, settings: Settings, names: list[str], *, closure: bool) -> Iterator[Found]:
    """Paths of the configured caches, verified as for any reader; their NARs come through the local cache."""
    with open_client(settings) as client:
        rows = client.control("closure", {"paths": names, "alone": not closure})["paths"]
        assert isinstance(rows, list)
        infos = tuple(_info(row) for row in rows)
        contents = _CacheContents(settings)
        try:
            yield Found(infos, contents.open, tuple(StorePath.parse(name) for name in names))
        finally:
            contents.close()


def is_environment(arguments: tuple[str, ...]) -> bool:
    """Whether the arguments name an environment: one word that is no store path."""
    return len(arguments) == 1 and "/" not in arguments[0] and not _is_store_path(arguments[0])


def environment_paths(output: Output, settings: Settings, name: str) -> Found:
    """What was built in an environment, as its Nix database has it. UsageError when there is no such environment."""
    root = settings.environments_dir
    state = root / name / "var" / "nix"
    database = NixDatabase(state, DEFAULT_STORE_DIR) if (state / "db" / "db.sqlite").exists() else None
    infos = []
    for change in named.diff(root, name):
        if change.change != "new" or not _is_store_path(change.name):
            continue
        path = StorePath.parse(change.name)
        info = None if database is None else database.path_info(path.hash_part)
        if info is not None and info.store_path == path:
            infos.append(info)
        else:
            output.warning(f"{path} is not published: Nix in {name} does not know it as valid")
    upper = root / name / "upper"

    @contextmanager
    def open_tree(info: UnverifiedPathInfo) -> Iterator[Content]:
        yield directory_tree(upper / info.store_path.basename)

    return Found(tuple(infos), open_tree, tuple(info.store_path for info in infos))


class _CacheContents:
    """NARs out of the local cache, fetched when they are missing: for each thread a connection of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._own = threading.local()
        self._clients: list[Client] = []

    @contextmanager
    def open(self, info: UnverifiedPathInfo) -> Iterator[Content]:
        reader: StoreReader | None = getattr(self._own, "reader", None)
        if reader is None:
            client = open_client(self._settings)
            self._clients.append(client)
            reader = self._own.reader = StoreReader(client, self._settings.cache_dir)
        with nar_file(reader.nar(info.store_path.basename)) as content:
            yield content

    def close(self) -> None:
        for client in self._clients:
            client.close()


def _is_store_path(name: str) -> bool:
    try:
        StorePath.parse(name)
    except FormatError:
        return False
    return True


def _info(row: Mapping[str, object]) -> UnverifiedPathInfo:
    """A row of the daemon's "closure"."""
    size, signatures, references = row["nar_size"], row["signatures"], row["references"]
    assert isinstance(size, int) and isinstance(signatures, list) and isinstance(references, list)
    return UnverifiedPathInfo(
        store_path=StorePath.parse(str(row["path"])),
        url="",
        compression="",
        nar_hash=Hash.parse(str(row["nar_hash"])),
        nar_size=size,
        references=tuple(StorePath.parse(name) for name in references),
        deriver=str(row["deriver"]),
        signatures=tuple(signatures),
        ca=str(row["ca"]),
    )


def _read_key(file: Path) -> SecretKey:
    try:
        return SecretKey.parse(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UsageError(f"cannot read the key: {reason}", where=str(file)) from error
    except FormatError as error:
        raise UsageError(
            f"not a secret key: {error.what}", where=str(file), hint="nix key generate-secret --key-name NAME"
        ) from error


def _check_signed(plan: Plan, request: Request) -> None:
    missing = unsigned(plan)
    if missing and request.key is None and not request.unsigned:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise TrustError(
            f"nobody signed {_names(missing[:_SHOWN])}{more}",
            hint="sign them with --key-file FILE, or publish them as they are with --unsigned",
        )


def _names(paths: Iterable[StorePath]) -> str:
    return ", ".join(path.basename for path in paths)


def _print_plan(output: Output, target: Target, plan: Plan, request: Request) -> None:
    chunk_map = request.key is not None
    rows = [(upload.info, upload.objects(chunk_map=chunk_map)) for upload in plan.uploads]
    added = [(info, bundle_objects(info.store_path.hash_part)) for info in plan.bundles]
    lines = [f"{name}  {info.store_path}" for info, names in (*rows, *added) for name in names]
    lines.append(
        f"{count(len(rows), 'store path')} to publish, {format_size(plan.nar_size)} uncompressed;"
        f" {len(plan.present)} there already"
    )
    document = {
        "to": target.url,
        "plan": [
            {"path": info.store_path.basename, "nar_size": info.nar_size, "objects": list(names)}
            for info, names in rows
        ],
        "present": [path.basename for path in plan.present],
        "bundles": [{"path": info.store_path.basename, "objects": list(names)} for info, names in added],
    }
    output.result("\n".join(lines), document)


def _print_done(output: Output, target: Target, plan: Plan, done: Done) -> None:
    text = (
        f"{count(len(done.paths), 'store path')} published, {format_size(done.nar_size)} as {format_size(done.file_size)},"
        f" {format_size(done.sent)} sent; {len(plan.present)} there already"
    )
    document = {
        "to": target.url,
        "published": sorted(path.basename for path in done.paths),
        "present": [path.basename for path in plan.present],
        "bundles": sorted(path.basename for path in done.bundles),
        "other_builds": [path.basename for path in plan.other],
        "nar_size": done.nar_size,
        "file_size": done.file_size,
        "sent": done.sent,
    }
    output.result(text, document)
