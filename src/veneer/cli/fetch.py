"""``veneer fetch``: bring store paths into the cache ahead of time."""

from __future__ import annotations

import click

from veneer.cli.config import Flags
from veneer.cli.options import json_option, quiet_option, settings_flags, store_path_arguments
from veneer.cli.output import Output


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--closure", is_flag=True, help="Everything that the paths refer to as well.")
@click.option("--metadata", is_flag=True, help="Only names, trees and references, no file contents.")
@settings_flags(max_size=True)
@quiet_option("No progress bar.")
@json_option()
@click.pass_obj
def fetch(output: Output, flags: Flags, paths: tuple[str, ...], closure: bool, metadata: bool) -> None:
    """Bring store paths into the cache ahead of time.

    Later runs find them there without any source. The cache's size limit holds; pin what must stay.

    \b
    Example:
      veneer fetch --closure /nix/store/…-python3-3.12.8
    """
    from veneer.cli.config import load_settings
    from veneer.cli.output import count, format_size, number
    from veneer.cli.private_daemon import open_client

    names = store_path_arguments(paths)
    with open_client(load_settings(flags)) as client, output.progress("fetching") as advance:
        request = {"paths": names, "closure": closure, "contents": not metadata}
        result = client.control("fetch", request, advance)
    done = count(number(result, "paths"), "store path")
    output.result(f"{done} in the cache, {format_size(number(result, 'wire_bytes'))} fetched", result)
