"""``veneer ls``: environments; or a store path's files without mounting anything, which moves no file contents where the
cache has listings."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from veneer.cli.config import Flags
from veneer.cli.options import json_option, settings_flags, split_store_path
from veneer.cli.output import Output, format_size, table

if TYPE_CHECKING:
    from veneer.cli.config import Settings
    from veneer.environment.named import Summary
    from veneer.formats.tree_index import Entry, TreeIndex

_TYPES = {stat.S_IFREG: "regular", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}


@click.command()
@click.argument("path", metavar="[PATH[/SUB]]", required=False)
@click.option("-l", "--long", "long", is_flag=True, help="Modes, sizes and link targets.")
@click.option("-R", "--recursive", is_flag=True, help="Everything below, too.")
@settings_flags()
@json_option()
@click.pass_obj
def ls(output: Output, flags: Flags, path: str | None, long: bool, recursive: bool) -> None:
    """List environments, or a store path's files without mounting anything.

    Without PATH: the named environments, whether they are up, and what was written to them.

    \b
    Examples:
      veneer ls
      veneer ls -l /nix/store/…-bash-5.2/bin
    """
    from veneer.cli.config import load_settings

    if path is None:
        _list_environments(output, load_settings(flags))
        return
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


def _list_environments(output: Output, settings: Settings) -> None:
    from veneer.environment import named, running

    versions = {about.name: about.version for about in running.find(settings.environments_dir)}
    rows = [
        {**environment_row(summary), "version": versions.get(summary.name)}
        for summary in named.summaries(settings.environments_dir)
    ]
    header = ("name", "state", "since", "processes", "paths", "size", "sources")
    lines = [
        [
            str(row["name"]),
            str(row["state"]),
            _time(row["since"]),
            str(len(row["processes"])),
            str(row["paths"]),
            format_size(row["bytes"]),
            " ".join(row["sources"]),
        ]
        for row in rows
    ]
    text = table(lines, header, right=(3, 4, 5)) if lines else "no environments"
    output.result(text, {"environments": rows})


def environment_row(summary: Summary) -> dict[str, Any]:
    """An environment for JSON. ``since``: seconds since the epoch, null when it is not up."""
    from veneer.sources.options import without_secrets

    owner = summary.owner
    sources = (owner.view or {}).get("sources", []) if owner is not None else []
    return {
        "name": summary.name,
        "state": summary.state,
        "since": owner.since if owner is not None and summary.state in ("up", "in use") else None,
        "processes": [{"pid": process.pid, "command": process.command} for process in summary.processes],
        "paths": summary.paths,
        "bytes": summary.size,
        "sources": [without_secrets(str(source["url"])) for source in sources],
    }


def _time(since: float | None) -> str:
    return "-" if since is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))


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
