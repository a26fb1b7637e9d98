"""``veneer ls``: a store path's files without mounting anything; moves no file contents where the cache has listings."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from veneer.cli.config import Flags
from veneer.cli.options import json_option, settings_flags, split_store_path
from veneer.cli.output import Output, table

if TYPE_CHECKING:
    from veneer.formats.tree_index import Entry, TreeIndex

_TYPES = {stat.S_IFREG: "regular", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}


@click.command()
@click.argument("path", metavar="PATH[/SUB]")
@click.option("-l", "--long", "long", is_flag=True, help="Modes, sizes and link targets.")
@click.option("-R", "--recursive", is_flag=True, help="Everything below, too.")
@settings_flags()
@json_option()
@click.pass_obj
def ls(output: Output, flags: Flags, path: str, long: bool, recursive: bool) -> None:
    """List a store path's files without mounting anything.

    \b
    Example:
      veneer ls -l /nix/store/…-bash-5.2/bin
    """
    from veneer.cli.config import load_settings
    from veneer.cli.private_daemon import open_client
    from veneer.cli.reader import StoreReader

    basename, rest = split_store_path(path)
    settings = load_settings(flags)
    with open_client(settings) as client:
        reader = StoreReader(client, settings.cache_dir)
        held, entry = reader.resolve([basename.encode(), *os.fsencode(rest).split(b"/")], follow=not long)
        tree = reader.tree(held)
    rows = [describe(tree, found, name) for name, found in entries(tree, entry, recursive)]
    if long:
        text = table([_line(row) for row in rows], right=(1,))
    else:
        text = table([[str(row["name"])] for row in rows])
    output.result(text, {"path": path, "type": describe(tree, entry, b"")["type"], "entries": rows})


def entries(tree: TreeIndex, entry: Entry, recursive: bool) -> Iterator[tuple[bytes, Entry]]:
    """(name as shown, entry): a directory's children, or the file itself."""
    if not stat.S_ISDIR(entry.mode):
        yield entry.name or b".", entry
        return
    stack = [(child.name, child) for child in tree.children(entry.number)][::-1]
    while stack:
        name, child = stack.pop()
        yield name, child
        if recursive and stat.S_ISDIR(child.mode):
            stack.extend([(name + b"/" + below.name, below) for below in tree.children(child.number)][::-1])


def describe(tree: TreeIndex, entry: Entry, name: bytes) -> dict[str, object]:
    """An entry for JSON, in the words of Nix's listings. Names that are not UTF-8 carry surrogates."""
    row: dict[str, object] = {"name": os.fsdecode(name), "type": _TYPES[stat.S_IFMT(entry.mode)]}
    if stat.S_ISREG(entry.mode):
        row |= {"size": entry.size, "executable": bool(entry.mode & 0o111)}
    elif stat.S_ISLNK(entry.mode):
        row["target"] = os.fsdecode(tree.target(entry.number))
    return row


def _line(row: dict[str, object]) -> list[str]:
    if row["type"] == "regular":
        return ["-r-xr-xr-x" if row["executable"] else "-r--r--r--", str(row["size"]), str(row["name"])]
    if row["type"] == "symlink":
        return ["lrwxrwxrwx", "0", f"{row['name']} -> {row['target']}"]
    return ["dr-xr-xr-x", "0", str(row["name"])]
