"""The flags that several commands share, and what their arguments become."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

from veneer.cli.config import Flags
from veneer.cli.output import Output
from veneer.model.errors import FormatError, UsageError
from veneer.model.store_path import DEFAULT_STORE_DIR, StorePath

Function = Callable[..., Any]
Decorator = Callable[[Function], Function]

_IN_STORE = re.compile(re.escape(DEFAULT_STORE_DIR) + r"/([a-z0-9]{32}-[A-Za-z0-9+\-._?=]+)")

_CACHE_DIR = click.option(
    "--cache-dir",
    metavar="DIR",
    help="Where fetched content is kept [default: ~/.cache/veneer; root: /var/cache/veneer].",
)
_CONFIG = click.option("--config", "config_file", metavar="FILE", help="Configuration file to use.")
_SOURCES = (
    click.option(
        "--cache",
        "caches",
        metavar="URL",
        multiple=True,
        help="A Nix binary cache: http, https, file, s3, gs or az URL with ?priority=&trusted=, or a directory."
        " Repeatable [default: configuration, else nix.conf].",
    ),
    click.option(
        "--trusted-public-key",
        "keys",
        metavar="NAME:BASE64",
        multiple=True,
        help="A key whose signatures count, instead of the configured ones. Repeatable.",
    ),
    click.option(
        "--verify",
        type=click.Choice(("strict", "deferred")),
        help="strict: bytes are served after their hash was checked; deferred: checked while they are served.",
    ),
)
_MAX_SIZE = click.option(
    "--max-size",
    metavar="SIZE",
    help="Size limit of the cache, such as 10G; for a daemon that is started now.",
)


def settings_flags(*, sources: bool = True, caches: bool = True, max_size: bool = False) -> Decorator:
    """Adds the flags that ``config.load_settings`` takes; the command gets them as one argument, ``flags``.

    ``caches=False``: without ``--cache``, for a command that fills ``caches`` by a flag of its own.
    """
    options: list[Decorator] = [
        *((_SOURCES if caches else _SOURCES[1:]) if sources else ()),
        _CACHE_DIR,
        *((_MAX_SIZE,) if max_size else ()),
        _CONFIG,
    ]

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def command(*args: Any, **given: Any) -> Any:
            taken = {name: given.pop(name) for name in Flags.__slots__ if name in given}
            output = click.get_current_context().find_object(Output)
            if output is not None and sources:
                taken["warn"] = output.warning
            return function(*args, flags=Flags(**taken), **given)

        wrapped: Function = command
        for option in reversed(options):
            wrapped = option(wrapped)
        return wrapped

    return decorate


_PUBLISH = (
    click.option(
        "--to",
        required=True,
        metavar="URL",
        help="Where to: a directory, or a file, s3, gs or az URL. Made when it is not there.",
    ),
    click.option(
        "--key-file",
        metavar="FILE",
        help="Secret key (nix key generate-secret) that signs narinfos and chunk maps.",
    ),
    click.option("--unsigned", is_flag=True, help="Also paths that nobody has signed."),
    click.option(
        "--level", type=click.IntRange(1, 22), default=3, show_default=True, help="Compression level of zstd."
    ),
    click.option(
        "--frame-size",
        metavar="SIZE",
        default="256K",
        show_default=True,
        help="Most uncompressed bytes of small files in a frame. A frame of a large file, or of a small path, has up to four times as many.",
    ),
    click.option(
        "--jobs",
        type=click.IntRange(1, 256),
        metavar="N",
        help="Paths and frames worked on at once [default: the number of processors].",
    ),
    click.option("--fsync", is_flag=True, help="Have every object on disk before the next; for directories."),
    click.option("--dry-run", is_flag=True, help="Print what would be uploaded, in order."),
)


def publish_flags() -> Decorator:
    """Adds the flags that ``publishing.Request.parse`` takes."""

    def decorate(function: Function) -> Function:
        for option in reversed(_PUBLISH):
            function = option(function)
        return function

    return decorate


def _set(attribute: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    def callback(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            setattr(ctx.ensure_object(Output), attribute, True)

    return callback


def json_option(help_text: str = "Print one JSON document on stdout.") -> Decorator:
    return click.option(
        "--json", is_flag=True, is_eager=True, expose_value=False, callback=_set("json"), help=help_text
    )


def quiet_option(help_text: str) -> Decorator:
    return click.option(
        "-q",
        "--quiet",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_set("quiet"),
        help=help_text,
    )


def store_path_arguments(paths: tuple[str, ...]) -> list[str]:
    """Base names of store paths given whole (``/nix/store/…``) or as base names. UsageError otherwise."""
    names = []
    for path in paths:
        name, rest = split_store_path(path)
        if rest:
            raise UsageError("a file inside a store path; name the store path", where=path)
        names.append(name)
    return names


def split_store_path(text: str) -> tuple[str, str]:
    """(base name, rest below it) of ``/nix/store/<base name>[/rest]`` or ``<base name>[/rest]``."""
    name, _, rest = text.removeprefix(DEFAULT_STORE_DIR + "/").partition("/")
    try:
        return StorePath.parse(name).basename, rest.strip("/")
    except FormatError as error:
        raise UsageError(error.what, hint=f"such as {DEFAULT_STORE_DIR}/<hash>-<name>") from error


def roots_in(words: Sequence[str]) -> list[str]:
    """Base names of the store paths that a command line's words lie in, and of the program's when it is a link to one."""
    return _store_paths(_IN_STORE.match(word) for word in _with_program(words))


def named_in(words: Sequence[str]) -> list[str]:
    """As ``roots_in``, anywhere in the words: in search paths and scripts, too. Some may not be meant."""
    return _store_paths(match for word in _with_program(words) for match in _IN_STORE.finditer(word))


def _with_program(words: Sequence[str]) -> list[str]:
    return [*words, *(os.path.realpath(program) for program in words[:1] if "/" in program)]


def _store_paths(matches: Iterable[re.Match[str] | None]) -> list[str]:
    found: dict[str, None] = {}
    for match in matches:
        if match is not None:
            with contextlib.suppress(FormatError):
                found[StorePath.parse(match[1]).basename] = None
    return list(found)
