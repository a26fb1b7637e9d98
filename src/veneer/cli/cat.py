"""``veneer cat``: a file of a store path on stdout, without mounting anything."""

from __future__ import annotations

import os
import sys

import click

from veneer.cli.config import Flags
from veneer.cli.options import json_option, settings_flags, split_store_path
from veneer.cli.output import Output


@click.command()
@click.argument("path", metavar="PATH/SUB")
@settings_flags()
@json_option("Errors as JSON; the file itself is printed as it is.")
@click.pass_obj
def cat(output: Output, flags: Flags, path: str) -> None:
    """Print a file of a store path without mounting anything.

    Links are followed, also into other store paths.

    \b
    Example:
      veneer cat /nix/store/…-hello-2.12/share/info/hello.info
    """
    from veneer.cli.config import load_settings
    from veneer.cli.private_daemon import open_client
    from veneer.cli.reader import StoreReader
    from veneer.formats.tree_index import Kind
    from veneer.model.errors import UsageError

    basename, rest = split_store_path(path)
    settings = load_settings(flags)
    with open_client(settings) as client:
        reader = StoreReader(client, settings.cache_dir)
        held, entry = reader.resolve([basename.encode(), *os.fsencode(rest).split(b"/")], follow=True)
        if entry.kind is Kind.DIRECTORY:
            raise UsageError("a directory; name a file", where=path, hint=f"veneer ls {path}")
        for piece in reader.content(held, entry):
            sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()
