"""``veneer publish``: store paths, or what an environment built, as a binary cache that can be read in parts."""

from __future__ import annotations

import click

from veneer.cli.config import Flags
from veneer.cli.options import json_option, publish_flags, quiet_option, settings_flags
from veneer.cli.output import Output


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...|ENV")
@publish_flags()
@click.option("--no-closure", is_flag=True, help="The named paths alone, without what they refer to.")
@settings_flags(max_size=True)
@quiet_option("No progress bar.")
@json_option()
@click.pass_obj
def publish(
    output: Output, /, flags: Flags, paths: tuple[str, ...], no_closure: bool, **options: object
) -> None:
    """Write store paths into a binary cache that can be read in parts.

    All that they refer to comes along. Any Nix can substitute from it. Instead of paths, the name of an environment publishes what was built in it.
    Narinfos keep the signatures that they have; --key-file adds one, and signs chunk maps for partial reads.
    What the cache has already is left alone, so a run that was interrupted is completed by repeating it.

    \b
    Examples:
      veneer publish --to s3://bucket/cache --key-file ci.secret /nix/store/…-app
      veneer publish --to file:///srv/cache --key-file ci.secret build-42
    """
    from veneer.cli.config import load_settings
    from veneer.cli.options import store_path_arguments
    from veneer.cli.publishing import Request, environment_paths, is_environment, publish_all, view_paths

    request = Request.parse(output, options)
    settings = load_settings(flags)
    if is_environment(paths):
        publish_all(output, settings, request, environment_paths(output, settings, paths[0]))
        return
    names = store_path_arguments(paths)
    with view_paths(output, settings, names, closure=not no_closure) as found:
        publish_all(output, settings, request, found)
