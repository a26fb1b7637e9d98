"""``veneer enter``: a further command in an environment that is up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from veneer.cli.config import Flags, Settings
from veneer.cli.options import json_option, quiet_option, settings_flags
from veneer.cli.output import Output
from veneer.model.errors import UsageError

if TYPE_CHECKING:
    from veneer.environment import Living, RunOutcome


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("name", metavar="NAME")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND [ARG...]]")
@settings_flags(sources=False)
@quiet_option("No warnings.")
@json_option("Errors as JSON on stderr; stdout is the command's.")
@click.pass_obj
def enter(output: Output, flags: Flags, name: str, command: tuple[str, ...]) -> int:
    """Run a command in an environment that is up.

    It sees the environment's store, what others write there at the same time, and their processes. Without COMMAND: your
    shell. What COMMAND leaves running stays until the environment ends. The exit status is as with `veneer run`.

    \b
    Examples:
      veneer enter dev
      veneer enter dev -- nix-build -A hello
    """
    from veneer import environment
    from veneer.cli.config import load_settings
    from veneer.cli.run import end_as

    settings = load_settings(flags)
    living = environment.attach(settings.environments_dir, name)
    if living is None:
        exists = (settings.environments_dir / name).is_dir()
        raise UsageError(
            f"the environment {name} is not up" if exists else f"there is no environment {name}",
            where=str(settings.environments_dir),
            hint=f"veneer up {name}, or veneer run --name {name} -- COMMAND",
        )
    words = command[1:] if command[:1] == ("--",) else command  # which ends options before NAME alone
    outcome = join(output, settings, living, shell_or(words), leaves=True)
    return end_as(outcome.status, outcome.signal)


def shell_or(command: Sequence[str]) -> list[str]:
    """The command, or the user's shell."""
    return list(command) or [os.environ.get("SHELL") or "/bin/sh"]


def join(
    output: Output, settings: Settings, living: Living, words: Sequence[str], *, leaves: bool
) -> RunOutcome:
    """Run the words in a living environment."""
    from veneer import environment

    spec = environment.RunSpec(
        command=tuple(words),
        cache_root=settings.cache_dir,
        view=None,
        environments_root=settings.environments_dir,
        miss_seconds=1.0,
        environ=os.environ,
        cwd=str(Path.cwd()),
        name=living.name,
    )
    return environment.join(living, spec, leaves=leaves, warn=output.warning)


def has_sources_of(settings: Settings, living: Living) -> bool:
    """Whether these settings would give an environment the store that the living one has."""
    theirs = dict(living.owner.view or {})
    ours = settings.view()
    return {**theirs, "session": ""} == {**ours, "session": ""}
