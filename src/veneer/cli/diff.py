"""``veneer diff``: what an environment's own layer holds."""

from __future__ import annotations

from dataclasses import asdict

import click

from veneer.cli.config import Flags
from veneer.cli.options import json_option, settings_flags
from veneer.cli.output import Output, format_size, table


@click.command()
@click.argument("name", metavar="NAME")
@settings_flags(sources=False)
@json_option()
@click.pass_obj
def diff(output: Output, flags: Flags, name: str) -> None:
    """List the store paths that exist only in an environment.

    Also those of the caches that it changed or removed, for itself alone.

    \b
    Example:
      veneer diff dev
    """
    from veneer.cli.config import load_settings
    from veneer.environment import named

    settings = load_settings(flags)
    found = named.diff(settings.environments_dir, name)
    rows = [
        [change.change, "" if change.change == "removed" else format_size(change.size), change.name]
        for change in found
    ]
    output.result(table(rows, right=(1,)), {"name": name, "paths": [asdict(change) for change in found]})
