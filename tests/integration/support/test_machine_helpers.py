"""nginx, the other user and the watch over leftovers do what tests rely on."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.leftovers import MARK, leftovers, look_before
from tests.support.nginx import Nginx
from tests.support.users import USER_ID, OtherUser


@pytest.mark.nginx
def test_nginx_counts_requests_and_comes_back_on_its_port(
    tmp_path: Path, nginx: Callable[..., Nginx]
) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1000)
    server = nginx(tmp_path)
    for _ in range(50):
        urllib.request.urlopen(f"{server.url}/file").read()
    request = urllib.request.Request(f"{server.url}/file", headers={"Range": "bytes=1-2"})
    assert urllib.request.urlopen(request).read() == b"xx"
    seen = server.requests()
    assert len(seen) == 51
    assert (seen[-1].path, seen[-1].status, seen[-1].bytes, seen[-1].range) == ("/file", 206, 2, "bytes=1-2")
    server.forget()
    server.stop()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{server.url}/file")
    server.start()
    assert urllib.request.urlopen(f"{server.url}/file").read() == b"x" * 1000
    assert len(server.requests()) == 1


@pytest.mark.nginx
def test_nginx_with_workers_serves_too(tmp_path: Path, nginx: Callable[..., Nginx]) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert urllib.request.urlopen(f"{nginx(tmp_path, workers=2).url}/file").read() == b"x"


def test_other_user_has_no_rights_and_may_open_fuse(as_user: OtherUser) -> None:
    script = (
        "import os, veneer; os.close(os.open('/dev/fuse', os.O_RDWR)); print(os.getuid(), os.getgroups())"
    )
    done = as_user.run(as_user.python, "-c", script)
    assert done.stderr == ""
    expected = USER_ID if os.geteuid() == 0 else os.geteuid()
    assert done.stdout.split()[0] == str(expected)
    status = as_user.run("grep", "CapEff", "/proc/self/status").stdout
    assert int(status.split()[1], 16) == 0
    assert as_user.run("touch", "mine").returncode == 0
    assert as_user.run("touch", "/usr/not-mine").returncode != 0


def test_a_process_left_behind_is_seen_and_one_that_ends_is_not() -> None:
    before = look_before("of-this-test")

    def processes(patience: float) -> list[str]:
        """Other tests, which run beside this one, may mount something meanwhile."""
        return [line for line in leftovers(before, patience) if line.startswith("process")]

    environment = dict(os.environ, **{MARK: "of-this-test"})
    ending = subprocess.Popen([sys.executable, "-c", "pass"], env=environment)
    assert processes(20) == []
    assert ending.wait() == 0
    # It has to say something first: the environment of a process shows in /proc only some time after its start.
    command = ["sh", "-c", "echo; read line"]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as staying:
        assert staying.stdout is not None
        assert staying.stdout.readline() == b"\n"
        assert processes(0) == [f"process {staying.pid} still runs: sh -c echo; read line "]
