"""The closing figures of a run."""

from __future__ import annotations

from veneer.cli.run_report import closing_line, combine, touched, troubles

MOUNT = {
    "paths": {
        "7": {
            "name": "aaa-git",
            "first_touch": 0.5,
            "bytes_read": 4096,
            "reads": 1,
            "waits": 2,
            "wait_seconds": 0.25,
        },
        "8": {
            "name": "bbb-libc",
            "first_touch": 0.6,
            "bytes_read": 1,
            "reads": 1,
            "waits": 1,
            "wait_seconds": 0.5,
        },
    }
}
DAEMON = {
    "wire_bytes": 3 << 20,
    "requests": 9,
    "closure_paths": 306,
    "closure_bytes": 300 << 20,
    "paths": {
        "aaa-git": {"fetched_wire": 100, "fetched_nar": 200},
        "ccc-doc": {"fetched_wire": 5, "fetched_nar": 0},
    },
}


def test_figures_of_both_sides_meet_by_path() -> None:
    report = combine(["git"], 0, 1.5, MOUNT, DAEMON)
    paths = report["paths"]
    assert isinstance(paths, dict)
    assert paths["aaa-git"] == {
        "touched": True,
        "bytes": 4096,
        "first_touch": 0.5,
        "wait": 0.25,
        "fetched": 100,
        "fetched_nar": 200,
    }
    assert paths["bbb-libc"]["fetched"] == 0
    assert not paths["ccc-doc"]["touched"]
    assert (report["touched"], report["fetched"], report["waited"]) == (2, 3 << 20, 0.75)
    assert report["closure"] == {"paths": 306, "bytes": 300 << 20}
    assert touched(MOUNT) == ["aaa-git", "bbb-libc"]


def test_the_closing_line_tells_the_share() -> None:
    line = closing_line(combine(["git"], 0, 1.5, MOUNT, DAEMON))
    assert line == "closure 300 MiB in 306 paths, fetched 3.0 MiB (1.0%), touched 2 paths, waited 0.75 s"


def test_without_the_daemon_the_line_says_less() -> None:
    assert (
        closing_line(combine(["git"], 0, 1.5, MOUNT, None))
        == "touched 2 store paths, fetched 0 B, waited 0.75 s"
    )


def test_a_run_that_touched_nothing_says_so() -> None:
    assert closing_line(combine(["true"], 0, 0.1, {}, None)) == "no store path was touched"


def test_failures_that_readers_met_are_told_with_their_story() -> None:
    failure = {"at": 1.0, "errno": "EIO", "where": "aaa-git entry 3", "why": "source\x1b timed out"}
    lines = troubles({"failures": [failure] * 7, "failure_count": 9})
    assert lines[0] == "EIO on aaa-git entry 3: source\\x1b timed out"
    assert lines[5:] == ["and 4 earlier failures"]
