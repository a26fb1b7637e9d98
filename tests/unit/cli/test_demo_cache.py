"""The demo's binary cache: what any Nix would accept, and a closure of real programs."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import zstandard

from veneer.cli import demo_closure
from veneer.cli.demo import _server
from veneer.cli.demo_cache import Content, File, Link, add_path, store_path, tree_of, write_header
from veneer.cli.demo_closure import Program, interpreter, parse_list, plan_of
from veneer.formats.cache_info import parse_cache_info
from veneer.formats.listing import parse_listing
from veneer.formats.nar import nar_of, tree_of_nar
from veneer.formats.narinfo import parse_narinfo
from veneer.formats.signature import SecretKey, fingerprint
from veneer.model.store_path import StorePath

CONTENT: Content = {
    "bin": {"b": File(b"x" * 100_000, executable=True), "a": Link("b")},
    "B": File(b""),
    "d": {},
}


def test_a_path_is_written_as_nix_writes_it(tmp_path: Path) -> None:
    key = SecretKey.generate("demo-1")
    other = store_path("other")
    write_header(tmp_path)
    info = add_path(tmp_path, store_path("thing", "input"), CONTENT, [other], key)
    assert parse_cache_info((tmp_path / "nix-cache-info").read_bytes()).store_dir == "/nix/store"
    assert parse_narinfo((tmp_path / f"{info.store_path.hash_part}.narinfo").read_bytes()) == info
    assert key.public_key().verify(fingerprint(info), info.signatures[0])
    assert info.references == (other,)
    encoded = (tmp_path / info.url).read_bytes()
    assert info.file_hash is not None
    assert (hashlib.sha256(encoded).digest(), len(encoded)) == (info.file_hash.digest, info.file_size)
    nar = zstandard.ZstdDecompressor().decompressobj().decompress(encoded)
    assert (hashlib.sha256(nar).digest(), len(nar)) == (info.nar_hash.digest, info.nar_size)
    listing = (tmp_path / f"{info.store_path.hash_part}.ls").read_bytes()
    assert parse_listing(listing, nar_size=info.nar_size) == tree_of_nar([nar]) == tree_of(CONTENT)[0]
    assert not list(tmp_path.glob("nar/*.part"))


def test_files_of_the_machine_are_packed_with_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"machine")
    tree, read = tree_of({"x": File(tmp_path / "file"), "y": File(b"literal")})
    nar = b"".join(nar_of(tree, read))
    assert b"machine" in nar
    assert b"literal" in nar


def test_names_follow_from_inputs() -> None:
    assert store_path("a", "1") == store_path("a", "1")
    assert store_path("a", "1") != store_path("a", "2")
    assert StorePath.parse(store_path("a").basename)


def test_the_loader_is_found_in_a_dynamic_binary() -> None:
    loader = interpreter(Path(sys.executable).resolve().read_bytes()[:4096])
    assert loader is None or Path(loader).exists()
    assert interpreter(b"#!/bin/sh\n") is None
    assert interpreter(b"\x7fELF") is None
    assert interpreter(b"\x7fELF\x02\x01" + b"\xff" * 200) is None


def test_what_the_loader_lists_is_understood() -> None:
    text = (
        "\tlinux-vdso.so.1 (0x00007f93112ae000)\n"
        "\tlibz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x00007f9311203000)\n"
        "\tlibmissing.so => not found\n"
        "\t/lib64/ld-linux-x86-64.so.2 (0x00007f93112b0000)\n"
        "\tlibc.so => ld-linux-x86-64.so.2 (0x7f0)\n"
    )
    assert next(parse_list(text, "ld-linux-x86-64.so.2")) == (
        "libz.so.1",
        Path("/lib/x86_64-linux-gnu/libz.so.1"),
    )
    assert "libmissing.so" not in dict(parse_list(text, "ld-linux-x86-64.so.2"))


@pytest.fixture
def program(tmp_path: Path) -> Program:
    for name in ("prog", "ld.so.1", "libc.so.6", "libm.so.6", "libz.so.1"):
        (tmp_path / name).write_bytes(name.encode())
    libraries = tuple((name, tmp_path / name) for name in ("libc.so.6", "libm.so.6", "libz.so.1"))
    return Program("prog", tmp_path / "prog", tmp_path / "ld.so.1", libraries)


def test_a_program_refers_to_its_libraries_and_all_that_is_never_touched(program: Program) -> None:
    closure = plan_of(program, ("--version",), [], [("data-1", 2, 10)])
    names = [planned.path.name for planned in closure.paths]
    assert names == ["libc", "libz.so.1", "data-1", "prog"]
    libc, zlib, data, prog = closure.paths
    assert set(prog.references) == {libc.path, zlib.path, data.path}
    assert zlib.references == (libc.path,)
    assert isinstance(libc.content, dict)
    assert set(libc.content["lib"]) == {"libc.so.6", "libm.so.6", "ld.so.1"}
    assert closure.command == (f"/nix/store/{prog.path}/bin/prog", "--version")


def test_a_program_is_started_by_its_own_loader(program: Program) -> None:
    libc, zlib, prog = plan_of(program, (), [], []).paths
    assert isinstance(prog.content, dict)
    script = prog.content["bin"]["prog"]
    assert isinstance(script, File)
    assert (
        script.data
        == (
            "#!/bin/sh\n"
            f"exec /nix/store/{libc.path}/lib/ld.so.1 --library-path /nix/store/{libc.path}/lib:/nix/store/{zlib.path}/lib"
            f' /nix/store/{prog.path}/libexec/prog "$@"\n'
        ).encode()
    )


def test_this_machine_has_a_program_to_show() -> None:
    closure = demo_closure.plan()
    known: set[StorePath] = set()
    for planned in closure.paths:
        assert set(planned.references) <= known
        known.add(planned.path)
    loaded = next(p for p in closure.paths if p.path.name == "libc")
    assert isinstance(loaded.content, dict)
    listed = subprocess.run(
        [closure.command[0].split("/")[-1], *closure.command[1:]], capture_output=True, timeout=10
    )
    assert listed.returncode == 0


def test_the_server_serves_whole_files_and_ranges_and_ends_with_its_caller(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    with _server(tmp_path) as url:
        assert urllib.request.urlopen(f"{url}/file", timeout=5).read() == b"0123456789"
        request = urllib.request.Request(f"{url}/file", headers={"Range": "bytes=2-4"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            assert (answer.status, answer.read(), answer.headers["Content-Range"]) == (
                206,
                b"234",
                "bytes 2-4/10",
            )
        for name in ("missing", "../../etc/passwd", ""):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(f"{url}/{name}", timeout=5)
            assert caught.value.code == 404
            caught.value.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=5)
