"""``veneer pin`` and ``veneer unpin``: what the size limit must not touch."""

from __future__ import annotations

import click

from veneer.cli.config import Flags
from veneer.cli.options import json_option, settings_flags, store_path_arguments
from veneer.cli.output import Output
from veneer.model.errors import UsageError


@click.command()
@click.argument("name", required=False)
@click.argument("paths", nargs=-1, metavar="[PATH...]")
@click.option("--list", "show", is_flag=True, help="List the pins.")
@settings_flags()
@json_option()
@click.pass_obj
def pin(output: Output, flags: Flags, name: str | None, paths: tuple[str, ...], show: bool) -> None:
    """Keep store paths in the cache, or list what is kept.

    The paths and all that they refer to stay under NAME when `gc` or the size limit drops others. Pinning fetches
    nothing; `veneer fetch --closure` does.

    \b
    Examples:
      veneer pin compiler /nix/store/…-gcc-14.2.0
      veneer pin --list
    """
    from veneer.cli.config import load_settings
    from veneer.cli.output import count, number, table
    from veneer.cli.private_daemon import open_client

    if show == (name is not None) or (name is not None and not paths):
        raise UsageError("pin takes a name and store paths, or --list", hint="veneer pin --help")
    names = store_path_arguments(paths)
    with open_client(load_settings(flags)) as client:
        if name is not None:
            result = client.control("pin", {"name": name, "paths": names})
            output.result(f"pinned {count(number(result, 'pinned'), 'store path')} as {name}", result)
            return
        result = client.control("pins")
    pins = result.get("pins")
    rows = [
        [str(key), str(path)]
        for key, held in (pins.items() if isinstance(pins, dict) else ())
        for path in held
    ]
    output.result(table(rows, ("name", "store path")) if rows else "nothing is pinned", result)


@click.command()
@click.argument("name")
@settings_flags(sources=False)
@json_option()
@click.pass_obj
def unpin(output: Output, flags: Flags, name: str) -> None:
    """Let a pinned name go.

    \b
    Example:
      veneer unpin compiler
    """
    from veneer.cli.config import load_settings
    from veneer.cli.output import count, number
    from veneer.cli.private_daemon import open_client

    with open_client(load_settings(flags)) as client:
        result = client.control("unpin", {"name": name})
    output.result(f"unpinned {name}, {count(number(result, 'unpinned'), 'store path')}", result)
