"""``veneer daemon``: serve one cache directory in the foreground."""

from __future__ import annotations

import click

from veneer.cli.config import Flags
from veneer.cli.options import json_option, settings_flags
from veneer.cli.output import Output


@click.command()
@settings_flags(max_size=True)
@click.option("--shared", is_flag=True, help="Let other users connect and read; they cannot choose sources.")
@json_option("Errors as JSON.")
@click.pass_obj
def daemon(output: Output, flags: Flags, shared: bool) -> None:
    """Serve one cache directory in the foreground.

    The sources and keys given here are those of clients that bring none. Ends on SIGTERM and SIGINT. Without a daemon,
    every command starts a private one, which ends with its last client.

    \b
    Example:
      veneer daemon --cache-dir /var/cache/veneer --max-size 100G --shared
    """
    from veneer.cli.config import load_settings
    from veneer.cli.private_daemon import make_cache_dir
    from veneer.daemon.run import DaemonSettings, run_daemon
    from veneer.store.views import ViewConfig

    settings = load_settings(flags)
    make_cache_dir(settings.cache_dir)
    run_daemon(
        DaemonSettings(
            settings.cache_dir,
            settings.max_bytes,
            shared=shared,
            default_view=ViewConfig.from_json(settings.view()),
            ready=lambda: output.note(f"serving {settings.cache_dir}"),
        )
    )
