"""``veneer down``: the end of a named environment."""

from __future__ import annotations

import click

from veneer.cli.config import Flags
from veneer.cli.options import json_option, quiet_option, settings_flags
from veneer.cli.output import Output


@click.command()
@click.argument("name", metavar="NAME")
@click.option(
    "--keep", is_flag=True, help="Keep what was written to the store, for the next `veneer up NAME`."
)
@click.option("--kill", is_flag=True, help="Kill the processes that use it.")
@settings_flags(sources=False)
@quiet_option("Say nothing when all is well.")
@json_option()
@click.pass_obj
def down(output: Output, flags: Flags, name: str, keep: bool, kill: bool) -> None:
    """End an environment and remove what was written to its store.

    Refuses while processes use it, and says which. One that is not up is removed.

    \b
    Examples:
      veneer down dev
      veneer down --keep dev
    """
    from veneer.cli.config import load_settings
    from veneer.environment import named

    settings = load_settings(flags)
    was_up, removed = named.end(settings.environments_dir, name, keep=keep, kill=kill)
    if output.json:
        output.result("", {"name": name, "was_up": was_up, "removed": removed})
        return
    done = "removed" if removed else "ended; what was written is kept" if was_up else "not up; it is kept"
    output.note(f"{name}: {done}")
