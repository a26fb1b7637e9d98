"""Fixtures and marks of all tests. What a test needs and the machine lacks is a skip that says what is missing.

Real Nix and nginx are fetched from Debian when the first test asks for them; without a network that is a failure,
unless ``VENEER_OFFLINE`` is set: then it is a skip.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.debian import DebianError
from tests.support.faulty_http import FaultyServer
from tests.support.leftovers import MARK, Before, leftovers, look_before
from tests.support.nginx import Nginx, find_nginx
from tests.support.nix import RealNix, fetch_nix, missing_for_builds
from tests.support.places import NoPlaceError
from tests.support.sample import SampleStore, build_sample
from tests.support.users import OtherUser, other_user

_LINUX = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))


_before = pytest.StashKey[Before]()


def pytest_configure(config: pytest.Config) -> None:
    """A run in the background (``nohup``, a shell's ``&``) ignores signals, and all that tests start would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    is_worker = hasattr(config, "workerinput")
    if not is_worker:  # the one process that outlives those, or runs the tests itself
        os.environ[MARK] = secrets.token_hex(8)
        config.stash[_before] = look_before(os.environ[MARK])


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the session when tests left processes, mounts or a /nix on the machine."""
    before = session.config.stash.get(_before, None)
    found = leftovers(before) if before else []
    if found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        assert reporter is not None
        reporter.write_line("\n".join(["", "tests left behind:", *found]), red=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Marks say what a test needs."""
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs root")
    if item.get_closest_marker("fuse") and not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs a /dev/fuse that this user may open")
    if item.get_closest_marker("hand_over") and _LINUX < (6, 9):
        pytest.skip("needs Linux 6.9 (FUSE_NOTIFY_RESEND)")


@pytest.fixture(scope="session")
def open_directory() -> Iterator[Path]:
    """A temporary directory that other users may enter (pytest's own may not)."""
    directory = Path(tempfile.mkdtemp(prefix="veneer-tests-")).resolve()
    directory.chmod(0o755)
    yield directory
    subprocess.run(["chmod", "-R", "u+rwX", directory], check=True)  # Nix's stores are read-only
    shutil.rmtree(directory)


def _unavailable(what: str, error: Exception) -> None:
    if os.environ.get("VENEER_OFFLINE"):
        pytest.skip(f"{what} cannot be fetched (VENEER_OFFLINE is set): {error}")
    pytest.fail(f"{what} cannot be fetched: {error}\nset VENEER_OFFLINE=1 to skip such tests", pytrace=False)


@pytest.fixture(scope="session")
def nix_programs() -> Path:
    """The directory of real Nix's programs, 2.26."""
    try:
        return fetch_nix()
    except (DebianError, NoPlaceError) as error:
        _unavailable("Nix", error)
        raise


@pytest.fixture(scope="session")
def make_real_nix(nix_programs: Path, open_directory: Path) -> Callable[[str], RealNix]:
    """Makes real Nix with a new, empty store; the name must be new in the session."""

    def make(name: str) -> RealNix:
        reason = missing_for_builds()
        if reason:
            pytest.skip(reason)
        return RealNix(nix_programs, open_directory / f"nix-{name}")

    return make


@pytest.fixture
def real_nix(make_real_nix: Callable[[str], RealNix]) -> RealNix:
    """Real Nix with an empty store of this test's own."""
    return make_real_nix(secrets.token_hex(4))


@pytest.fixture(scope="session")
def nix_cache(make_real_nix: Callable[[str], RealNix]) -> SampleStore:
    """The sample store, its binary caches in every flavour (``.cache(…)``) and the truth to compare with. Read only."""
    return build_sample(make_real_nix("sample"))


@pytest.fixture(scope="session")
def nginx_program() -> Path:
    try:
        return find_nginx()
    except (DebianError, NoPlaceError) as error:
        _unavailable("nginx", error)
        raise


@pytest.fixture
def nginx(nginx_program: Path, open_directory: Path) -> Iterator[Callable[..., Nginx]]:
    """``nginx(directory, bytes_per_second=None, …)``: a running server; all are stopped after the test."""
    servers = []

    def serve(root: Path, **options: Any) -> Nginx:
        home = open_directory / f"nginx-{secrets.token_hex(4)}"
        server = Nginx(nginx_program, home, root, **options)
        servers.append(server)
        server.start()
        return server

    yield serve
    for server in servers:
        server.stop()


@pytest.fixture
def faulty_http() -> Iterator[Callable[[Path], FaultyServer]]:
    """``faulty_http(directory)``: a server that fails as told; all are closed after the test."""
    servers = []

    def serve(root: Path) -> FaultyServer:
        servers.append(FaultyServer(root))
        return servers[-1]

    yield serve
    for server in servers:
        server.close()


@pytest.fixture
def as_user(open_directory: Path) -> OtherUser:
    """An ordinary user with a home directory and a usable /dev/fuse."""
    home = open_directory / f"home-{secrets.token_hex(4)}"
    home.mkdir()
    user = other_user(home)
    if isinstance(user, str):
        pytest.skip(user)
    return user
