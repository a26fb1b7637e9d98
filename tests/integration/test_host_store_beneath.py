"""A host with a /nix/store of its own, beneath an environment's: its paths need no source."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.test_end_to_end_trees import Serve
from tests.support.callers import Caller
from tests.support.nginx import Nginx
from tests.support.sample import SampleStore

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.nix, pytest.mark.nginx]

# Another host: this one's root directory (mounts only), and in /nix/store what the directory $2 holds.
HOST = """
cd "$1"
mount -t tmpfs -o mode=755 none .; cd "$PWD"
for entry in /* /.[!.]*; do
    name=${entry#/}
    if [ -L "$entry" ]; then cp -P "$entry" .
    elif [ -d "$entry" ]; then mkdir "$name"; mount --rbind "$entry" "$name"
    elif [ -e "$entry" ]; then : > "$name"; mount --bind "$entry" "$name"
    fi
done
mkdir -p nix/store old
mount --bind "$2" nix/store
shift 2
pivot_root . old
cd /
umount -l /old
exec "$@"
"""
OWN = "0123456789abcdfghijklmnpqrsvwxyz-of-the-host"
NOWHERE = "0123456789abcdfghijklmnpqrsvwxyy-nowhere"


class Host:
    """``store``: the host's /nix/store."""

    def __init__(self, caller: Caller, sample: SampleStore, server: Nginx) -> None:
        self.caller, self.sample, self.server = caller, sample, server
        self.store = caller.home / "host-store"
        self.store.mkdir(mode=0o755)
        root = caller.home / "host-root"
        root.mkdir()
        words = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", HOST, "sh"]
        caller.prefix = [*words, str(root), str(self.store), *caller.prefix]
        caller.use(server.url, key=sample.public)

    def add(self, name: str, text: str = "the host's\n") -> None:
        """A path with a file in it; beside it a derivation of the same."""
        path = self.store / name
        (path / "bin").mkdir(parents=True)
        (path / "bin" / "text").write_text(text)
        (self.store / f"{name}.drv").write_text("Derive()\n")

    def asked_for(self, name: str) -> int:
        return sum(request.path.startswith(f"/{name[:32]}") for request in self.server.requests())

    def shell(self, script: str) -> str:
        """Standard output; standard error comes behind it."""
        done = self.caller.veneer("run", "--quiet", "--", "sh", "-c", f"exec 2>&1; {script}")
        return done.stdout


@pytest.fixture
def host(caller: Caller, nix_cache: SampleStore, nginx: Callable[..., Nginx]) -> Host:
    """For root, and for an ordinary user."""
    return Host(caller, nix_cache, nginx(nix_cache.cache()))


def test_paths_of_the_host_are_readable_while_the_source_is_down(host: Host) -> None:
    host.add(OWN)
    (host.store / f"{NOWHERE}.lock").touch()
    note = host.sample.paths["note"]
    assert host.shell(f"cat {note}") == "a note\n"
    host.server.stop()
    script = f"""
        cd /nix/store
        cat {OWN}/bin/text {OWN}.drv {note}; ls {OWN}; test -e {NOWHERE}.lock && echo lock
        cat {NOWHERE}
    """
    lines = host.shell(script).splitlines()
    assert lines[:-1] == ["the host's", "Derive()", "a note", "bin", "lock"]
    assert "Input/output error" in lines[-1]


def test_paths_of_the_host_are_its_own_and_no_source_is_asked(host: Host) -> None:
    shapes = host.sample.basename("shapes")
    host.add(shapes)
    assert host.shell(f"ls /nix/store/{shapes}; cat /nix/store/{shapes}/bin/text") == "bin\nthe host's\n"
    assert host.asked_for(shapes) == 0


def test_a_path_that_the_host_is_still_writing_comes_from_the_source(host: Host) -> None:
    note = host.sample.basename("note")
    (host.store / note).write_text("half a n")
    (host.store / f"{note}.lock").touch()
    assert host.shell(f"cat /nix/store/{note}") == "a note\n"
    (host.store / f"{note}.lock").unlink()
    assert host.shell(f"cat /nix/store/{note}") == "half a n"


def test_an_environment_in_an_environment_asks_its_sources_for_what_the_outer_one_has(
    as_root: Caller, nix_cache: SampleStore, nginx: Serve
) -> None:
    """The outer store is no host's: its sources may take long, and the inner mount server must not wait for it."""
    host = Host(as_root, nix_cache, nginx(nix_cache.cache()))
    note = host.sample.paths["note"]
    report = as_root.home / "report"
    plain = list(as_root.prefix)
    as_root.prefix = []
    inner = as_root.words("run", "--report", report, "--", "cat", note)
    as_root.prefix = plain
    done = as_root.veneer("run", "--", "sh", "-c", 'cat "$1"; shift; exec "$@"', "sh", note, *inner)
    assert done.stdout == "a note\na note\n", done.stderr
    paths = json.loads(report.read_text())["paths"]
    assert [Path(path).name for path in paths] == [Path(note).name]
