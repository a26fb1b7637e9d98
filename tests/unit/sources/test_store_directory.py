"""A Nix store with its database as a source, compared with what real Nix says about it."""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import json
import os
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from tests.support.doctor_subject import make_subject
from tests.support.nix import RealNix
from tests.support.sample import SampleStore
from tests.support.store_bench import Bench, run
from veneer.doctor import sources as doctor
from veneer.formats.listing import parse_listing
from veneer.formats.nar import tree_of_nar
from veneer.model.errors import (
    FormatError,
    SourceError,
    SourceMissingError,
    TrustError,
    UsageError,
    VeneerError,
)
from veneer.model.hashes import Hash
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath
from veneer.sources import store_directory
from veneer.sources.options import SourceOptions, parse_source_url
from veneer.sources.store_directory import StoreDirectory, is_trusted
from veneer.sources.temporary_roots import TemporaryRoots
from veneer.store.resolve import AbsentError

T = TypeVar("T")
pytestmark = pytest.mark.nix


def ask(url: str, body: Callable[[StoreDirectory], Awaitable[T]], options: SourceOptions | None = None) -> T:
    async def main() -> T:
        source = StoreDirectory(parse_source_url(url), options)
        try:
            return await body(source)
        finally:
            await source.close()

    return asyncio.run(asyncio.wait_for(main(), 60))


async def whole(source: StoreDirectory, info: UnverifiedPathInfo) -> bytes:
    return b"".join([chunk async for chunk in source.nar(info)])


def url_of(root: Path) -> str:
    return f"local?root={root}"


def database_of(root: Path) -> Path:
    return root / "nix/var/nix/db/db.sqlite"


def known(root: Path, hash_part: str) -> UnverifiedPathInfo | None:
    return ask(url_of(root), lambda source: source.path_info(hash_part))


@pytest.fixture
def copied(nix_cache: SampleStore, tmp_path: Path) -> Iterator[Path]:
    """The sample store, to be changed."""
    root = tmp_path / "copy"
    subprocess.run(["cp", "-a", nix_cache.nix.store, root], check=True)
    yield root
    subprocess.run(["chmod", "-R", "u+rwX", root], check=True)


def write(root: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(database_of(root), isolation_level=None)) as db:
        assert db.execute(statement, values).rowcount != 0


def sign(nix_cache: SampleStore, root: Path, name: str) -> None:
    command = ["nix", "store", "sign", "--store", str(root), "--key-file", str(nix_cache.secret)]
    nix_cache.nix.run(*command, nix_cache.paths[name])


def test_path_info_is_what_nix_says(nix_cache: SampleStore, copied: Path) -> None:
    every = sorted(nix_cache.paths.values())
    sign(nix_cache, copied, "selfish")
    told = json.loads(nix_cache.nix.run("nix", "path-info", "--store", copied, "--json", *every))

    async def body(source: StoreDirectory) -> None:
        for path in every:
            info = await source.path_info(StorePath.parse_absolute(path).hash_part)
            assert info is not None
            truth = told[path]
            assert info.store_path.absolute() == path
            assert info.nar_hash == Hash.parse(truth["narHash"])
            assert info.nar_size == truth["narSize"]
            assert sorted(each.absolute() for each in info.references) == sorted(truth["references"])
            assert info.deriver == Path(truth["deriver"] or "").name
            assert sorted(info.signatures) == sorted(truth["signatures"] or [])
            assert info.ca == (truth["ca"] or "")
            assert info.compression == "none"

    ask(url_of(copied), body)
    assert any(truth["signatures"] for truth in told.values())


def test_a_nar_has_the_registered_hash_and_its_listing_is_of_it(nix_cache: SampleStore) -> None:
    async def body(source: StoreDirectory) -> None:
        for name in nix_cache.paths:
            info = await source.path_info(nix_cache.hash_part(name))
            assert info is not None
            counted: list[int] = []
            nar = b"".join([chunk async for chunk in source.nar(info, counted.append)])
            assert hashlib.sha256(nar).digest() == info.nar_hash.digest
            assert sum(counted) == len(nar) == info.nar_size
            listing = await source.listing(nix_cache.hash_part(name))
            if name == "bytes-name":
                assert listing is None
            else:
                assert listing is not None
                assert parse_listing(listing, nar_size=info.nar_size) == tree_of_nar([nar])

    ask(url_of(nix_cache.nix.store), body)


