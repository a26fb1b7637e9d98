"""``veneer status``: the daemon, its sources, the cache and what went wrong lately."""

from __future__ import annotations

import time

import click

from veneer.cli.config import Flags
from veneer.cli.options import json_option, settings_flags
from veneer.cli.output import Output, format_seconds, format_size, table
from veneer.model.errors import printable


@click.command()
@settings_flags()
@json_option()
@click.pass_obj
def status(output: Output, flags: Flags) -> None:
    """Show the daemon, its sources, the cache and recent failures.

    Without a running daemon one is started for the answer.

    \b
    Example:
      veneer status --json
    """
    from veneer.cli.config import load_settings
    from veneer.cli.private_daemon import open_client

    settings = load_settings(flags)
    with open_client(settings) as client:
        result = client.control("status")
    from veneer.sources.options import unknown_keys, without_secrets

    document = {
        "sources": [
            {"url": without_secrets(s.url), "verify": s.verify, "unknown_options": list(unknown_keys(s.url))}
            for s in settings.sources
        ],
        **result,
    }
    output.result(render(document), document)


def render(document: dict[str, object]) -> str:
    """The status for people: one block per part, in the daemon's order; unknown parts are shown as they are, and columns of empty lists are not."""
    blocks = []
    for name, value in document.items():
        if isinstance(value, list):
            rows = [row if isinstance(row, dict) else {name: row} for row in value]
            text = f":\n{_indented(_rows(rows))}" if rows else ": none"
        elif isinstance(value, dict):
            text = f":\n{_indented(table([[k, _cell(k, v)] for k, v in value.items()]))}"
        else:
            text = f": {printable(_cell(name, value))}"
        blocks.append(printable(name) + text)
    return "\n".join(blocks)


def _rows(rows: list[dict[str, object]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if value != []))
    header = list(map(printable, columns))
    return table([[_cell(c, row.get(c, "")) for c in columns] for row in rows], header)


def _cell(name: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and "bytes" in name:
        return format_size(value)
    if name == "uptime_seconds" and isinstance(value, int | float):
        return format_seconds(value)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if name == "time" and isinstance(value, int | float):
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    return str(value)


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
