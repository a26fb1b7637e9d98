"""Dispatch, help, exit codes, and what a start costs."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest

from veneer.cli import main as module
from veneer.cli.main import COMMANDS, group, main
from veneer.model.errors import NotFoundError


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make ``veneer status`` and ``veneer run`` raise ``error``."""

    def load_settings(*_: object) -> None:
        raise error

    monkeypatch.setattr("veneer.cli.config.load_settings", load_settings)
    monkeypatch.setattr("veneer.cli.run.load_settings", load_settings)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert COMMANDS[name] in text
    assert "Example" in text


def test_the_group_lists_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-h"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert "Exit codes" in text


def test_what_prints_can_print_json() -> None:
    context = click.Context(group)
    for name in COMMANDS:
        command = group.get_command(context, name)
        assert command is not None
        printing = command.commands.values() if isinstance(command, click.Group) else [command]
        assert all(any("--json" in parameter.opts for parameter in each.params) for each in printing), name


def test_errors_give_their_exit_code_and_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, NotFoundError("no source has it", hint="look elsewhere"))
    assert main(["status"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "veneer: error: no source has it\nhint: look elsewhere\n"


def test_errors_are_json_when_json_was_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, NotFoundError("no source has it"))
    assert main(["status", "--json"]) == 3
    assert json.loads(capsys.readouterr().err)["error"]["exit_code"] == 3


def test_failures_of_run_are_125(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(monkeypatch, NotFoundError("no"))
    assert main(["run", "true"]) == 125
    assert main(["run", "--no-such-option", "true"]) == 125
    assert "no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["no-such-command"], ["gc", "--no-such"], ["fetch"], ["pin"], ["ls", "/etc"]]
)
def test_wrong_usage_is_two_with_a_hint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "hint: " in capsys.readouterr().err


def test_wrong_usage_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gc", "--json", "--no-such"]) == 2
    assert json.loads(capsys.readouterr().err)["error"]["kind"] == "UsageError"


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    assert main(["status"]) == 130


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "veneer demo" in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("veneer ")


def test_a_reader_that_leaves_is_no_traceback() -> None:
    done = subprocess.run(
        f"{sys.executable} -m veneer.cli.main --help | true",
        shell=True,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert "Traceback" not in done.stderr


def test_run_starts_without_what_only_the_daemon_needs() -> None:
    code = "import sys, veneer.cli.main, veneer.cli.run; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {
        "msgspec",
        "obstore",
        "cryptography",
        "asyncio",
        "sqlite3",
        "rich",
        "zstandard",
        "brotli",
        "tomllib",
    }
    assert not heavy & set(loaded)


def test_modules_are_named_by_their_commands() -> None:
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        assert command is not None
        assert command.name == name
    assert module.RUN_FAILURE == 125