def test_every_path_of_the_store_is_there_and_no_other(nix_cache: SampleStore) -> None:
    every = nix_cache.nix.closure([nix_cache.paths["selfish"]])
    assert all(known(nix_cache.nix.store, StorePath.parse_absolute(path).hash_part) for path in every)
    assert known(nix_cache.nix.store, "0" * 32) is None
    assert known(nix_cache.nix.store, "z" * 32) is None


def test_what_a_running_nix_registers_is_seen_at_once(real_nix: RealNix) -> None:
    (real_nix.home / "one").write_text("one")
    (real_nix.home / "two").write_text("two")
    real_nix.run("nix-store", "--add", real_nix.home / "one")
    with serving(real_nix):
        path = StorePath.parse_absolute(real_nix.run("nix-store", "--add", real_nix.home / "two").strip())
        log = database_of(real_nix.store).with_name("db.sqlite-wal")
        assert log.stat().st_size > 0
        assert path.basename.encode() not in database_of(real_nix.store).read_bytes()
        before = beside(real_nix.store)
        info = known(real_nix.store, path.hash_part)
        assert info is not None
        assert info.store_path == path
        assert beside(real_nix.store) == before


@contextmanager
def serving(nix: RealNix) -> Iterator[None]:
    """A Nix process that has the database open for writing."""
    process = subprocess.Popen(
        [nix.programs / "nix-store", "--serve", "--write"],
        env=nix.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        try:
            process.stdin.write(struct.pack("<QQ", 0x390C9DEB, 0x207))
            process.stdin.flush()
            assert struct.unpack("<Q", process.stdout.read(16)[:8]) == (0x5452EECB,)
            yield
        finally:
            process.stdin.close()


def beside(root: Path) -> list[str]:
    return sorted(os.listdir(database_of(root).parent))  # noqa: PTH208


WRITER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("pragma journal_mode = " + sys.argv[2])
db.execute("begin immediate")
db.execute("delete from ValidPaths where id = (select max(id) from ValidPaths)")
print("begun", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("journal", ["wal", "truncate"])
def test_a_transaction_that_is_open_holds_nobody_up(
    nix_cache: SampleStore, copied: Path, journal: str
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, database_of(copied), journal],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        try:
            assert writer.stdout.readline() == b"begun\n"
            assert known(copied, nix_cache.hash_part("selfish")) is not None
        finally:
            writer.stdin.close()


@pytest.mark.parametrize("journal", ["wal", "truncate"])
def test_a_database_that_nobody_has_open_gets_no_files_beside_it(
    nix_cache: SampleStore, copied: Path, journal: str
) -> None:
    write(copied, f"pragma journal_mode = {journal}")
    assert not [name for name in beside(copied) if name.endswith(("-wal", "-shm"))]
    before = beside(copied)
    assert known(copied, nix_cache.hash_part("note")) is not None
    assert known(copied, "0" * 32) is None
    assert beside(copied) == before


def test_a_log_that_a_dead_nix_left_is_read_and_not_merged(nix_cache: SampleStore, copied: Path) -> None:
    text = WRITER.replace('print("begun"', 'db.execute("commit"); print("begun"').replace(
        "sys.stdin.read()", "import os; os._exit(9)"
    )
    with closing(sqlite3.connect(database_of(copied))) as db:
        last = db.execute("select path from ValidPaths order by id desc limit 1").fetchone()[0]
    hash_part = StorePath.parse_absolute(last).hash_part
    assert known(copied, hash_part) is not None
    subprocess.run([sys.executable, "-c", text, database_of(copied), "wal"], check=False)
    log = database_of(copied).with_name("db.sqlite-wal")
    before = log.read_bytes()
    assert before
    assert known(copied, hash_part) is None
    assert log.read_bytes() == before


@pytest.mark.root
def test_a_read_only_mount_is_read_with_and_without_a_writer(
    nix_cache: SampleStore, copied: Path, tmp_path: Path
) -> None:
    place = tmp_path / "mounted"
    place.mkdir()
    subprocess.run(["mount", "--bind", copied, place], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
        assert known(place, nix_cache.hash_part("note")) is not None
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, database_of(copied), "wal"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as writer:
            assert writer.stdin is not None
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"begun\n"
            assert known(place, nix_cache.hash_part("note")) is not None
            writer.stdin.close()
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.root
@pytest.mark.fuse
def test_a_store_that_is_our_own_mount_is_refused_without_a_question_to_it(
    nix_cache: SampleStore, tmp_path: Path
) -> None:
    """Nobody answers this mount's questions: one of them would wait for ever."""
    place = os.fsencode(tmp_path / "mounted")
    Path(os.fsdecode(place)).mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
        assert libc.mount(b"veneer", place, b"fuse.veneer", 1, options) == 0
        try:
            url = f"{url_of(nix_cache.nix.store)}&real={os.fsdecode(place)}"
            with pytest.raises(SourceError, match="mount of ours"):
                ask(url, lambda source: source.path_info("0" * 32), SourceOptions(stall_seconds=5))
        finally:
            assert libc.umount2(place, 2) == 0
    finally:
        os.close(device)


def test_what_is_no_usable_database_is_a_failure_that_says_where(
    nix_cache: SampleStore, copied: Path
) -> None:
    file = database_of(copied)

    def refusal() -> SourceError:
        with pytest.raises(SourceError) as caught:
            known(copied, nix_cache.hash_part("note"))
        assert str(file.parent) in caught.value.where
        with pytest.raises(SourceError):
            ask(url_of(copied), lambda source: source.nix_cache_info())
        return caught.value

    whole_file = file.read_bytes()
    file.write_bytes(whole_file[:4096] + b"\xff" * (len(whole_file) - 4096))
    assert "damaged" in refusal().what
    file.write_bytes(b"something else\n" * 1000)
    assert "damaged" in refusal().what
    file.write_bytes(b"")
    assert "not a database of Nix" in refusal().what
    file.write_bytes(whole_file)
    (file.parent / "schema").write_text("11")
    assert "schema version '11'" in refusal().what
    (file.parent / "schema").write_text("10")
    file.unlink()
    assert "no database" in refusal().what
    shutil.rmtree(copied / "nix/var")
    assert refusal().hint


def test_a_database_of_another_store_directory_is_a_failure_and_not_empty(nix_cache: SampleStore) -> None:
    options = SourceOptions(store_dir="/gnu/store")
    with pytest.raises(SourceError, match="of the store directory /nix/store, not /gnu/store"):
        ask(url_of(nix_cache.nix.store), lambda source: source.path_info("0" * 32), options)
    with pytest.raises(UsageError, match="/gnu/store"):
        StoreDirectory(parse_source_url("local?root=/x&store=/gnu/store"))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("hash", "sha256:zz"),
        ("hash", "sha1:" + "0" * 40),
        ("narSize", None),
        ("narSize", 0),
        ("narSize", "large"),
        ("deriver", "/elsewhere/x"),
        ("sigs", b"\xff\xfe"),
        ("hash", b"\0"),
    ],
)
def test_a_wrong_row_is_named(nix_cache: SampleStore, copied: Path, column: str, value: object) -> None:
    path = nix_cache.paths["note"]
    write(copied, f"update ValidPaths set {column} = ? where path = ?", value, path)
    with pytest.raises(FormatError) as caught:
        known(copied, nix_cache.hash_part("note"))
    assert path in caught.value.what
    assert caught.value.where == str(database_of(copied))
    assert known(copied, nix_cache.hash_part("hello")) is not None


def test_a_path_whose_files_are_gone_is_not_there(nix_cache: SampleStore, copied: Path) -> None:
    info = known(copied, nix_cache.hash_part("note"))
    assert info is not None
    (copied / "nix/store" / info.store_path.basename).unlink()
    assert known(copied, nix_cache.hash_part("note")) is None
    with pytest.raises(SourceMissingError):
        ask(url_of(copied), lambda source: whole(source, info))


def test_changed_files_are_not_taken_for_the_registered_ones(nix_cache: SampleStore, copied: Path) -> None:
    info = known(copied, nix_cache.hash_part("shapes"))
    assert info is not None
    path = copied / "nix/store" / info.store_path.basename
    (path / "bin").chmod(0o755)
    (path / "bin/tool").chmod(0o755)
    (path / "bin/tool").write_text("another size")
    with pytest.raises(FormatError, match="registered") as caught:
        ask(url_of(copied), lambda source: whole(source, info))
    assert caught.value.where == str(path)
    (path / "bin/tool").unlink()
    os.mkfifo(path / "bin/tool")
    with pytest.raises(FormatError, match="neither a file"):
        ask(url_of(copied), lambda source: whole(source, info))


def test_a_file_that_changes_while_it_is_read_is_noticed(nix_cache: SampleStore, copied: Path) -> None:
    info = known(copied, nix_cache.hash_part("big"))
    assert info is not None
    file = copied / "nix/store" / info.store_path.basename / "data"  # after "again", 3 MiB
    file.chmod(0o644)

    async def body(source: StoreDirectory) -> None:
        for change in (lambda: os.truncate(file, 1000), lambda: file.write_bytes(bytes(1 << 23))):
            file.write_bytes(bytes(3 << 20))
            chunks = source.nar(info)
            await anext(chunks)
            change()
            with pytest.raises(FormatError, match="declared"):
                async for _ in chunks:
                    pass

    ask(url_of(copied), body)


def test_a_directory_that_becomes_a_link_leads_nowhere(
    nix_cache: SampleStore, copied: Path, tmp_path: Path
) -> None:
    info = known(copied, nix_cache.hash_part("many"))
    assert info is not None
    path = copied / "nix/store" / info.store_path.basename
    shutil.copytree(path, tmp_path / "elsewhere")
    big = path / "1.big"
    path.chmod(0o755)
    big.write_bytes(bytes(2 << 20))
    changed = UnverifiedPathInfo(
        info.store_path, info.url, "none", info.nar_hash, size_of_nar(url_of(copied), info)
    )

    async def body(source: StoreDirectory) -> None:
        chunks = source.nar(changed)
        await anext(chunks)
        (path / "9").chmod(0o755)
        shutil.rmtree(path / "9")
        (path / "9").symlink_to(tmp_path / "elsewhere" / "9")
        with pytest.raises(SourceError):
            async for _ in chunks:
                pass

    ask(url_of(copied), body)


def size_of_nar(url: str, info: UnverifiedPathInfo) -> int:
    with pytest.raises(FormatError) as caught:
        ask(url, lambda source: whole(source, info))
    return int(caught.value.what.split("NAR of ")[1].split()[0])


def test_leaving_a_nar_at_any_moment_closes_its_files(nix_cache: SampleStore) -> None:
    async def body(source: StoreDirectory) -> None:
        info = await source.path_info(nix_cache.hash_part("many"))
        assert info is not None
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        for turns in range(40):
            task = asyncio.create_task(whole(source, info))
            for _ in range(turns % 20):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await source.path_info(info.store_path.hash_part)
        assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208

    ask(url_of(nix_cache.nix.store), body, SourceOptions(in_flight=1))


def test_a_file_system_that_does_not_answer_keeps_nobody_waiting(
    nix_cache: SampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead mount cannot be had without a network: opening the store waits for a socket that nobody writes to."""
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(store_directory, "open_directory", lambda _: ours.recv(1))
    with ours, theirs, pytest.raises(SourceError, match="no answer for"):
        try:
            ask(
                url_of(nix_cache.nix.store),
                lambda source: source.path_info("0" * 32),
                SourceOptions(stall_seconds=0.2),
            )
        finally:
            theirs.close()


def served(tmp_path: Path, *urls: str, keys: tuple[str, ...] = ()) -> Callable[[str], bytes]:
    """``read(path)``: the NAR of a path, through a store and its cache."""

    def read(path: str) -> bytes:
        found = []

        async def body(bench: Bench) -> None:
            view = bench.view(*urls, keys=keys)
            row = await bench.store.lookup(view, StorePath.parse_absolute(path), bench.account)
            ready = await bench.store.content(view, row.number, 0, row.nar_size, bench.account)
            found.append(bench.nar(ready.number))

        run(tmp_path, body)
        return found[0]

    return read


def test_paths_are_served_like_those_of_a_cache(nix_cache: SampleStore, tmp_path: Path) -> None:
    read = served(tmp_path, url_of(nix_cache.nix.store) + "&trusted=true")
    for name, path in nix_cache.paths.items():
        info = known(nix_cache.nix.store, nix_cache.hash_part(name))
        assert info is not None
        assert hashlib.sha256(read(path)).digest() == info.nar_hash.digest


def test_without_trust_only_signed_paths_are_served(
    nix_cache: SampleStore, copied: Path, tmp_path: Path
) -> None:
    sign(nix_cache, copied, "note")
    read = served(tmp_path, url_of(copied), keys=(nix_cache.public,))
    assert read(nix_cache.paths["note"])
    with pytest.raises(TrustError):
        read(nix_cache.paths["hello"])


def test_a_path_that_was_rebuilt_differently_is_the_new_one(
    nix_cache: SampleStore, copied: Path, tmp_path: Path
) -> None:
    path = nix_cache.paths["note"]
    read = served(tmp_path, url_of(copied) + "&trusted=true")
    first = read(path)
    file = copied / path.removeprefix("/")
    file.chmod(0o644)
    content = file.read_text().upper()
    file.write_text(content)
    second = first.replace(content.lower().encode(), content.encode())
    assert second != first
    digest = hashlib.sha256(second).hexdigest()
    write(copied, "update ValidPaths set hash = ? where path = ?", f"sha256:{digest}", path)
    assert read(path) == second
    file.unlink()
    with pytest.raises(AbsentError):
        read(path)


def test_a_path_that_two_sources_have_differently_is_told_of_once(
    nix_cache: SampleStore, copied: Path, tmp_path: Path
) -> None:
    path = StorePath.parse_absolute(nix_cache.paths["note"])
    other = f"sha256:{'0' * 64}"
    write(copied, "update ValidPaths set hash = ? where path = ?", other, path.absolute())
    first, second = url_of(nix_cache.nix.store), url_of(copied)

    async def body(bench: Bench) -> None:
        view = bench.view(*(f"{url}&trusted=true" for url in (first, second)), keys=())
        info = await bench.store.resolver.path_info(view, path, bench.account)
        assert bench.store.stories.rows() == []  # the second was not asked for it
        for _ in range(2):
            every = [each async for each in bench.store.resolver.candidates(view, path, bench.account)]
            assert [each.source.url for each in every] == [first, second]
            found = await bench.store.resolver.by_hash_part(view, path.hash_part, bench.account)
            assert found is not None
            assert found.info.nar_hash == info.info.nar_hash
        (story,) = bench.store.stories.rows()
        assert story.path == str(path)
        for text in (first, second, str(info.info.nar_hash), str(Hash.parse(other))):
            assert text in story.text

    run(tmp_path, body)


def test_doctor_asks_store_directories_too(nix_cache: SampleStore, tmp_path: Path) -> None:
    here = url_of(nix_cache.nix.store)
    path = StorePath.parse_absolute(nix_cache.paths["note"])
    subject = make_subject(tmp_path, here, f"local?root={tmp_path}", paths=(path,))
    good, bad = doctor.reachable(subject)
    assert good.state == "ok"
    assert bad.state == "failed"
    assert str(tmp_path) in bad.what
    (found,) = doctor.named_paths(subject)
    assert found.state == "ok"
    assert here in found.what


def test_only_the_own_store_is_trusted_unasked(tmp_path: Path) -> None:
    assert parse_source_url("local").own_store
    for text in ("local?root=/x", "local?trusted=false", "local?trusted=true", "local?real=/x", "/nix"):
        assert not parse_source_url(text).own_store
    assert is_trusted(parse_source_url("local?root=/x&trusted=true"))
    assert not is_trusted(parse_source_url("local?trusted=false"))


def test_the_own_store_is_trusted_when_nobody_else_could_have_written_it(copied: Path) -> None:
    url = parse_source_url(url_of(copied))
    own = replace(url, own_store=True)
    assert is_trusted(own)
    assert not is_trusted(url)
    database_of(copied).chmod(0o666)
    assert not is_trusted(own)
    database_of(copied).chmod(0o644)
    if os.geteuid() == 0:
        os.chown(copied / "nix/store", 12345, -1)
        assert not is_trusted(own)
        os.chown(copied / "nix/store", 0, -1)
    database_of(copied).unlink()
    assert not is_trusted(own)


def test_errors_are_the_projects_own(nix_cache: SampleStore) -> None:
    with pytest.raises(VeneerError):
        ask("local?root=/nowhere", lambda source: source.path_info("0" * 32))
    with pytest.raises(SourceError, match="cannot open the store"):
        ask(f"{url_of(nix_cache.nix.store)}&real=/nowhere", lambda source: source.path_info("0" * 32))


def test_paths_that_cannot_be_held_are_there_all_the_same_and_it_is_told_once(
    nix_cache: SampleStore, tmp_path: Path
) -> None:
    told: list[str] = []

    async def main() -> None:
        config = parse_source_url(url_of(nix_cache.nix.store))
        source = StoreDirectory(config, tell=lambda _, error: told.append(str(error)))
        source._roots = TemporaryRoots(tmp_path)  # no Nix: neither roots nor a daemon
        try:
            for name in ("note", "many"):
                assert await source.path_info(nix_cache.hash_part(name)) is not None
        finally:
            await source.close()

    asyncio.run(asyncio.wait_for(main(), 60))
    assert len(told) == 1
    assert "garbage collector" in told[0]
