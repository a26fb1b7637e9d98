"""``veneer fetch``: bring store paths into the cache ahead of time."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from veneer.cli.config import Flags
from veneer.cli.options import json_option, quiet_option, settings_flags, store_path_arguments
from veneer.cli.output import Output
from veneer.model.errors import UsageError

if TYPE_CHECKING:
    from veneer.cli.config import Settings


@click.command()
@click.argument("paths", nargs=-1, metavar="[PATH...]")
@click.option("--closure", is_flag=True, help="Everything that the paths refer to as well.")
@click.option("--metadata", is_flag=True, help="Only names, trees and references, no file contents.")
@click.option(
    "--trace",
    "trace_file",
    metavar="FILE",
    help="What a trace of `veneer run --trace` tells, and no more; what is not of the PATHs' closure is looked for in it.",
)
@settings_flags(max_size=True)
@quiet_option("No progress bar.")
@json_option()
@click.pass_obj
def fetch(
    output: Output,
    flags: Flags,
    paths: tuple[str, ...],
    closure: bool,
    metadata: bool,
    trace_file: str | None,
) -> None:
    """Bring store paths into the cache ahead of time.

    Later runs find them there without any source. The cache's size limit holds; pin what must stay.

    \b
    Example:
      veneer fetch --closure /nix/store/…-python3-3.12.8
      veneer fetch --trace check.trace
    """
    from veneer.cli.config import load_settings
    from veneer.cli.output import count, format_size, number
    from veneer.cli.private_daemon import open_client

    names = store_path_arguments(paths)
    if trace_file is not None:
        if closure or metadata:
            raise UsageError("--trace says by itself what is fetched: neither --closure nor --metadata")
        _fetch_traced(output, load_settings(flags), trace_file, names)
        return
    if not names:
        raise UsageError("no store paths given", hint="veneer fetch PATH..., or --trace FILE")
    with open_client(load_settings(flags)) as client, output.progress("fetching") as advance:
        request = {"paths": names, "closure": closure, "contents": not metadata}
        result = client.control("fetch", request, advance)
    done = count(number(result, "paths"), "store path")
    output.result(f"{done} in the cache, {format_size(number(result, 'wire_bytes'))} fetched", result)


def _fetch_traced(output: Output, settings: Settings, file: str, roots: list[str]) -> None:
    from veneer.cli.output import count, format_size, number
    from veneer.cli.private_daemon import open_client
    from veneer.cli.recording import read, request

    wanted = request(read(file), roots)
    session = os.urandom(8).hex()  # whoever reads beside it is not led by this trace
    with open_client(settings, session) as client, output.progress("fetching") as advance:
        result = client.control("prefetch", {**wanted, "strict": True}, advance)
    text = (
        f"what was touched of {count(number(result, 'done'), 'store path')} in the cache,"
        f" {format_size(number(result, 'wire_bytes'))} fetched"
    )
    notes = {
        "changed": "another one stands for a changed one",
        "unmatched": "no source has, nor one like it",
        "skipped": "left out, for the cache would be too small",
    }
    for key, why in notes.items():
        if number(result, key):
            output.note(f"{count(number(result, key), 'store path')}: {why}")
    output.result(text, result)
