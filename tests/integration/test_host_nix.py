"""A host with a Nix store of its own: what its Nix has is valid inside too, and its garbage collector leaves it alone."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.callers import Caller
from tests.support.nix import fetch_nix
from tests.support.sample import SampleStore

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.nix]

# A root in which $1/nix is /nix; everything else is the machine's.
_HOST = """
new=$1; shift
mkdir "$new/root"
mount -t tmpfs -o mode=755 none "$new/root"
cd "$new/root"
for entry in /* /.[!.]*; do
    name=${entry#/}
    if [ "$name" = nix ]; then continue
    elif [ -L "$entry" ]; then cp -P "$entry" .
    elif [ -d "$entry" ]; then mkdir "$name"; mount --rbind "$entry" "$name"
    elif [ -e "$entry" ]; then : > "$name"; mount --bind "$entry" "$name"
    fi
done
mkdir nix old
mount --bind "$new/nix" nix
pivot_root . old
cd /
umount -l /old
exec "$@"
"""
_CONFIGURATION = """\
experimental-features = nix-command
build-users-group =
sandbox = false
substituters =
fsync-metadata = false
"""


@dataclass
class Host:
    """Root on a machine whose /nix is a copy of the sample store; a cache that has nothing."""

    caller: Caller
    sample: SampleStore

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        return self.caller.veneer("run", "--", "bash", "-euc", script, timeout=120)

    def collect(self, process: subprocess.Popen[str]) -> None:
        """The host's own garbage collector, on the machine of ``process``."""
        command = ["nsenter", f"--mount=/proc/{process.pid}/ns/mnt", "nix-store", "--gc"]
        subprocess.run(command, env=self.caller.environment, cwd="/", check=True, capture_output=True)


@pytest.fixture(params=["trixie", "sid"], ids=["2.26", "2.34"])
def host(request: pytest.FixtureRequest, as_root: Caller, nix_cache: SampleStore) -> Iterator[Host]:
    programs = fetch_nix(request.param)
    copy = as_root.home / "host"
    copy.mkdir()
    subprocess.run(["cp", "-a", nix_cache.nix.store / "nix", copy / "nix"], check=True)
    shutil.rmtree(copy / "nix/var/nix/gcroots/auto", ignore_errors=True)
    conf = as_root.home / "nix-conf"
    conf.mkdir()
    (conf / "nix.conf").write_text(_CONFIGURATION)
    cache = as_root.home / "empty"
    cache.mkdir()
    (cache / "nix-cache-info").write_text("StoreDir: /nix/store\n")
    as_root.prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", _HOST, "sh", str(copy)]
    as_root.environment = {n: v for n, v in as_root.environment.items() if not n.startswith("NIX_")}
    as_root.environment |= {
        "NIX_CONF_DIR": str(conf),
        "HOME": str(as_root.home),
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    as_root.use(f"file://{cache}", key=nix_cache.public)
    yield Host(as_root, nix_cache)
    subprocess.run(["chmod", "-R", "u+rwX", copy], check=True)


def test_paths_of_the_hosts_store_are_valid_inside_and_built_upon(host: Host) -> None:
    path = host.sample.paths["many"]
    file = host.caller.home / f"{secrets.token_hex(4)}.nix"
    file.write_text(
        'derivation { name = "new"; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/usr/bin:/bin";'
        f' args = [ "-euc" "cat ${{builtins.storePath "{path}"}}/1/1.txt > $out" ]; }}'
    )
    done = host.run(
        f"nix-store -qR {host.sample.paths['several.dev']}; cat $(nix-build --no-out-link {file})"
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()[:-1]) == sorted(host.sample.closure("several.dev"))
    assert done.stdout.splitlines()[-1] == "1 1"


def test_the_hosts_garbage_collector_leaves_what_an_environment_was_told_is_valid(host: Host) -> None:
    told, other = host.sample.paths["many"], host.sample.paths["big"]
    script = f"nix-store --check-validity {told}; echo told; read line; cat {told}/2/3.txt"
    process = host.caller.popen(host.caller.words("run", "--", "bash", "-euc", script))
    try:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "told\n"
        host.collect(process)
        store = host.caller.home / "host"
        assert not Path(f"{store}{other}").exists()
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.stdout.readline() == "2 3\n"
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


def test_profiles_of_the_host_are_left_alone(host: Host) -> None:
    """Not even where the user's ~/.nix-profile leads to them: what is installed inside exists only there."""
    file = host.caller.home / f"{secrets.token_hex(4)}.nix"
    file.write_text(
        '{ name }: derivation { inherit name; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/usr/bin:/bin";'
        ' args = [ "-euc" "mkdir $out; echo $name > $out/$name" ]; }'
    )
    install = f"nix-env --quiet -i -f {file} --argstr name"
    words = host.caller.words("run", "--quiet", "--", "bash", "-euc")[len(host.caller.prefix) :]
    # What it collects is another matter: it lists the host's paths too.
    inside = f"{install} inner-1; nix-env -q; nix-collect-garbage -d || true; nix profile list"
    script = f"""
        {install} first-1; {install} second-1
        ls -l /nix/var/nix/profiles/per-user/root | cksum
        {shlex.join([*map(str, words), inside])}
        ls -l /nix/var/nix/profiles/per-user/root | cksum
        cat ~/.nix-profile/first-1
    """
    done = subprocess.run(
        [*host.caller.prefix, "bash", "-euc", script],
        env=host.caller.environment,
        cwd=host.caller.home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    before, installed, *listed, after, first = done.stdout.splitlines()
    assert (before, installed, first) == (after, "inner-1", "first-1"), done.stdout
    assert "inner-1" in " ".join(listed)


def test_collecting_garbage_inside_leaves_the_hosts_paths_alone(host: Host) -> None:
    path = host.sample.paths["many"]
    file = host.caller.home / "new.nix"
    file.write_text(
        'derivation { name = "new"; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/usr/bin:/bin";'
        f' args = [ "-euc" "cat ${{builtins.storePath "{path}"}}/1/1.txt > $out" ]; }}'
    )
    built = f"built=$(nix-build --no-out-link {file})"
    held = f"until test -s /.veneer/state/nix/temproots/1; do :; done; {built}; nix-store --gc"
    done = host.run(f"{held} >&2; test ! -e $built; nix-store --check-validity {path}; cat {path}/1/1.txt")
    assert (done.returncode, done.stdout) == (0, "1 1\n"), done.stderr
    assert "2 store paths deleted" in done.stderr
    assert "BUG" not in done.stderr
