"""A hostile binary cache over real HTTP: what its users see, what reaches their terminals, what is written where.

Two attackers: one who answers for the cache (narinfos, listings and NAR files are his, the key is not), and one who has the
trusted key too (everything is signed, and only its form is hostile).
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.callers import Caller
from tests.support.faulty_http import FaultyServer
from tests.support.signed_cache import SignedCache, make_path
from veneer.formats.narinfo import write_narinfo
from veneer.formats.signature import SecretKey, fingerprint
from veneer.model.hashes import Hash
from veneer.model.path_info import UnverifiedPathInfo
from veneer.model.store_path import StorePath

pytestmark = [pytest.mark.root, pytest.mark.fuse]

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"
"""Sets a terminal's title, clears it, colours it, turns the writing direction."""

OUTSIDE = (Path("/tmp/owned"), Path("/etc/owned"))
Serve = Callable[[Path], FaultyServer]


def word(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + bytes(-len(text) % 8)


def words(*texts: bytes) -> bytes:
    return b"".join(map(word, texts))


def file_node(content: bytes = b"x") -> bytes:
    return words(b"(", b"type", b"regular", b"contents", content, b")")


def link_node(target: bytes) -> bytes:
    return words(b"(", b"type", b"symlink", b"target", target, b")")


def directory(*entries: tuple[bytes, bytes]) -> bytes:
    inner = b"".join(
        words(b"entry", b"(", b"name", name, b"node") + node + word(b")") for name, node in entries
    )
    return words(b"(", b"type", b"directory") + inner + word(b")")


def archive(node: bytes) -> bytes:
    return word(b"nix-archive-1") + node


def deep(levels: int) -> bytes:
    before = words(b"(", b"type", b"directory")
    entry = words(b"entry", b"(", b"name", b"d", b"node")
    return before + (entry + before) * levels + words(b")", b")") * levels + word(b")")


SIZE = struct.Struct("<Q")
REFUSED_NARS = {
    "dot-dot": archive(directory((b"..", file_node()))),
    "dot": archive(directory((b".", file_node()))),
    "slash": archive(directory((b"../../../../tmp/owned", file_node()))),
    "absolute": archive(directory((b"/etc/owned", file_node()))),
    "nul": archive(directory((b"a\0b", file_node()))),
    "empty-name": archive(directory((b"", file_node()))),
    "long-name": archive(directory((b"n" * 256, file_node()))),
    "duplicate": archive(directory((b"a", link_node(b"/tmp")), (b"a", file_node()))),
    "unsorted": archive(directory((b"b", file_node()), (b"a", file_node()))),
    "nul-target": archive(link_node(b"a\0b")),
    "long-target": archive(link_node(b"t" * 4096)),
    "depth": archive(deep(1500)),
    "size-2-63": archive(words(b"(", b"type", b"regular", b"contents") + SIZE.pack(1 << 63)),
    "size-2-64": archive(words(b"(", b"type", b"regular", b"contents") + SIZE.pack((1 << 64) - 1)),
    "size-of-name": archive(words(b"(", b"type", b"directory", b"entry", b"(", b"name") + SIZE.pack(1 << 63)),
    "type": archive(words(b"(", b"type", b"device", b"major", b"1", b")")),
    "escapes": archive(directory((b"/" + ESCAPES.encode(), file_node()))),
    "padding": archive(file_node(b"x").replace(b"x" + bytes(7), b"x" + b"\x1b" * 7)),
}


class HostileCache(SignedCache):
    """``key`` is trusted; ``publish`` writes whatever it is told."""

    def __init__(self, place: Path) -> None:
        super().__init__(place, [make_path("good"), make_path("other")], secret=SecretKey.generate("made-1"))

    def publish(
        self, name: str, nar: bytes, *, listing: bytes | None = None, sign: bool = True
    ) -> UnverifiedPathInfo:
        """A path of these bytes; ``listing``: its ``.ls``."""
        part = hashlib.sha256(name.encode()).hexdigest()[:32].replace("e", "z")
        info = UnverifiedPathInfo(
            StorePath(part, name),
            f"nar/{part}.nar",
            "none",
            Hash("sha256", hashlib.sha256(nar).digest()),
            len(nar),
        )
        if sign:
            info = replace(info, signatures=(self.secret.sign(fingerprint(info)),))
        self.write(info, nar, listing)
        return info

    def write(self, info: UnverifiedPathInfo, nar: bytes, listing: bytes | None = None) -> None:
        part = info.store_path.hash_part
        (self.directory / f"{part}.narinfo").write_bytes(write_narinfo(info))
        (self.directory / info.url).write_bytes(nar)
        if listing is not None:
            (self.directory / f"{part}.ls").write_bytes(listing)

    def narinfo(self, name: str, change: Callable[[str], str]) -> None:
        """Change a good path's narinfo as text."""
        file = self.directory / f"{self.infos[name].store_path.hash_part}.narinfo"
        file.write_bytes(change(file.read_text()).encode())


@pytest.fixture
def hostile(as_root: Caller, tmp_path: Path, faulty_http: Serve) -> HostileCache:
    cache = HostileCache(tmp_path / "hostile")
    as_root.use(faulty_http(cache.directory).url, key=cache.key)
    return cache


def quiet(*texts: str) -> None:
    """Nothing in these would drive a terminal, but for line ends."""
    for text in texts:
        for character in text:
            assert character == "\n" or character.isprintable(), (hex(ord(character)), text)


def refused(caller: Caller, path: str, status: int = 0) -> str:
    """ls, cat and run all fail, each in words for people and in JSON; what was said. ``status``: of ls and cat."""
    said = ""
    for command, *more in (("ls", path), ("ls", "--json", path), ("cat", f"{path}/a")):
        done = caller.veneer(command, *more)
        assert done.returncode not in (0, 70), done
        assert not status or done.returncode == status, done
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        quiet(done.stderr)
        said += done.stderr
    done = caller.veneer("run", "--", "sh", "-c", f"ls {path}/ && cat {path}/a")
    assert done.returncode not in (0, 125)
    assert "Input/output error" in done.stderr or "No such file" in done.stderr
    quiet(done.stderr)
    return said


def test_signed_nars_of_impossible_trees_are_refused_and_write_nothing_elsewhere(
    as_root: Caller, hostile: HostileCache
) -> None:
    paths = {name: hostile.publish(name, nar).store_path.absolute() for name, nar in REFUSED_NARS.items()}
    good = hostile.infos["good"].store_path.absolute()
    with as_root.mount_probe(as_root.home / "mnt"):  # keeps one daemon for all of it
        for name, path in paths.items():
            for command, more in (("ls", "-R"), ("cat", "")):
                done = as_root.veneer(command, *filter(None, [more]), path if more else f"{path}/a")
                assert done.returncode not in (0, 70), (name, done)
                assert done.stdout == "", name
                assert "Traceback" not in done.stderr, name
                quiet(done.stderr)
        assert as_root.veneer("ls", good).stdout.split() == ["a-program", "data", "link"]
        text = as_root.veneer("status").stdout
        quiet(text, as_root.stories())
        assert not list((as_root.cache / "incoming").iterdir())
        assert as_root.status()["totals"]["nars"] == 0
    log = as_root.cache / "daemon.log"
    quiet(log.read_text() if log.exists() else "")
    assert not any(place.exists() for place in OUTSIDE)


def test_links_to_anywhere_are_data_and_nobody_of_ours_follows_them(
    as_root: Caller, hostile: HostileCache, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("host file\n")
    targets = [
        b"/etc/shadow",
        b"../../../../../../etc/shadow",
        str(secret).encode(),
        b"../..",
        b"a",
        b"/proc/self/root",
    ]
    names = [b"abcdef"[i : i + 1] for i in range(len(targets))]
    nar = archive(directory(*((n, link_node(t)) for n, t in zip(names, targets, strict=True))))
    path = hostile.publish("links", nar).store_path.absolute()
    listed = json.loads(as_root.veneer("ls", "--json", "-l", path).stdout)
    assert [row["target"].encode() for row in listed["entries"]] == targets
    for name in "abcdef":
        for below in ("", "/x"):
            done = as_root.veneer("cat", f"{path}/{name}{below}")
            assert done.returncode != 0
            assert done.stdout == ""
            assert "host file" not in done.stderr
    inside = as_root.veneer("run", "--", "readlink", *(f"{path}/{name}" for name in "abcdef"))
    assert inside.stdout.encode().split() == targets


def test_names_that_would_drive_a_terminal_are_shown_escaped(as_root: Caller, hostile: HostileCache) -> None:
    name = ESCAPES.encode()
    node = directory((name, file_node(b"inside")), (name + b"2", link_node(name)))
    path = hostile.publish("escapes", archive(node)).store_path.absolute()
    for options in ([], ["-l"], ["-R"], ["--json"], ["-l", "-R", "--json"]):
        done = as_root.veneer("ls", *options, path)
        assert done.returncode == 0, done.stderr
        quiet(done.stdout, done.stderr)
        assert "owned" in done.stdout
    for below in (ESCAPES, ESCAPES + "3", ESCAPES + "2/x", ESCAPES + "/x"):
        done = as_root.veneer("cat", f"{path}/{below}")
        assert (done.returncode == 0) is (below == ESCAPES)
        quiet(done.stdout, done.stderr)
    report = as_root.home / "report.json"
    done = as_root.veneer("run", "--report", str(report), "--", "sh", "-c", f"cat {path}/* > /dev/null")
    assert done.returncode == 0, done.stderr
    quiet(done.stderr, report.read_text())


def test_what_a_cache_says_in_errors_is_shown_escaped(
    as_root: Caller, tmp_path: Path, faulty_http: Serve
) -> None:
    cache = HostileCache(tmp_path / "hostile")
    server = faulty_http(cache.directory)
    as_root.use(server.url, key=cache.key)
    path = cache.infos["good"].store_path.absolute()
    bad_lines = {
        "StorePath": ESCAPES,
        "URL": f"nar/{ESCAPES}",
        "Compression": ESCAPES,
        "NarHash": ESCAPES,
        "References": ESCAPES,
        "Sig": f"{ESCAPES}:AAAA",
    }
    original = (cache.directory / f"{cache.infos['good'].store_path.hash_part}.narinfo").read_text()
    for key, value in bad_lines.items():
        lines = [f"{key}: {value}" if line.startswith(f"{key}:") else line for line in original.splitlines()]
        cache.narinfo("good", lambda _, lines=lines: "\n".join(lines) + "\n")  # type: ignore[misc]
        refused(as_root, path)
    quiet(as_root.veneer("status").stdout)
    (cache.directory / "nix-cache-info").write_text(f"StoreDir: {ESCAPES}\nWantMassQuery: {ESCAPES}\n")
    cache.narinfo("good", lambda _: original)
    for command in (["ls", path], ["status"], ["doctor"], ["fetch", path], ["doctor", "--json"]):
        done = as_root.veneer(*command)
        quiet(done.stdout, done.stderr)
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        ("StorePath: /nix/store/", "StorePath: /nix/store/../../etc/"),
        ("StorePath: /nix/store/", "StorePath: /gnu/store/"),
        ("-good\n", "-Good\n"),
        ("-good\n", "-other\n"),
        ("URL: nar/", "URL: ../../../../etc/"),
        ("URL: nar/", "URL: nar/../../"),
        ("NarSize: ", "NarSize: 9223372036854775808\nX: "),
        ("NarSize: ", "NarSize: -1\nX: "),
        ("NarSize: ", "NarSize: 1\nX: "),
        ("FileSize: ", "FileSize: 18446744073709551616\nX: "),
        ("References: ", "References: ../../../etc/passwd"),
        ("Sig: made-1:", "Sig: made-2:"),
        ("Sig: made-1:", "Sig: MADE-1:"),
        ("Sig: made-1:", "Sig: made-1 :"),
        ("Sig: made-1:", "Sig: made-1::"),
    ],
    ids=lambda change: change[1].strip().replace("\n", ";"),
)
def test_a_narinfo_that_lies_about_its_path_is_refused(
    as_root: Caller, hostile: HostileCache, change: tuple[str, str]
) -> None:
    hostile.narinfo("good", lambda text: text.replace(*change))
    refused(as_root, hostile.infos["good"].store_path.absolute())


