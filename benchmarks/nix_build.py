"""How much ``veneer run -- nix-build`` of a cached output takes above Nix's own time.

::

    ./dev bench nix_build [--rounds N] [--suite SUITE]

Nix's own time is ``nix-build`` of the same expression in a chroot store where the output is valid. Veneer's is the whole of
``veneer run -- nix-build``, with a daemon that is up and an environment that is new each time: its database is empty, so
Nix registers the closure too. The expression is evaluated each time; nothing is built, no NAR is fetched.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.support.results import Table, in_turns
from benchmarks.support.stage import BenchError, timed, veneer_command
from tests.support.nginx import Nginx, find_nginx, nar_requests
from tests.support.nix import RealNix, fetch_nix
from tests.support.sample import EXPRESSION, build_sample

EXTRA_SECONDS = 0.5
"""The target: what may come on top of Nix's own time."""
_NIX, _VENEER = "nix-build", "veneer run -- nix-build"
_WORK = "cached output"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--suite", default="trixie", help="Debian's suite that Nix is taken from [trixie]")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="veneer-bench-"))).resolve()
        home.chmod(0o755)
        stack.callback(subprocess.run, ["chmod", "-R", "u+rwX", str(home)])
        nix = RealNix(fetch_nix(options.suite), home / "nix")
        sample = build_sample(nix)
        server = stack.enter_context(Nginx(find_nginx(), home / "nginx", sample.cache()))
        build = [str(nix.programs / "nix-build"), "--no-out-link", str(EXPRESSION), "-A", "several.dev"]
        shared = ["--cache-dir", str(home / "cache"), "--config", str(home / "config.toml")]
        shared += ["--cache", server.url, "--trusted-public-key", sample.public]
        (home / "config.toml").write_text(f'environments-dir = "{home / "environments"}"\n')
        daemon = subprocess.Popen(
            [*veneer_command(), "run", "--quiet", *shared, "--", "sh", "-c", "echo; read end"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert daemon.stdin is not None
        assert daemon.stdout is not None
        stack.callback(daemon.wait, 60)
        stack.callback(daemon.stdin.close)
        daemon.stdout.readline()
        bare = {name: value for name, value in os.environ.items() if not name.startswith("NIX_")}
        bare |= {"NIX_CONF_DIR": str(_configuration(home)), "HOME": str(home)}
        ways: dict[str, Callable[[], float]] = {
            _NIX: lambda: timed(build, env=nix.environment, cwd=home),
            _VENEER: lambda: timed(
                [*veneer_command(), "run", "--quiet", *shared, "--", *build], env=bare, cwd=home
            ),
        }
        for once in ways.values():
            once()  # files are in the page cache from now on, and narinfos in the daemon's index
        table = Table("A build whose output is cached", [_NIX, _VENEER])
        in_turns(options.rounds, ways, lambda way, seconds: table.add(_WORK, way, seconds))
        if nar_requests(server.requests()):
            raise BenchError("NARs were fetched")
    print(table.markdown())
    ours, theirs = table.median(_WORK, _VENEER), table.median(_WORK, _NIX)
    assert ours is not None
    assert theirs is not None
    print(f"above Nix's own time: {ours - theirs:.3f} s (target {EXTRA_SECONDS} s)")
    return 0


def _configuration(home: Path) -> Path:
    directory = home / "conf"
    directory.mkdir()
    (directory / "nix.conf").write_text("substituters =\n")
    return directory


if __name__ == "__main__":
    sys.exit(main())
