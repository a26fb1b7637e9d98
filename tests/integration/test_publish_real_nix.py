"""Published caches: real Nix of each version substitutes from them and verifies, whatever happened to the publisher."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.callers import Caller, eventually
from tests.support.nix import NixError, RealNix
from tests.support.sample import SampleStore
from tests.support.small_disk import small_disk
from tests.support.trees import differences
from veneer.formats.chunk_map import parse_chunk_map
from veneer.formats.narinfo import parse_narinfo
from veneer.formats.signature import PublicKey

pytestmark = pytest.mark.nix

NEW = """\
derivation {{
  name = "new"; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/usr/bin:/bin";
  args = [ "-euc" "mkdir $out; cat {path}/1/1.txt > $out/copied; echo {path} > $out/reference; ln -s {path} $out/there" ];
}}
"""


@pytest.fixture
def publisher(as_root_or_us: Caller, nix_cache: SampleStore) -> Caller:
    as_root_or_us.use(f"file://{nix_cache.cache('xz')}", key=nix_cache.public)
    return as_root_or_us


@pytest.fixture
def as_root_or_us(open_directory: Path) -> Iterator[Caller]:
    """Whoever runs the tests."""
    home = open_directory / f"publisher-{secrets.token_hex(4)}"
    home.mkdir()
    caller = Caller.root(home)
    yield caller
    caller.wait_for_daemons_end()


def key_file(nix_cache: SampleStore) -> tuple[Path, str]:
    """A key that is not the sample's."""
    return nix_cache.stranger_secret, nix_cache.stranger_public


def publish(caller: Caller, to: Path, *words: str | Path) -> dict[str, Any]:
    return caller.document("publish", "--to", to, *words)


def substitute(nix: RealNix, cache: Path, path: str, key: str) -> None:
    """With signatures checked; the contents compared with their hashes afterwards."""
    options = ["--option", "substituters", f"file://{cache}", "--option", "substitute", "true"]
    nix.run("nix-store", *options, "--option", "trusted-public-keys", key, "-r", path)
    nix.run("nix-store", "--verify", "--check-contents")


def narinfos(cache: Path) -> set[str]:
    return {file.stem for file in cache.glob("*.narinfo")}


def test_nix_of_each_version_substitutes_and_verifies(
    publisher: Caller, nix_cache: SampleStore, each_nix: Callable[[], RealNix]
) -> None:
    to = publisher.home / "published"
    secret, public = key_file(nix_cache)
    roots = [nix_cache.paths[name] for name in sorted(nix_cache.paths)]
    done = publish(publisher, to, "--key-file", secret, "--frame-size", "8K", *roots)
    assert len(done["published"]) == len(narinfos(to)) >= len(set(roots))
    for key in (public, nix_cache.public):  # ours, and the one that the paths brought along
        nix = each_nix()
        for path in roots:
            substitute(nix, to, path, key)
            assert not differences(nix_cache.nix.unpacked(path), nix.unpacked(path))
    with pytest.raises(NixError):
        substitute(each_nix(), to, roots[0], "other-1:" + "A" * 43 + "=")


def test_every_path_has_a_signed_chunk_map_that_is_its_own(publisher: Caller, nix_cache: SampleStore) -> None:
    to = publisher.home / "published"
    secret, public = key_file(nix_cache)
    publish(publisher, to, "--key-file", secret, nix_cache.paths["greet"])
    key = PublicKey.parse(public)
    for file in to.glob("*.narinfo"):
        info = parse_narinfo(file.read_bytes())
        chunk_map = parse_chunk_map(file.with_suffix(".chunks").read_bytes())
        assert chunk_map.belongs_to(info)
        assert key.verify(chunk_map.fingerprint(), chunk_map.signatures[0])


