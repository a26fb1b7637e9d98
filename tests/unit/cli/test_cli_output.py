"""Printing: sizes, tables, errors, and who gets colour and progress bars."""

from __future__ import annotations

import io
import json

import pytest

from veneer.cli.output import Output, count, format_seconds, format_size, parse_size, table
from veneer.model.errors import SourceError, UsageError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000", 1000),
        ("64K", 65536),
        ("10G", 10 << 30),
        ("1.5 GiB", 3 << 29),
        ("2tb", 2 << 40),
        (" 7b ", 7),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1e3", "1..5G", "10 parsecs", "٣", "inf", "."])
def test_what_is_no_size_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_sizes_are_printed_with_three_digits() -> None:
    shown = [format_size(n) for n in (0, 1023, 1024, 100 << 10, 1023 << 10, 1536 << 20, 10 << 50)]
    assert shown == ["0 B", "1023 B", "1.0 KiB", "100 KiB", "1.0 MiB", "1.5 GiB", "10.0 PiB"]


def test_times_and_counts_read_naturally() -> None:
    assert [format_seconds(s) for s in (0.4211, 12.34, 185)] == ["0.42 s", "12.3 s", "3 min 5 s"]
    assert (count(1, "path"), count(0, "path"), count(2, "entry", "entries")) == (
        "1 path",
        "0 paths",
        "2 entries",
    )


def test_a_table_aligns_and_shows_control_characters() -> None:
    text = table([["a", "10"], ["b\x1b[31m", "5"]], ("name", "size"), right=(1,))
    assert text.splitlines() == ["name       size", "a            10", "b\\x1b[31m     5"]


def test_json_prints_the_document_and_nothing_else() -> None:
    out, err = io.StringIO(), io.StringIO()
    output = Output(json=True, stdout=out, stderr=err)
    output.note("working")
    output.result("text", {"a": 1})
    assert json.loads(out.getvalue()) == {"a": 1}
    assert err.getvalue() == ""


def test_errors_say_what_where_and_hint_and_cannot_drive_the_terminal() -> None:
    err = io.StringIO()
    Output(stderr=err).error(SourceError("time\x1b]0;x\x07 out", where="http://a\n", hint="try\nagain"))
    assert err.getvalue() == "veneer: error: time\\x1b]0;x\\x07 out (http://a\\n)\nhint: try\\nagain\n"


def test_errors_are_json_on_stderr_when_asked() -> None:
    out, err = io.StringIO(), io.StringIO()
    Output(json=True, stdout=out, stderr=err).error(SourceError("down", where="http://a"), 125)
    error = json.loads(err.getvalue())["error"]
    assert error == {"kind": "SourceError", "what": "down", "where": "http://a", "hint": "", "exit_code": 125}
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("environ", "colored"), [({"TERM": "xterm"}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colour_is_for_terminals_that_want_it(environ: dict[str, str], colored: bool) -> None:
    err = Terminal()
    Output(stderr=err, environ=environ).error(UsageError("x"))
    assert ("\x1b[" in err.getvalue()) is colored


def test_a_progress_bar_needs_a_terminal() -> None:
    err = io.StringIO()
    with Output(stderr=err).progress("fetching") as advance:
        advance({"paths_done": 1, "paths": 2})
    assert err.getvalue() == ""


def test_a_progress_bar_shows_bytes_and_paths() -> None:
    err = Terminal()
    with Output(stderr=err, environ={"TERM": "xterm"}).progress("fetching") as advance:
        advance({"paths_done": 1, "paths": 2, "bytes_done": 512, "bytes": 1024})
    assert "fetching" in err.getvalue()
    assert "1/2 paths" in err.getvalue()
