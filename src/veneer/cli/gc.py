"""``veneer gc``: drop what was not used for longest."""

from __future__ import annotations

import click

from veneer.cli.config import Flags
from veneer.cli.options import json_option, settings_flags
from veneer.cli.output import Output


@click.command()
@click.option(
    "--max-size", "limit", metavar="SIZE", help="Shrink to this, such as 10G [default: max-size, else 0]."
)
@click.option("--dry-run", is_flag=True, help="Only show what would go.")
@settings_flags(sources=False)
@json_option()
@click.pass_obj
def gc(output: Output, flags: Flags, limit: str | None, dry_run: bool) -> None:
    """Drop cached content that was not used for longest.

    Pinned paths stay. What running environments use may go as well; it is fetched again when they read it.

    \b
    Example:
      veneer gc --max-size 10G
    """
    from veneer.cli.config import load_settings
    from veneer.cli.output import count, format_size, number, parse_size, table
    from veneer.cli.private_daemon import open_client

    settings = load_settings(flags)
    size = (settings.max_bytes or 0) if limit is None else parse_size(limit)
    with open_client(settings) as client:
        result = client.control("gc", {"max_bytes": size, "dry_run": dry_run})
    text = f"{'would drop' if dry_run else 'dropped'} the content of {count(number(result, 'evicted'), 'store path')}"
    text += f", {format_size(number(result, 'freed'))}"
    paths = result.get("paths")
    if dry_run and isinstance(paths, list) and paths:
        rows = [[str(row.get("path")), format_size(number(row, "bytes"))] for row in paths]
        text = table(rows, right=(1,)) + "\n" + text
    output.result(text, result)