def test_a_second_run_uploads_nothing(publisher: Caller, nix_cache: SampleStore) -> None:
    to = publisher.home / "published"
    first = publish(publisher, to, nix_cache.paths["greet"])
    before = {file: file.stat().st_mtime_ns for file in to.rglob("*") if file.is_file()}
    second = publish(publisher, to, nix_cache.paths["greet"])
    assert (second["published"], second["sent"]) == ([], 0)
    assert second["present"] == first["published"]
    assert before == {file: file.stat().st_mtime_ns for file in to.rglob("*") if file.is_file()}


def test_a_dry_run_prints_the_plan_and_writes_nothing(publisher: Caller, nix_cache: SampleStore) -> None:
    to = publisher.home / "published"
    document = publish(publisher, to, "--dry-run", nix_cache.paths["greet"])
    assert document["plan"][-1]["path"] == nix_cache.basename("greet")
    assert document["plan"][-1]["objects"][-1] == f"{nix_cache.hash_part('greet')}.narinfo"
    assert not to.exists() or not any(file.is_file() for file in to.rglob("*"))


def test_named_paths_alone_can_be_published(publisher: Caller, nix_cache: SampleStore) -> None:
    to = publisher.home / "published"
    done = publish(publisher, to, "--no-closure", nix_cache.paths["greet"])
    assert done["published"] == [nix_cache.basename("greet")]


def test_paths_that_nobody_signed_are_refused_unless_allowed(
    publisher: Caller, nix_cache: SampleStore
) -> None:
    publisher.use(f"file://{nix_cache.cache('zstd', signed='nobody')}?trusted=true", key=nix_cache.public)
    to = publisher.home / "published"
    words = ["--to", str(to), nix_cache.paths["note"]]
    refused = publisher.veneer("publish", *words)
    assert refused.returncode == 4 and "--unsigned" in refused.stderr
    assert not narinfos(to)
    publisher.document("publish", "--unsigned", *words)
    assert narinfos(to) == {nix_cache.hash_part("note")}


def test_a_mirror_checks_keys_and_keeps_signatures(
    publisher: Caller, nix_cache: SampleStore, each_nix: Callable[[], RealNix]
) -> None:
    publisher.sources = []
    to, source = publisher.home / "mirrored", f"file://{nix_cache.cache('xz')}"
    path = nix_cache.paths["greet"]
    words: list[str | Path] = ["--from", source, "--to", to]
    refused = publisher.veneer("mirror", *words, "--trusted-public-key", nix_cache.stranger_public, path)
    assert refused.returncode == 4 and not narinfos(to)
    publisher.document("mirror", *words, "--trusted-public-key", nix_cache.public, path)
    nix = each_nix()
    substitute(nix, to, path, nix_cache.public)
    assert not differences(nix_cache.nix.unpacked(path), nix.unpacked(path))


def test_a_killed_publisher_leaves_a_valid_cache_and_the_next_completes_it(
    publisher: Caller, nix_cache: SampleStore, each_nix: Callable[[], RealNix]
) -> None:
    to = publisher.home / "published"
    roots = [nix_cache.paths[name] for name in sorted(nix_cache.paths)]
    words = publisher.words("publish", "--to", to, "--jobs", "1", "--level", "19", *roots)
    killed = 0
    for wanted in range(1, 40, 4):
        process = publisher.popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def is_there(count: int = wanted, process: subprocess.Popen[str] = process) -> bool:
            return len(narinfos(to)) >= count or process.poll() is not None

        eventually(is_there, seconds=100)  # level 19 takes its time
        process.kill()
        process.communicate(timeout=20)
        killed += process.returncode == -signal.SIGKILL
        for part in narinfos(to):
            info = parse_narinfo((to / f"{part}.narinfo").read_bytes())
            assert (to / info.url).stat().st_size == info.file_size
            assert {reference.hash_part for reference in info.references} <= narinfos(to)
    assert killed
    publish(publisher, to, *roots)
    assert not (to / ".incoming").exists()
    nix = each_nix()
    for path in roots:
        substitute(nix, to, path, nix_cache.public)


