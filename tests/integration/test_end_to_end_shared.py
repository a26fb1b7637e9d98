"""One daemon for several users, and a mount whose daemon was killed."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.integration.test_end_to_end_trees import Serve
from tests.support.callers import Caller, eventually
from tests.support.nginx import nar_requests
from tests.support.sample import SampleStore

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.nix, pytest.mark.nginx]


def as_guest(guest: Caller, host: Caller, *words: str) -> subprocess.CompletedProcess[str]:
    """``veneer run`` of ``guest`` on the cache directory of ``host``."""
    line = guest.words("run", *words)
    line[line.index("--cache-dir") + 1] = str(host.cache)
    return subprocess.run(line, env=guest.environment, cwd="/", capture_output=True, text=True, timeout=60)


def test_another_user_reads_through_a_shared_daemon_but_may_not_choose_its_sources(
    as_root: Caller, unprivileged: Caller, nix_cache: SampleStore, nginx: Serve
) -> None:
    server = nginx(nix_cache.cache("zstd"))
    as_root.use(server.url, key=nix_cache.public)
    as_root.home.chmod(0o755)
    note = nix_cache.paths["note"]
    daemon = as_root.popen(as_root.words("daemon", "--shared"), stdin=subprocess.DEVNULL)
    with daemon:
        try:
            eventually((as_root.cache / "daemon.sock").exists)
            for _ in range(2):
                done = as_guest(unprivileged, as_root, "--", "cat", note)
                assert done.returncode == 0, done.stderr
                assert len(done.stdout) == 7
            assert len(nar_requests(server.requests())) == 1
            assert "closure" in done.stderr
            unprivileged.use(server.url)
            refused = as_guest(unprivileged, as_root, "--", "true")
            assert refused.returncode == 125
            assert "may not choose sources" in refused.stderr
        finally:
            daemon.terminate()
            daemon.communicate(timeout=20)


def test_a_mount_whose_daemon_was_killed_gets_another(
    as_root: Caller, nix_cache: SampleStore, nginx: Serve
) -> None:
    as_root.use(nginx(nix_cache.cache("zstd")).url, key=nix_cache.public)
    target = as_root.home / "mnt"
    with as_root.mount_probe(target) as probe:

        def inside(name: str) -> str:
            return str(target / nix_cache.basename(name))

        assert probe.ask("read", path=inside("note"))["size"] == 7
        os.kill(as_root.daemon_pid(), signal.SIGKILL)
        answer = probe.ask("read", path=inside("hello"))
        assert "error" not in answer
        assert answer["seconds"] < 15
