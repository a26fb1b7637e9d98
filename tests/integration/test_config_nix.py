"""What ``veneer config nix`` prints, followed word by word: real Nix then builds on top of what the cache has."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support.callers import Caller
from tests.support.debian import DebianError
from tests.support.nix import fetch_nix
from tests.support.places import NoPlaceError
from tests.support.sample import SampleStore

pytestmark = [pytest.mark.nix, pytest.mark.root, pytest.mark.fuse]
SECONDS = 120

# In a mount namespace of its own. $1: what was printed; $2: a directory; $3: the settings that only this machine needs; $4: what
# to do in the end. "veneer" is in PATH. Two of the commands go on running, so each is awaited by what it says.
FOLLOW = r"""
set -eu
printed=$1 home=$2
mount --make-rprivate /
mkdir "$home/conf"
printf '%s\n' "$3" > "$home/conf/nix.conf"
cat "$printed" >> "$home/conf/nix.conf"
grep '^#   ' "$printed" | sed 's/^#   //' > "$home/commands"
started=
finish() { for pid in $started; do kill $pid 2>/dev/null && wait $pid || :; done; }
trap finish EXIT
while read -r command <&9; do
  case $command in
    'veneer daemon'*|'veneer mount'*)
      rm -f "$home/note"
      mkfifo "$home/note"
      sh -c "exec $command" 2> "$home/note" < /dev/null &
      started="$! $started"
      exec 8< "$home/note"
      read -r line <&8
      case $line in *serving*|*"mounted on"*) ;; *) echo "$line" >&2; cat <&8 >&2; exit 1 ;; esac ;;
    *) sh -euc "$command" ;;
  esac
done 9< "$home/commands"
sh -euc "$4"
tail -n 1 "$home/commands" | sed 's/.* //' | xargs umount
"""

EXPRESSION = """
derivation {{
  name = "on-top";
  system = builtins.currentSystem;
  builder = "/bin/sh";
  args = [ "-c" "cat $below/deep/er/than/most/file > $out; echo $below >> $out" ];
  below = builtins.storePath {path};
  PATH = "/usr/bin:/bin";
}}
"""
ACT = """
nix-build on-top.nix -o result > out
nix path-info -r $(cat out) > /dev/null
nix-store -q --references $(cat out)
nix store info 2>&1
nix-store --verify
nix-store --gc > /dev/null
veneer doctor {options} > doctor || {{ cat doctor >&2; exit 1; }}
"""


@pytest.mark.parametrize(
    ("suite", "sandbox", "layer"),
    [
        ("trixie", "true", "layer"),
        ("trixie", "false", "layer"),
        ("sid", "true", "layer"),
        ("sid", "false", "layer"),
        ("sid", "true", "environments/mine"),
    ],
)
def test_nix_builds_on_a_cached_path_after_following_the_lines(
    suite: str, sandbox: str, layer: str, as_root: Caller, nix_cache: SampleStore
) -> None:
    try:
        programs = fetch_nix(suite)
    except (DebianError, NoPlaceError) as error:
        pytest.skip(f"Nix of {suite} cannot be fetched: {error}")
    home = as_root.home
    as_root.use(str(nix_cache.cache()), key=nix_cache.public)
    own = as_root.words("config")
    options: list[str | Path] = [
        *own[own.index("config") + 1 :],
        "--mount",
        home / "lower",
        *(["--upper", home / layer / "upper"] if layer == "layer" else ["--name", Path(layer).name]),
    ]
    command = [
        as_root.python,
        "-m",
        "veneer.cli.main",
        "config",
        "nix",
        *options,
        "--merged",
        home / "root/nix/store",
    ]
    printed = subprocess.run(
        command, env=as_root.environment, capture_output=True, text=True, check=True
    ).stdout
    (home / "printed").write_text(printed)
    (home / "on-top.nix").write_text(EXPRESSION.format(path=nix_cache.paths["shapes"]))
    (home / "bin").mkdir()
    (home / "bin/veneer").write_text(f'#!/bin/sh\nexec {as_root.python} -m veneer.cli.main "$@"\n')
    (home / "bin/veneer").chmod(0o755)
    act = ACT.format(options=shlex.join(map(str, own[own.index("config") + 1 :])))
    settings = f"sandbox = {sandbox}\nsandbox-paths = {' '.join(p for p in PLACES if Path(p).exists())}\nsubstituters =\n"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NIX_")}
    given = {
        "HOME": str(home),
        "NIX_CONF_DIR": str(home / "conf"),
        "PATH": f"{home}/bin:{programs}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", FOLLOW, "sh", home / "printed", home, settings, act],
        env=kept | given,
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "local-overlay" in done.stdout
    out = (home / "out").read_text().strip()
    assert nix_cache.paths["shapes"] in done.stdout
    assert (home / layer / "upper" / Path(out).name).read_text() == f"bottom\n{nix_cache.paths['shapes']}\n"


PLACES = ("/bin", "/usr", "/lib", "/lib64")