@pytest.mark.root
def test_a_full_disk_is_told_and_what_was_published_stays(publisher: Caller, nix_cache: SampleStore) -> None:
    to = publisher.home / "small"
    to.mkdir()
    with small_disk(to, "256k"):
        (to / "ballast").write_bytes(bytes(200 << 10))
        roots = [nix_cache.paths[name] for name in sorted(nix_cache.paths)]
        failed = publisher.veneer("publish", "--to", to, "--jobs", "1", *roots)
        assert failed.returncode == 1 and "no space left" in failed.stderr, failed.stderr
        (to / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", str(to)], check=True, timeout=30)
        assert publish(publisher, to, *roots)["published"]


@pytest.mark.root
@pytest.mark.fuse
def test_programs_run_out_of_a_published_cache(publisher: Caller, nix_cache: SampleStore) -> None:
    to = publisher.home / "published"
    secret, public = key_file(nix_cache)
    program = nix_cache.paths["greet"]
    publish(publisher, to, "--key-file", secret, program)
    publisher.forget()
    publisher.use(f"file://{to}", key=public)
    done = publisher.veneer("run", "--", f"{program}/bin/greet")
    assert done.returncode == 0, done.stderr


@pytest.mark.root
@pytest.mark.fuse
def test_what_one_environment_built_another_one_reads(
    publisher: Caller, nix_cache: SampleStore, each_nix: Callable[[], RealNix], nix_programs: Path
) -> None:
    secret, public = key_file(nix_cache)
    to = publisher.home / "published"
    expression = publisher.home / "new.nix"
    expression.write_text(NEW.format(path=f"${{builtins.storePath {nix_cache.paths['many']}}}"))
    configuration = publisher.home / "conf"
    configuration.mkdir()
    sandbox = " ".join(place for place in ("/bin", "/usr", "/lib", "/lib64") if Path(place).exists())
    (configuration / "nix.conf").write_text(
        f"experimental-features = nix-command\nsandbox-paths = {sandbox}\nsubstituters =\nbuild-users-group =\n"
    )
    publisher.environment = {
        name: value for name, value in publisher.environment.items() if not name.startswith(("NIX_", "XDG_"))
    } | {
        "PATH": f"{nix_programs}:{os.environ['PATH']}",
        "NIX_CONF_DIR": str(configuration),
        "HOME": str(publisher.home),
    }
    script = f"nix-build {expression} --no-out-link; echo nonsense > /nix/store/{'0' * 32}-unregistered"
    built = publisher.veneer("run", "--name", "job-1", "--", "bash", "-euc", script, timeout=120)
    assert built.returncode == 0, built.stderr
    path = built.stdout.strip()
    words: list[str | Path] = ["--to", to, "--key-file", secret, "job-1"]
    published = publisher.document("publish", *words, sources=False)["published"]
    assert Path(path).name in published
    assert not any("unregistered" in name for name in published)
    assert publisher.document("publish", *words, sources=False)["published"] == []
    # The other job has another cache directory, and both caches.
    publisher.forget()
    publisher.use(f"file://{nix_cache.cache('xz')}", f"file://{to}", key=nix_cache.public)
    publisher.sources += ["--trusted-public-key", public]
    read = publisher.veneer("run", "--", "cat", f"{path}/copied", f"{path}/there/1/1.txt")
    assert read.returncode == 0, read.stderr
    assert publisher.veneer("down", "job-1", sources=False).returncode == 0
    nix = each_nix()
    both = f"file://{nix_cache.cache('xz')} file://{to}"
    options = ["--option", "substituters", both, "--option", "substitute", "true"]
    nix.run(
        "nix-store", *options, "--option", "trusted-public-keys", f"{public} {nix_cache.public}", "-r", path
    )
    nix.run("nix-store", "--verify", "--check-contents")
