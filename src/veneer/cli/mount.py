"""``veneer mount``: the store on a directory, in the foreground."""

from __future__ import annotations

import click

from veneer.cli.config import Flags
from veneer.cli.options import json_option, settings_flags
from veneer.cli.output import Output


@click.command()
@click.argument("directory", metavar="DIR")
@settings_flags(max_size=True)
@json_option("Errors as JSON.")
@click.pass_obj
def mount(output: Output, flags: Flags, directory: str) -> int:
    """Mount the store on a directory until interrupted.

    Read-only, and its root lists as empty; store paths are there when they are named. Needs root, or an own user and
    mount namespace (`unshare -Urm`). Ends on Ctrl-C, SIGTERM, or when the directory is unmounted.

    \b
    Example:
      veneer mount /mnt/store --cache https://cache.example.org
    """
    from veneer.cli.mounting import serve

    return serve(output, flags, directory)
