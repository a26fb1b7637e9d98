"""``veneer``: dispatch, and what becomes of errors.

Start-up time matters: only click and the asked command's module are imported; ``--help`` of the group reads the one-line
purposes from the table below instead of importing eleven modules.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

import click

from veneer.cli.output import Output
from veneer.model.errors import UsageError, VeneerError

COMMANDS = {
    "run": "Run a command with the whole of your binary caches under /nix/store.",
    "up": "Start an environment that stays until `veneer down`.",
    "enter": "Run a command in an environment that is up.",
    "down": "End an environment and remove what was written to its store.",
    "diff": "List the store paths that exist only in an environment.",
    "upgrade": "Have this version of veneer take over what runs.",
    "demo": "Show the idea on this machine: offline, without Nix, in seconds.",
    "fetch": "Bring store paths into the cache ahead of time.",
    "trace": "Show what a command read.",
    "ls": "List environments, or a store path's files without mounting anything.",
    "cat": "Print a file of a store path without mounting anything.",
    "status": "Show the daemon, its sources, the cache and recent failures.",
    "doctor": "Find what is wrong with the machine, the sources or Nix, and the fix.",
    "config": "Print the lines for your own nix.conf.",
    "publish": "Write store paths into a binary cache that can be read in parts.",
    "mirror": "Write paths of one binary cache into another, to be read in parts.",
    "gc": "Drop cached content that was not used for longest.",
    "cache": "Check everything in the cache, and drop what is not right.",
    "pin": "Keep store paths in the cache, or list what is kept.",
    "unpin": "Let a pinned name go.",
    "mount": "Mount the store on a directory until interrupted.",
    "daemon": "Serve one cache directory in the foreground.",
}
MODULES = {"unpin": "pin", "config": "config_nix"}
RUN_FAILURE = 125
"""Exit code of ``run`` and ``enter`` for failures of our own, as env(1) and timeout(1) have it."""

EPILOG = """\b
Exit codes:
  0  done                            5  a source cannot be reached
  1  general failure                 6  this machine lacks FUSE or user namespaces
  2  wrong usage                     7  the cache cannot be used
  3  no source has it                8  the daemon cannot be reached
  4  not trusted (signature, hash)
`veneer run` and `veneer enter` give the command's own status; 125 for failures of its own, 126 and 127 as a shell does.
"""


class _Commands(click.Group):
    """Commands by name, imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"veneer.cli.{MODULES.get(cmd_name, cmd_name)}")
        command = getattr(module, cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        import veneer

        click.echo(f"veneer {veneer.__version__}")
        ctx.exit()


@click.group(
    cls=_Commands,
    name="veneer",
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
def group() -> None:
    """A whole Nix store at once, loading only what is touched.

    Every store path of your binary caches is there under /nix/store; bytes move when a process reads them.

    \b
    Examples:
      veneer demo
      veneer run --cache https://cache.example.org -- /nix/store/…-hello/bin/hello
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. Errors of ours are printed, never a traceback."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    output = Output()
    is_run = bool(arguments) and arguments[0] in ("run", "enter")
    try:
        code = group.main(args=list(arguments), prog_name="veneer", standalone_mode=False, obj=output)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except VeneerError as error:
        code = RUN_FAILURE if is_run else error.exit_code
        output.error(error, code)
        return code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        output.json = output.json or _asks_json(arguments)
        code = RUN_FAILURE if is_run else error.exit_code
        output.error(UsageError(error.format_message(), hint=_help_hint(error)), code)
        return code
    except BrokenPipeError:
        # Whoever read our output left: as a process killed by SIGPIPE; and nothing may be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (KeyboardInterrupt, click.Abort):
        return 128 + signal.SIGINT


def _asks_json(arguments: Sequence[str]) -> bool:
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in own


def _help_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path} --help" if isinstance(context, click.Context) else "veneer --help"


if __name__ == "__main__":
    sys.exit(main())
