"""``python -m veneer.daemon``: the store daemon as a process. Users start it as ``veneer daemon`` or not at all."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from pathlib import Path

from veneer.model.errors import UsageError, VeneerError
from veneer.store.store import Limits
from veneer.store.views import ViewConfig

from .privileges import renounce
from .run import DaemonSettings, run_daemon
from .worker import ANSWER_SECONDS


def main() -> int:
    defaults = Limits()
    parser = argparse.ArgumentParser(prog="veneer.daemon", description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="cache directory")
    parser.add_argument("--max-bytes", type=int, help="evict above this many bytes of content")
    parser.add_argument("--view", type=Path, help="JSON file: the view of clients that bring none")
    parser.add_argument("--shared", action="store_true", help="let other users connect and read")
    parser.add_argument("--exit-when-idle", action="store_true", help="end with the last client")
    parser.add_argument("--ready-fd", type=int, help="a byte is written here when clients may connect")
    parser.add_argument(
        "--client-fd", type=int, help="a connected socket whose other end is the first client"
    )
    parser.add_argument(
        "--nix-socket",
        action="append",
        default=[],
        type=_inherited_socket,
        metavar="NAME=FD",
        help="a listening worker socket, for the session that asks for this name",
    )
    parser.add_argument("--parallel-requests", type=int, default=defaults.parallel_requests)
    parser.add_argument("--parallel-downloads", type=int, default=defaults.parallel_downloads)
    parser.add_argument("--memory", type=int, default=defaults.memory, help="bytes that downloads may hold")
    parser.add_argument("--no-prefetch", action="store_true", help="ask only for what is looked up")
    parser.add_argument(
        "--answer-seconds", type=float, default=ANSWER_SECONDS, help="Nix gets an error after this"
    )
    args = parser.parse_args()

    def ready() -> None:
        if args.ready_fd is not None:
            os.write(args.ready_fd, b"1")
            os.close(args.ready_fd)

    renounce()
    try:
        view = ViewConfig()
        if args.view is not None:
            try:
                view = ViewConfig.from_json(json.loads(args.view.read_bytes()))
            except (OSError, ValueError) as error:
                raise UsageError(f"cannot read the view: {error}", where=str(args.view)) from error
        limits = Limits(
            args.parallel_requests, args.parallel_downloads, prefetch=not args.no_prefetch, memory=args.memory
        )
        run_daemon(
            DaemonSettings(
                args.cache,
                args.max_bytes,
                args.shared,
                args.exit_when_idle,
                view,
                limits,
                ready,
                args.client_fd,
                args.answer_seconds,
                dict(args.nix_socket),
            )
        )
    except VeneerError as error:
        print(f"veneer daemon: {error}", file=sys.stderr)  # noqa: T201 - a program's face
        return error.exit_code
    return 0


def _inherited_socket(text: str) -> tuple[str, socket.socket]:
    name, _, descriptor = text.partition("=")
    inherited = socket.socket(fileno=int(descriptor))
    inherited.setblocking(False)
    return name, inherited


if __name__ == "__main__":
    sys.exit(main())
