"""``veneer daemon``: serve one cache directory in the foreground."""

from __future__ import annotations

import contextlib
import grp
import os
import socket

import click

from veneer.cli.config import Flags
from veneer.cli.options import json_option, settings_flags
from veneer.cli.output import Output
from veneer.model.errors import UsageError


@click.command()
@settings_flags(max_size=True)
@click.option("--shared", is_flag=True, help="Let other users connect and read; they cannot choose sources.")
@click.option("--user", metavar="NAME", help="Become this user first; for root, who starts it as a service.")
@click.option(
    "--group",
    metavar="NAME",
    help="With --shared: members of this group may control the daemon, and choose sources that it then reads with its rights.",
)
@json_option("Errors as JSON.")
@click.pass_obj
def daemon(output: Output, flags: Flags, shared: bool, user: str | None, group: str | None) -> None:
    """Serve one cache directory in the foreground.

    The sources and keys given here are those of clients that bring none. Ends on SIGTERM and SIGINT. Without a daemon,
    every command starts a private one, which ends with its last client.

    \b
    Example:
      veneer daemon --cache-dir /var/cache/veneer --max-size 100G --shared
    """
    from veneer.cli.config import load_settings
    from veneer.cli.limits import store_limits
    from veneer.cli.private_daemon import make_cache_dir
    from veneer.daemon.privileges import become, renounce
    from veneer.daemon.run import DaemonSettings, run_daemon
    from veneer.daemon.worker import ANSWER_SECONDS
    from veneer.store.views import ViewConfig

    settings = load_settings(flags)
    control_group = _group_id(group) if group is not None else None
    if group is not None and not shared:
        raise UsageError("--group needs --shared", hint="without --shared only its own user and root connect")
    make_cache_dir(settings.cache_dir)
    if user is not None:
        become(user, settings.cache_dir)
    renounce()

    def ready() -> None:
        _tell_service_manager("READY=1")
        output.note(f"serving {settings.cache_dir}")

    run_daemon(
        DaemonSettings(
            settings.cache_dir,
            settings.max_bytes,
            shared=shared,
            default_view=ViewConfig.from_json(settings.view()),
            limits=store_limits(settings.limits),
            answer_seconds=settings.limits.get("answer-seconds", ANSWER_SECONDS),
            ready=ready,
            control_group=control_group,
        )
    )


def _group_id(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise UsageError(f"there is no group {name!r}") from None


def _tell_service_manager(state: str) -> None:
    """sd_notify(3), where systemd started us with Type=notify."""
    name = os.environ.get("NOTIFY_SOCKET", "")
    if name:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, contextlib.suppress(OSError):
            manager.sendto(state.encode(), "\0" + name[1:] if name.startswith("@") else name)