def test_the_signature_and_narinfo_of_another_path_do_not_count(
    as_root: Caller, hostile: HostileCache
) -> None:
    good, other = hostile.infos["good"], hostile.infos["other"]
    # the other path's whole narinfo in place of this one's; then this path with the other's signature
    part = good.store_path.hash_part
    there = hostile.directory / f"{part}.narinfo"
    there.write_bytes(write_narinfo(other))
    refused(as_root, good.store_path.absolute())
    there.write_bytes(write_narinfo(replace(good, signatures=other.signatures)))
    assert "made-1" in refused(as_root, good.store_path.absolute(), status=4)
    # this path's name and signature with the other's content
    there.write_bytes(write_narinfo(replace(other, store_path=good.store_path, signatures=good.signatures)))
    refused(as_root, good.store_path.absolute(), status=4)


def test_a_key_of_the_trusted_name_and_other_bytes_does_not_count(
    as_root: Caller, hostile: HostileCache
) -> None:
    stranger = SecretKey.generate("made-1")
    info = hostile.infos["good"]
    forged = replace(info, signatures=(stranger.sign(fingerprint(info)),))
    (hostile.directory / f"{info.store_path.hash_part}.narinfo").write_bytes(write_narinfo(forged))
    refused(as_root, info.store_path.absolute(), status=4)


