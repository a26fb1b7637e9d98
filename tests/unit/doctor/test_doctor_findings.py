"""Each judgement of the doctor, by what it is told."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.doctor_subject import make_subject
from veneer.cli.doctor import render
from veneer.cli.output import Output
from veneer.doctor import machine, nix, places, sources
from veneer.doctor.checks import CHECKS, examine, worst
from veneer.doctor.finding import Check, Result, Subject
from veneer.environment.nix.version import NixVersion
from veneer.formats.cache_info import CacheInfo
from veneer.formats.mountinfo import parse_mountinfo
from veneer.formats.overlay_store import OverlayStore
from veneer.model.errors import DaemonError, SourceError
from veneer.model.store_path import StorePath

KEY = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="
URL = "http://cache.example"


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return make_subject(tmp_path, URL, keys=(KEY,))


@pytest.mark.parametrize(
    ("release", "state"),
    [
        ("5.10.0-30", "failed"),
        ("5.11", "ok"),
        ("6.1.0-13-amd64", "ok"),
        ("6.18.44", "ok"),
        ("odd", "warning"),
    ],
)
def test_kernels_before_5_11_fail(release: str, state: str) -> None:
    assert machine.kernel_version(release).state == state


def test_a_limit_beyond_the_disk_is_a_warning() -> None:
    gib = 1 << 30
    assert places.space(100 * gib, None, 0).state == "ok"
    assert places.space(100 * gib, 150 * gib, 60 * gib).state == "ok"
    assert places.space(100 * gib, 200 * gib, 60 * gib).state == "warning"
    assert places.space(gib >> 1, None, 0).state == "warning"


@pytest.mark.parametrize(
    ("answer", "state", "words"),
    [
        (CacheInfo("/nix/store", True, 40), "ok", "priority 40"),
        (CacheInfo(), "ok", "mass"),
        (CacheInfo("/gnu/store"), "failed", "/gnu/store"),
        (SourceError("connection refused", where=URL), "failed", "refused"),
        (TimeoutError(), "failed", "within"),
    ],
)
def test_sources_are_judged_by_what_they_say_of_themselves(answer: object, state: str, words: str) -> None:
    result = sources.judged(URL, answer)
    assert result.state == state
    assert words in result.what


def test_keys_are_needed_only_where_signatures_are(subject: Subject) -> None:
    def states(**changes: Any) -> list[str]:
        return [result.state for result in sources.keys(replace(subject, **changes))]

    assert states() == ["ok"]
    assert states(keys=()) == ["failed"]
    assert states(keys=(), sources=(URL + "?trusted=true",)) == ["ok"]
    assert states(keys=(), require_signatures=False) == ["ok"]
    assert states(keys=(KEY, "bad")) == ["failed"]


def test_a_clock_five_minutes_off_is_a_warning() -> None:
    assert sources.skew(299, URL).state == "ok"
    assert "ahead" in sources.skew(301, URL).what
    assert "behind" in sources.skew(-301, URL).what


def test_the_daemon_is_judged_by_its_answer(subject: Subject) -> None:
    def refused() -> dict[str, object]:
        raise DaemonError("the daemon does not answer")

    assert [r.state for r in places.daemon(subject)] == ["ok"]
    assert [r.state for r in places.daemon(replace(subject, status=lambda: {"pid": os.getpid()}))] == ["ok"]
    assert [r.state for r in places.daemon(replace(subject, status=refused))] == ["failed"]
    told = replace(subject, status=lambda: {"stories": [{"text": "timed out"}]})
    assert ["timed out" in r.what for r in places.failures(told)] == [True]


def test_an_index_that_is_none_is_seen(subject: Subject) -> None:
    subject.cache_dir.mkdir()
    assert [r.state for r in places.index(subject)] == ["skipped"]
    (subject.cache_dir / "index.sqlite").write_bytes(b"something else that is long enough")
    assert [r.state for r in places.index(subject)] == ["failed"]


@pytest.mark.parametrize(
    ("version", "needed", "state"),
    [
        (NixVersion("Nix", (2, 26, 3)), True, "ok"),
        (NixVersion("Nix", (2, 21, 0)), True, "failed"),
        (NixVersion("Nix", (2, 8, 0)), False, "warning"),
        (NixVersion("Lix, like Nix", (2, 91, 1)), True, "failed"),
        (None, True, "failed"),
    ],
)
def test_a_nix_without_overlay_stores_fails_only_where_one_is_configured(
    version: NixVersion | None, needed: bool, state: str
) -> None:
    assert nix.judged_version(version, needed=needed).state == state


STORE = OverlayStore("/nobody/nix.sock", "/nobody/lower", "/nobody/upper", "/nobody/root").url()


def test_missing_features_and_a_doubled_store_are_found(subject: Subject) -> None:
    def findings(features: str, store: str = STORE, remote: str = "") -> list[str]:
        values = {"experimental-features": features, "store": store}
        told = replace(subject, nix=values, environ={"NIX_REMOTE": remote})
        return [result.what for result in nix.configuration(told) if result.state == "failed"]

    assert findings("nix-command local-overlay-store") == []
    assert "local-overlay-store" in findings("nix-command")[0]
    read_only = "local-overlay://?lower-store=%2Flower%3Fread-only%3Dtrue&upper-layer=/u"
    assert "read-only-local-store" in findings("nix-command local-overlay-store", read_only)[0]
    assert "NIX_REMOTE" in findings("nix-command local-overlay-store", "daemon", STORE)[0]


def test_an_overlay_store_without_its_mounts_and_socket_is_told_what_to_mount(subject: Subject) -> None:
    told = replace(subject, environ={"NIX_REMOTE": STORE})
    fixes = [result.fix for result in nix.mounts(told) if result.state == "failed"]
    assert "mount -t overlay overlay -o lowerdir=/nobody/lower/nix/store,upperdir=/nobody/upper" in fixes[0]
    assert "veneer mount /nobody/lower/nix/store" in fixes[1]
    assert [result.state for result in nix.lower_store(told)] == ["failed"]
    assert [result.state for result in nix.remount_hook(told)] == ["warning"]


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Callable[[bytes], str]]:
    """A socket that answers one client with these bytes."""
    server = socket.socket(socket.AF_UNIX)
    threads = []

    def listen(answer: bytes) -> str:
        server.bind(str(tmp_path / "socket"))
        server.listen()

        def serve() -> None:
            with server.accept()[0] as client:
                client.recv(1, socket.MSG_PEEK)  # the greeting came, and closing with it unread is a reset
                client.sendall(answer)

        threads.append(threading.Thread(target=serve))
        threads[0].start()
        return str(tmp_path / "socket")

    yield listen
    for thread in threads:
        thread.join(10)
    server.close()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n", b"no", b""])
def test_a_socket_of_another_protocol_is_not_taken_for_nix(
    listener: Callable[[bytes], str], answer: bytes
) -> None:
    result = nix.greet(listener(answer))
    assert (result.state, "daemon.sock" in result.fix) == ("failed", True)


def test_paths_in_both_layers_are_named(subject: Subject) -> None:
    name = f"{'0' * 32}-both"
    (subject.environments_dir / "env/upper" / name).mkdir(parents=True)
    assert [r.state for r in nix.both_layers(subject)] == ["ok"]
    told = replace(subject, memory=lambda names: {names[0]: {URL: "sha256:…"}})
    assert [name in r.what for r in nix.both_layers(told) if r.state == "warning"] == [True]


def test_a_check_that_hangs_or_breaks_is_a_finding_and_the_others_are_heard(subject: Subject) -> None:
    release = threading.Event()

    def hang(_: Subject) -> Iterator[Result]:
        yield Result("ok", "begun")
        release.wait(30)

    def fail(_: Subject) -> Iterator[Result]:
        raise RuntimeError("oops")

    def fine(_: Subject) -> Iterator[Result]:
        yield Result("ok", "fine")

    checks = [Check(function.__name__, "g", "", "", function, 0.2) for function in (hang, fail, fine)]
    found = list(examine(subject, checks))
    release.set()
    assert [(f.name, f.state) for f in found] == [
        ("hang", "ok"),
        ("hang", "failed"),
        ("fail", "warning"),
        ("fine", "ok"),
    ]
    assert worst(found) == "failed"


def test_the_text_has_failures_first_and_no_signs_outside_of_a_terminal(subject: Subject) -> None:
    def bad(_: Subject) -> Iterator[Result]:
        yield Result("failed", "it is \x1b[31mbroken", "mend it")

    def good(_: Subject) -> Iterator[Result]:
        yield Result("ok", "fine")

    found = list(
        examine(subject, [Check("a", "g", "", "it matters", good), Check("b", "g", "", "it matters", bad)])
    )
    with open(os.devnull, "w") as nowhere:
        text = render(found, Output(stdout=nowhere, environ={}))
    assert text.startswith("FAILED  b: it is \\x1b[31mbroken\n    why: it matters\n    fix: mend it\n")
    assert text.isascii()


def test_names_of_checks_are_different() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)


def test_different_contents_of_one_path_are_told_with_the_winner() -> None:
    path = StorePath.parse(f"{'0' * 32}-x")
    assert sources.agreement(path, {URL: None}).state == "warning"
    assert "failed" in sources.agreement(path, {URL: SourceError("down")}).what


@pytest.mark.parametrize(("number", "state"), [(errno.EACCES, "ok"), (errno.ENOTCONN, "failed")])
def test_another_users_mount_is_not_taken_for_a_dead_one(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, number: int, state: str
) -> None:
    """The kernel refuses a mount of FUSE to all but its owner, whether it is served or not."""

    def refuse(place: str) -> None:
        raise OSError(number, os.strerror(number), place)

    line = b"36 35 0:99 / /m rw - fuse.veneer veneer rw,user_id=0,group_id=0\n"
    monkeypatch.setattr(machine, "parse_mountinfo", lambda _: parse_mountinfo(line))
    monkeypatch.setattr(os, "statvfs", refuse)
    assert [found.state for found in machine.stale_mounts(subject)] == [state]
