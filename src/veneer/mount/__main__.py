"""``python -m veneer.mount``: the mount server as a process, started by whoever mounted.

    --fuse-fd N      /dev/fuse, mounted already or about to be
    --cache-fd N     the cache directory
    --view-file F    JSON of the view; without it, the daemon's default
    --report-fd N    where the report goes, as one line of JSON, at the end
    --miss-seconds S how long a read waits for the daemon at most
    --max-parked N   how many requests may wait for it
    --session-fd N   a pipe for the session, as one line of JSON, before the first request is answered
    --session JSON   what a predecessor wrote there: go on with the mount that it left
    --owner-fd N     a pipe that ends with whoever mounted; then
    --mounted-on DIR is unmounted, for the owner was killed and cannot do it

and for a server that takes over from one of another version:

    --formats JSON   what that one has in common with its successors
    --ready-fd N     where it is told that this one could serve; from then on
    --stderr-fd N    is standard error
    --go-fd N        a pipe: serve once there is a byte in it, end at its end

Ends with 0 when unmounted or on SIGTERM. It ignores SIGINT and SIGHUP: those are meant for the command in the
environment, which still reads files while it handles them.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable

from veneer.model.errors import UsageError, VeneerError

from . import device
from .misses import MAX_PARKED, MISS_SECONDS
from .server import MountServer
from .session import Session

_OPTIONS = (
    "--fuse-fd",
    "--cache-fd",
    "--view-file",
    "--report-fd",
    "--miss-seconds",
    "--max-parked",
    "--owner-fd",
    "--session-fd",
    "--session",
    "--mounted-on",
    "--threads",
    "--formats",
    "--ready-fd",
    "--stderr-fd",
    "--go-fd",
)


def main(arguments: list[str]) -> int:
    """The process's exit status. Options are taken apart by hand: argparse and json cost 20 ms at the start."""
    try:
        options = _parse(arguments)
        view = None
        if "--view-file" in options:
            import json

            with open(options["--view-file"], "rb") as file:
                view = json.load(file)
        session, agreed = _succession(options)
        server = MountServer(
            int(options["--fuse-fd"]),
            int(options["--cache-fd"]),
            view,
            threads=int(options.get("--threads", "2")),
            miss_seconds=float(options.get("--miss-seconds", MISS_SECONDS)),
            max_parked=int(options.get("--max-parked", MAX_PARKED)),
            session=session,
            agreed=agreed,
        )
        if "--ready-fd" in options and not _may_begin(options):
            return 0
    except VeneerError as error:
        sys.stderr.write(f"veneer mount: {error}\n")
        return error.exit_code
    except (OSError, ValueError, KeyError) as error:
        sys.stderr.write(f"veneer mount: {type(error).__name__}: {error}\n")
        return UsageError.exit_code
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    if "--owner-fd" in options:
        watch = (int(options["--owner-fd"]), options["--mounted-on"], server)
        threading.Thread(target=_end_with_owner, args=watch, name="owner", daemon=True).start()
    try:
        server.run()
    finally:
        if "--report-fd" in options:
            import json

            with os.fdopen(int(options["--report-fd"]), "wb") as out:
                out.write(json.dumps(server.report()).encode() + b"\n")
    return 0


def _succession(options: dict[str, str]) -> tuple[Session | None, Callable[[Session], None] | None]:
    session, agreed = None, None
    if "--session" in options:
        import json

        session = Session.from_json(json.loads(options["--session"]))
    if "--session-fd" in options:
        from . import succession

        agreed = functools.partial(succession.tell, int(options["--session-fd"]))
    return session, agreed


def _may_begin(options: dict[str, str]) -> bool:
    """Waits for that. FormatError: the server before is of a version that this one cannot follow."""
    import json

    from . import succession

    succession.check_formats(json.loads(options["--formats"]))
    os.dup2(int(options["--stderr-fd"]), 2)
    ready = int(options["--ready-fd"])
    os.write(ready, succession.READY)
    os.close(ready)
    return bool(os.read(int(options["--go-fd"]), 1))


def _end_with_owner(owner: int, target: str, server: MountServer) -> None:
    os.read(owner, 1)
    try:
        device.umount(target, detach=True)
    except VeneerError as error:
        sys.stderr.write(f"veneer mount: {error}\n")
    server.stop()


def _parse(arguments: list[str]) -> dict[str, str]:
    options = {}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in _OPTIONS:
            raise UsageError(f"unknown option {name}")
        options[name] = value if equals else next(words, "")
    return options


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads in read(2) on the device cannot be woken, and need nothing any more
