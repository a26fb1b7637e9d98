"""nginx on a loopback port, as any user, with its own configuration, logs and temporary files.

Standard library only. The program is the machine's, or Debian's (fetched without root).
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.debian import fetch_program
from tests.support.places import own_directory

_MARK = "/.requests-up-to-here"
_CONFIGURATION = """\
daemon off;
{processes}
pid {home}/nginx.pid;
error_log {home}/error.log warn;
{user}
events {{ worker_connections 2048; }}
http {{
  client_body_temp_path {home}/temporary; proxy_temp_path {home}/temporary; fastcgi_temp_path {home}/temporary;
  uwsgi_temp_path {home}/temporary; scgi_temp_path {home}/temporary;
  log_format counted escape=json '{{"method":"$request_method","path":"$uri","status":$status,"bytes":$body_bytes_sent,"range":"$http_range"}}';
  access_log {home}/access.log counted;
  default_type application/octet-stream;
  sendfile on; tcp_nopush on; tcp_nodelay on;
  keepalive_requests 1000000; keepalive_timeout 60s;
  {limits}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    root "{root}";
    location = {mark} {{ return 204; }}
    {extra}
  }}
}}
"""


class NginxError(Exception):
    """nginx does not start; the text has its error log."""


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the access log. ``bytes`` are of the body as sent; ``range`` is the request's header or ""."""

    method: str
    path: str
    status: int
    bytes: int
    range: str


def find_nginx() -> Path:
    """The machine's nginx, else Debian's (4 s, 10 MB on the first call)."""
    found = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if found:
        return Path(found)
    return (
        fetch_program(own_directory() / "nginx", "bookworm", ["nginx"], ["usr/sbin/nginx"]) / "usr/sbin/nginx"
    )


class Nginx:
    """One server for one directory. A context manager; ``stop`` and ``start`` keep the port and the log.

    ``bytes_per_second`` limits each connection's body. ``workers`` > 0 starts that many processes below a master
    (benchmarks); 0 is one process, whose log is in order (tests). ``extra`` are more lines of the server block.
    """

    def __init__(
        self,
        program: Path,
        home: Path,
        root: Path,
        *,
        bytes_per_second: int | None = None,
        workers: int = 0,
        extra: str = "",
    ) -> None:
        self.root = root
        self.home = home
        self.port = _free_port()
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._skipped = 0
        self._has_run = False
        self._parts = {
            "processes": f"worker_processes {workers};" if workers else "master_process off;",
            "user": "user root;" if workers and os.geteuid() == 0 else "",
            "limits": f"limit_rate {bytes_per_second};" if bytes_per_second else "",
            "extra": extra,
        }
        (home / "temporary").mkdir(parents=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns when connections are accepted. NginxError otherwise."""
        configuration = self.home / "nginx.conf"
        for _ in range(20):
            parts = dict(home=self.home, root=self.root, port=self.port, mark=_MARK, **self._parts)
            configuration.write_text(_CONFIGURATION.format(**parts))
            command: list[str | Path] = [
                self._program,
                "-p",
                f"{self.home}/",
                "-e",
                self.home / "error.log",
                "-c",
                configuration,
            ]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if self._is_up():
                self._has_run = True
                return
            if self._has_run:
                break  # keep the port
            self.port = _free_port()  # somebody was faster
        raise NginxError((self.home / "error.log").read_text()[-2000:])

    def _is_up(self) -> bool:
        assert self._process is not None
        for _ in range(500):
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
            except OSError:
                pass
            else:
                return self._process.poll() is None
            try:
                self._process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
            return False
        self.stop()
        return False

    def stop(self) -> None:
        """Connections are refused and broken from now on. May be called twice."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
            self._process = None

    def requests(self) -> list[Request]:
        """Requests that were answered since the start or ``forget``, in order. The server must run."""
        # One connection is served in order: when the second answer comes, the first is in the log, and all before it.
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        for _ in range(2):
            connection.request("GET", _MARK)
            connection.getresponse().read()
        connection.close()
        lines = (self.home / "access.log").read_text().splitlines()[self._skipped :]
        requests = [Request(**json.loads(line)) for line in lines]
        return [request for request in requests if request.path != _MARK]

    def forget(self) -> None:
        """Count from here."""
        self.requests()
        self._skipped = len((self.home / "access.log").read_text().splitlines())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def nar_requests(requests: Iterable[Request]) -> list[Request]:
    """Those that asked for content."""
    return [request for request in requests if request.path.startswith("/nar/")]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
