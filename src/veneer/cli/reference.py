"""``python -m veneer.cli.reference [DIR]``: the reference pages of the command line, made from the code.

Writes ``cli.md``, ``exit-codes.md``, ``configuration.md`` and ``doctor.md`` into DIR (default docs/reference). A test fails when the files
there differ from what this would write.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from veneer.cli.config import KEYS, SOURCE_KEYS, Key
from veneer.cli.limits import LIMITS
from veneer.cli.main import COMMANDS, RUN_FAILURE, group
from veneer.doctor.checks import page
from veneer.model import errors

_GENERATED = "<!-- Made by `python -m veneer.cli.reference`; change the code, not this page. -->\n"


def pages() -> dict[str, str]:
    """File name -> text of every page."""
    return {
        "cli.md": cli_page(),
        "exit-codes.md": exit_codes_page(),
        "configuration.md": configuration_page(),
        "doctor.md": page(),
    }


def cli_page() -> str:
    # With its settings: click keeps the names of the help option from the first context that it sees.
    context = click.Context(group, info_name="veneer", **group.context_settings)
    parts = [_GENERATED, "# Command line\n", _table(("command", "purpose"), _command_rows())]
    for name in COMMANDS:
        command = group.get_command(context, name)
        assert command is not None
        inner = click.Context(command, parent=context, info_name=name)
        parts.append(_command(command, inner))
        if isinstance(command, click.Group):
            parts += (
                _command(below, click.Context(below, parent=inner, info_name=name))
                for name, below in command.commands.items()
            )
    return "\n".join(parts)


def _command_rows() -> Iterator[tuple[str, ...]]:
    for name, purpose in COMMANDS.items():
        yield f"[`veneer {name}`](#veneer-{name})", purpose


def _command(command: click.Command, context: click.Context) -> str:
    usage = " ".join((context.command_path, *command.collect_usage_pieces(context)))
    rows = []
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option):
            names, text = parameter.get_help_record(context) or ("", "")
            if "--help" in names:
                continue
            rows.append((f"`{names}`", text))
    return f"## {context.command_path}\n\n```\n{usage}\n```\n\n{_prose(command)}\n\n{_table(('option', 'meaning'), rows)}"


def _prose(command: click.Command) -> str:
    """The command's docstring; blocks that click leaves as they are become code."""
    blocks = inspect.cleandoc(command.help or "").split("\n\n")
    out = []
    for block in blocks:
        if block.startswith("\b\n"):
            title, _, rest = block[2:].partition("\n")
            lines = "\n".join(line.strip() for line in rest.split("\n"))
            out.append(f"{title}\n\n```\n{lines}\n```")
        else:
            out.append(re.sub(r"\s*\n\s*", " ", block))
    return "\n\n".join(out)


def exit_codes_page() -> str:
    by_code: dict[int, list[type[errors.VeneerError]]] = {}
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, errors.VeneerError):
            by_code.setdefault(kind.exit_code, []).append(kind)
    rows = [("0", "", "Done.")]
    for code, kinds in sorted(by_code.items()):
        first = min(kinds, key=lambda kind: len(kind.__mro__))
        names = ", ".join(f"`{kind.__name__}`" for kind in sorted(kinds, key=lambda k: k.__name__))
        rows.append((str(code), names, _MEANINGS.get(code) or _first_line(first)))
    rows.insert(
        2,
        (
            "1",
            "",
            "`veneer cache verify`: something was wrong in the cache; it is told, and dropped unless --dry-run.",
        ),
    )
    rows.append(
        (
            "125",
            "",
            "`veneer run`, `veneer enter`: a failure of veneer's own, before or instead of the command.",
        )
    )
    rows.append(("126", "", "`veneer run`, `veneer enter`: the command was found and cannot be executed."))
    rows.append(("127", "", "`veneer run`, `veneer enter`: the command was not found."))
    rows.append(
        ("128 + n", "", "Ended by signal n; `veneer run` dies by the signal that its command died by.")
    )
    assert RUN_FAILURE == 125
    text = "The kinds are those of the `kind` field of an error with `--json`, which is printed on stderr:\n"
    shape = '```json\n{"error": {"kind": "…", "what": "…", "where": "…", "hint": "…", "exit_code": 1}}\n```\n'
    return "\n".join(
        (_GENERATED, "# Exit codes\n", _table(("code", "kinds of error", "meaning"), rows), text, shape)
    )


_MEANINGS = {
    1: "General failure.",
    2: "Wrong usage: flags, arguments, configuration.",
    3: "No source has it.",
}


def _first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")


def configuration_page() -> str:
    intro = (
        "TOML, in `~/.config/veneer/config.toml` (`$XDG_CONFIG_HOME`), for root in `/etc/veneer/config.toml`, or named with\n"
        "`--config`. Flags go before it. What neither says comes from the user's nix.conf (`NIX_CONF_DIR`,\n"
        "`NIX_USER_CONF_FILES`, `NIX_CONFIG`), so without any configuration the sources are those of Nix.\n"
    )
    example = (
        '```toml\nmax-size = "50G"\ntrusted-public-keys = ["cache.example.org-1:…"]\n\n[[source]]\n'
        'url = "https://cache.example.org"\npriority = 30\n\n[[source]]\nurl = "/srv/cache"\ntrusted = true\n```\n'
    )
    parts = (
        intro,
        example,
        _keys(KEYS),
        "## [[source]]\n",
        _keys(SOURCE_KEYS),
        "## [limits]\n",
        _LIMITS_TEXT,
    )
    return "\n".join((_GENERATED, "# Configuration\n", *parts, _limits()))


_LIMITS_TEXT = (
    "For daemons and mounts that are started now. Disk use is bounded by `max-size`, the rate of a source by its own keys,\n"
    "how long a read may wait by `--patience`. [What happens at each limit](../concepts/limits.md#limits-that-can-be-set).\n"
)


def _limits() -> str:
    rows = [
        (
            f"`{limit.name}`",
            "size" if limit.is_size else "integer",
            limit.default,
            f"{limit.least:,}",
            limit.purpose,
        )
        for limit in LIMITS
    ]
    return _table(("key", "type", "default", "least", "meaning"), rows)


def _keys(keys: tuple[Key, ...]) -> str:
    return _table(
        ("key", "type", "default", "meaning"), [(f"`{k.name}`", k.kind, k.default, k.purpose) for k in keys]
    )


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return (
        "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        + "\n"
    )


def main() -> int:
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/reference")
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (directory / name).write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