def test_a_cache_of_another_store_directory_is_not_used_beside_others(
    as_root: Caller, hostile: HostileCache, tmp_path: Path, faulty_http: Serve
) -> None:
    (hostile.directory / "nix-cache-info").write_bytes(b"StoreDir: /gnu/store\n")
    path = hostile.infos["good"].store_path.absolute()
    doctor = as_root.veneer("doctor")
    assert doctor.returncode != 0
    assert "is of the store directory /gnu/store, not /nix/store" in doctor.stdout
    empty = SignedCache(tmp_path / "empty", [])
    as_root.use(*as_root.sources[1:2], faulty_http(empty.directory).url, key=hostile.key)
    done = as_root.veneer("ls", path)
    assert done.returncode == 5
    assert "/gnu/store" in done.stderr


@pytest.mark.parametrize(
    "root",
    [
        {"..": {"type": "regular", "size": 1}},
        {"../../etc/owned": {"type": "regular", "size": 1}},
        {"a\0b": {"type": "regular", "size": 1}},
        {ESCAPES + "/": {"type": "regular", "size": 1}},
        {"a": {"type": "regular", "size": (1 << 63) - 1}},
        {"a": {"type": "regular", "size": 1 << 64}},
        {"a": {"type": "regular", "size": -1}},
        {"a": {"type": "regular", "size": 1, "narOffset": 1 << 62}},
        {"a": {"type": "symlink", "target": "/etc/shadow"}},
        {"a": {"type": ESCAPES}},
    ],
    ids=lambda root: ascii(next(iter(root.items())))[:60],
)
def test_a_listing_that_lies_is_not_used_and_the_content_is_right(
    as_root: Caller, hostile: HostileCache, root: dict[str, object]
) -> None:
    listing = json.dumps({"version": 1, "root": {"type": "directory", "entries": root}}).encode()
    path = hostile.publish("listed", archive(directory((b"a", file_node(b"right\n")))), listing=listing)
    done = as_root.veneer("cat", f"{path.store_path.absolute()}/a")
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr
    done = as_root.veneer("ls", path.store_path.absolute())
    assert done.stdout == "a\n"
    quiet(done.stderr, as_root.veneer("status").stdout)


@pytest.mark.parametrize("levels", [2_000, 200_000])
def test_a_depth_bomb_as_a_listing_is_not_used(as_root: Caller, hostile: HostileCache, levels: int) -> None:
    opening = b'{"type":"directory","entries":{"d":'
    listing = (
        b'{"version":1,"root":' + opening * levels + b'{"type":"regular","size":1}' + b"}}" * levels + b"}"
    )
    path = hostile.publish("bomb", archive(directory((b"a", file_node(b"right\n")))), listing=listing)
    done = as_root.veneer("cat", f"{path.store_path.absolute()}/a")
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


def test_names_that_differ_in_case_alone_are_different_files(as_root: Caller, hostile: HostileCache) -> None:
    nar = archive(directory((b"A", file_node(b"upper")), (b"a", file_node(b"lower"))))
    path = hostile.publish("cases", nar).store_path.absolute()
    assert as_root.veneer("cat", f"{path}/A").stdout == "upper"
    assert as_root.veneer("run", "--", "cat", f"{path}/a").stdout == "lower"
    base = path.rpartition("/")[2]
    assert as_root.veneer("ls", f"/nix/store/{base.upper()}").returncode == 2
