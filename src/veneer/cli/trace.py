"""``veneer trace``: what a trace holds."""

from __future__ import annotations

import click

from veneer.cli.options import json_option
from veneer.cli.output import Output


@click.group()
def trace() -> None:
    """Show what a command read.

    `veneer run --trace FILE` writes a trace; `veneer run --prefetch FILE` and `veneer fetch --trace FILE` load what it tells.

    \b
    Example:
      veneer trace show check.trace
    """


@trace.command()
@click.argument("file", metavar="FILE")
@click.option("--files", is_flag=True, help="Each file as well.")
@json_option()
@click.pass_obj
def show(output: Output, file: str, files: bool) -> None:
    """Show store paths, files and bytes of a trace.

    In order of first touch. The share is that of the path's whole content.

    \b
    Example:
      veneer trace show --files check.trace
    """
    from veneer.cli.output import count, format_size, table
    from veneer.cli.recording import read
    from veneer.model.errors import printable

    paths = read(file)
    touched = sum(path.bytes for path in paths)
    whole = sum(path.nar_size for path in paths)
    number_of_files = sum(len(path.files) for path in paths)
    rows = []
    for path in paths:
        share = f"{path.bytes / path.nar_size:.1%}" if path.nar_size else ""
        rows.append([path.path.basename, str(len(path.files)), format_size(path.bytes), share])
        for one in path.files if files else ():
            name = printable(one.name.decode("utf-8", "backslashreplace")) or "(itself)"
            part = f"{one.bytes / one.size:.1%}" if one.size else ""
            rows.append([f"  {name}", "", format_size(one.bytes), part])
    total = (
        f"{count(len(paths), 'store path')}, {count(number_of_files, 'file')}, {format_size(touched)}"
        f" of {format_size(whole)}" + (f" ({touched / whole:.1%})" if whole else "")
    )
    document = {
        "paths": [
            {
                "path": path.path.basename,
                "nar_hash": path.nar_hash.sri,
                "nar_size": path.nar_size,
                "bytes": path.bytes,
                "files": [
                    {
                        "name": one.name.decode("utf-8", "surrogateescape"),
                        "size": one.size,
                        "bytes": one.bytes,
                        "ranges": [list(part) for part in one.ranges],
                    }
                    for one in path.files
                ],
            }
            for path in paths
        ],
        "files": number_of_files,
        "bytes": touched,
        "nar_size": whole,
    }
    shown = table(rows, ["STORE PATH", "FILES", "BYTES", "SHARE"], right=[1, 2, 3])
    output.result(f"{shown}\n{total}" if rows else total, document)
