"""``veneer mirror``: paths of one binary cache into another one, re-encoded so that they can be read in parts."""

from __future__ import annotations

import click

from veneer.cli.config import Flags
from veneer.cli.options import json_option, publish_flags, quiet_option, settings_flags
from veneer.cli.output import Output


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--from", "caches", metavar="URL", multiple=True, required=True, help="A cache that has them. Repeatable."
)
@publish_flags()
@click.option("--no-closure", is_flag=True, help="The named paths alone, without what they refer to.")
@settings_flags(max_size=True, caches=False)
@quiet_option("No progress bar.")
@json_option()
@click.pass_obj
def mirror(
    output: Output,
    /,
    flags: Flags,
    paths: tuple[str, ...],
    no_closure: bool,
    **options: object,
) -> None:
    """Write paths of one binary cache into another, to be read in parts.

    All that they refer to comes along. Signatures of the first cache are checked and kept. Contents pass through the local cache.

    \b
    Example:
      veneer mirror --from https://cache.example.org --to s3://bucket/cache /nix/store/…-python3-3.12.8
    """
    from veneer.cli.config import load_settings
    from veneer.cli.options import store_path_arguments
    from veneer.cli.publishing import Request, publish_all, view_paths

    request = Request.parse(output, options)
    settings = load_settings(flags)
    with view_paths(output, settings, store_path_arguments(paths), closure=not no_closure) as found:
        publish_all(output, settings, request, found)
