"""The daemon's sockets against other users of the machine: what they may ask, and how little they can disturb."""

from __future__ import annotations

import contextlib
import grp
import json
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.callers import Caller, eventually
from tests.support.signed_cache import SignedCache, make_path
from tests.support.users import OtherUser
from tests.support.worker_client import WorkerClient
from veneer.daemon.admission import CONNECTIONS_OF_USER, HELD_OF_USER
from veneer.daemon.worker import CONNECTIONS_OF_USER as NIX_CONNECTIONS_OF_USER
from veneer.formats import worker_wire

pytestmark = [pytest.mark.root, pytest.mark.fuse]

CLIENT = """
import json, socket, struct, sys, time
place, path = sys.argv[1:3]
name = path.rpartition("/")[2]

def frame(kind, request, body, length=None):
    return struct.pack("<IB3xQ", len(body) if length is None else length, kind, request) + body

def connect(name="daemon.sock"):
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(20)
    while True:
        try:
            made.connect(f"{place}/{name}")
            return made
        except BlockingIOError:  # the daemon has not accepted the ones before
            time.sleep(0.01)

def read(made, size):
    data = b""
    while len(data) < size:
        try:
            piece = made.recv(size - len(data))
        except ConnectionResetError:
            piece = b""
        if not piece:
            raise EOFError(data)
        data += piece
    return data

def answer(made):
    while True:
        length, kind, request = struct.unpack("<IB3xQ", read(made, 16))
        body = read(made, length)
        if kind not in (133, 140, 141, 142):
            return kind, body

def hello(view=None):
    made = connect()
    try:
        made.sendall(frame(1, 1, json.dumps({"version": 1, "view": view}).encode()))
    except BrokenPipeError:
        pass  # refused already, and told why
    return made, answer(made)

def control(made, **request):
    made.sendall(frame(7, 2, json.dumps(request).encode()))
    kind, body = answer(made)
    return {"kind": kind, "text": body[4:].decode() if kind == 131 else body.decode()}

def say(**said):
    print(json.dumps(said), flush=True)
"""


class Shared:
    """A shared daemon of root, and the other user's programs that talk to it."""

    def __init__(self, root: Caller, user: OtherUser, path: str) -> None:
        self.root, self.user, self.path = root, user, path

    def words(self, program: str, groups: int | None = None) -> list[str]:
        words = self.user.command(self.user.python, "-c", CLIENT + program, self.root.cache, self.path)
        if groups is not None:
            at = words.index("--clear-groups")
            words[at : at + 1] = ["--groups", str(groups)]
        return words

    def ask(self, program: str, **options: Any) -> Any:
        """What the user's program says, a JSON document."""
        done = subprocess.run(
            self.words(program, **options),
            env=self.user.environment,
            cwd=self.user.home,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    @contextlib.contextmanager
    def busy(self, program: str) -> Iterator[Any]:
        """The user's program, that has said something and goes on until its input ends."""
        process = subprocess.Popen(
            self.words(program + "\nsys.stdin.read()\n"),
            env=self.user.environment,
            cwd=self.user.home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                yield json.loads(process.stdout.readline())
            finally:
                process.stdin.close()
                process.wait(20)

    def still_serves(self) -> None:
        """Root gets answers, and soon."""
        start = time.monotonic()
        assert self.root.status()["pid"]
        assert self.root.veneer("ls", self.path).stdout.split() == ["a-program", "data", "link"]
        assert time.monotonic() - start < 15

    def resident(self) -> int:
        status = Path(f"/proc/{self.root.daemon_pid()}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) << 10


@contextlib.contextmanager
def daemon(caller: Caller, *options: str) -> Iterator[None]:
    process = caller.popen(caller.words("daemon", *options), stdin=subprocess.DEVNULL)
    with process:
        try:
            eventually((caller.cache / "daemon.sock").exists)
            yield
        finally:
            process.terminate()
            process.communicate(timeout=20)


@pytest.fixture
def made(as_root: Caller, open_directory: Path) -> str:
    """The store path that root's sources have."""
    path = make_path("victim")
    cache = SignedCache(open_directory / secrets.token_hex(4), [path])
    as_root.use(f"file://{cache.directory}", key=cache.key)
    as_root.home.chmod(0o755)
    return path.path.absolute()


@pytest.fixture
def shared(as_root: Caller, as_user: OtherUser, made: str) -> Iterator[Shared]:
    with daemon(as_root, "--shared"):
        yield Shared(as_root, as_user, made)


def test_another_user_may_ask_and_never_control(shared: Shared) -> None:
    said = shared.ask("""
made, (kind, _) = hello()
refused = {verb: control(made, do=verb, paths=[name], name="x", max_bytes=0) for verb in
    ("status", "fetch", "gc", "verify", "pin", "unpin", "pins", "remembered", "nix-socket", "stop", "", "no-such")}
allowed = {verb: control(made, do=verb, paths=[name], path=name) for verb in ("closure", "report", "tree", "content")}
views = [hello(view)[1] for view in
    ({"sources": [{"url": "file:///etc"}]}, {"keys": []}, {"require_signatures": False}, {"netrc": "/etc/shadow"}, [], "x", 7)]
say(kind=kind, refused=refused, allowed=allowed, views=[[kind, body[4:].decode()] for kind, body in views])
""")
    assert said["kind"] == 129 - 1
    for verb, answer in said["refused"].items():
        assert answer["kind"] == 131, verb
        assert "may control it" in answer["text"], verb
    assert {answer["kind"] for answer in said["allowed"].values()} == {134}, said["allowed"]
    for kind, text in said["views"]:
        assert kind == 131
        assert "may not choose sources" in text
    shared.still_serves()


def test_members_of_the_configured_group_may_control(as_root: Caller, as_user: OtherUser, made: str) -> None:
    group = min(each for each in grp.getgrall() if each.gr_gid not in (0, 12345))
    with daemon(as_root, "--shared", "--group", group.gr_name):
        shared = Shared(as_root, as_user, made)
        program = "made, _ = hello()\nsay(**control(made, do='status'))"
        assert shared.ask(program, groups=group.gr_gid)["kind"] == 134
        assert "may control it" in shared.ask(program)["text"]


def test_a_daemon_that_is_not_shared_lets_no_other_user_connect(
    as_root: Caller, as_user: OtherUser, made: str
) -> None:
    with daemon(as_root):
        as_root.cache.chmod(0o755)  # the socket's own mode refuses, too
        said = Shared(as_root, as_user, made).ask("""
found = []
for socket_name in ("daemon.sock", "nix.sock"):
    try:
        connect(socket_name)
    except OSError as error:
        found.append(type(error).__name__)
say(found=found)
""")
    assert said["found"] == ["PermissionError", "PermissionError"]


def test_idle_connections_of_a_user_are_bounded_and_disturb_nobody(shared: Shared) -> None:
    with shared.busy("""
greeted, refused = [], []
for _ in range(400):
    made, (kind, body) = hello()
    (greeted if kind == 128 else refused).append(made)
    text = body[4:].decode()
say(greeted=len(greeted), refused=len(refused), text=text)
""") as said:
        assert said["greeted"] == CONNECTIONS_OF_USER
        assert said["refused"] == 400 - CONNECTIONS_OF_USER
        assert "no room for another connection" in said["text"]
        shared.still_serves()
    again = "made, (kind, _) = hello()\nsay(kind=kind)"
    eventually(lambda: shared.ask(again)["kind"] == 128)


def test_silent_connections_are_bounded_and_ended(shared: Shared) -> None:
    with shared.busy("""
silent = [connect() for _ in range(300)]
say(ready=True)
ended = 0
for made in silent:
    try:
        while made.recv(1000):
            pass
    except ConnectionResetError:
        pass
    ended += 1
""") as said:
        assert said["ready"]
        shared.still_serves()
        # after HELLO_SECONDS nobody who never spoke is left
        eventually(lambda: shared.ask("made, (kind, _) = hello()\nsay(kind=kind)")["kind"] == 128, 30)


def test_malformed_messages_end_only_their_own_connection(shared: Shared) -> None:
    said = shared.ask("""
steady, _ = hello()
first = [b"GET / HTTP/1.1\\r\\n\\r\\n" * 9, b"\\xff" * 64, bytes(64), frame(1, 1, b"not json"), frame(1, 1, b"[]"),
    frame(1, 1, b"[" * 100000), frame(1, 1, b'{"version": 2, "view": null}'), frame(1, 1, b'{"version": 1}'),
    frame(7, 1, b"{}"), frame(99, 1, b""), frame(1, 1, b"", 16 << 20), frame(1, 1, b"", 0xffffffff),
    frame(2, 1, b"no hello"), frame(128, 1, b"{}"), b"\\x1b]0;owned\\x07" * 20]
later = [frame(99, 2, b""), frame(7, 2, b"", 0xffffffff), frame(4, 2, b"short"), frame(6, 2, b"x" * 15), frame(1, 2, b"{}")]
answered = [frame(7, 2, b"not json"), frame(7, 2, b"[" * 100000), frame(7, 2, b"[]"), frame(7, 2, b'{"do": {"a": 1}}'),
    frame(7, 2, b'{"do": "closure", "paths": [["deep"], 7, null]}'), frame(7, 2, b'{"do": "tree", "path": "../../etc/passwd"}'),
    frame(2, 2, b"../../../etc/passwd"), frame(2, 2, b"\\x1b[31m" * 99), frame(2, 2, b"\\0" * 99), frame(3, 2, b"\\xff" * 8),
    frame(4, 2, b"\\xff" * 24), frame(134, 2, b"{}")]
ends = []
for said in first + later + answered:
    if said in first:
        made = connect()
    else:
        made, _ = hello()
    try:
        made.sendall(said)
        kind, body = answer(made)
        ends.append([kind, body[4:].decode()])
    except (EOFError, ConnectionError, BrokenPipeError) as error:
        ends.append([0, type(error).__name__])
say(ends=ends, steady=control(steady, do="closure", paths=[name])["kind"], counts=[len(first), len(later), len(answered)])
""")
    assert said["steady"] == 134
    first, later, _ = said["counts"]
    for kind, text in said["ends"]:
        assert kind in (0, 130, 131), (kind, text)
        assert "Error:" not in text, text  # no bug of ours: every refusal has words
    assert all(kind for kind, _ in said["ends"][first + later :])
    shared.still_serves()
    stories = shared.root.stories()
    assert "\x1b" not in stories


def test_huge_and_slow_messages_are_bounded_in_memory(shared: Shared) -> None:
    shared.still_serves()
    before = shared.resident()
    with shared.busy("""
import threading
made = [hello()[0] for _ in range(60)]
part = b" " * (4 << 20)
refused = []
def send(each):
    try:
        each.sendall(frame(7, 2, part, 16 << 20))
        each.sendall(part * 2)
    except OSError:
        pass
    try:
        each.settimeout(5)
        refused.append(answer(each)[1][4:].decode())
    except (OSError, EOFError):
        pass
threads = [threading.Thread(target=send, args=(each,)) for each in made]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
say(refused=refused)
""") as said:
        assert len(said["refused"]) >= 50
        assert all("too many" in text for text in said["refused"])
        shared.still_serves()
        assert shared.resident() - before < 3 * HELD_OF_USER


def test_answers_that_nobody_takes_are_bounded_in_memory(shared: Shared) -> None:
    shared.still_serves()
    before = shared.resident()
    with shared.busy("""
made = [hello()[0] for _ in range(30)]
question = frame(7, 2, json.dumps({"do": "closure", "paths": [name], "alone": True}).encode())
sent = 0
for each in made:
    each.setblocking(False)
    try:
        for _ in range(5000):
            sent += each.send(question)
    except BlockingIOError:
        pass
say(sent=sent)
""") as said:
        assert said["sent"] > 30 * 4096
        shared.still_serves()
        assert shared.resident() - before < 2 * HELD_OF_USER


def test_a_nix_client_of_another_user_may_read_and_never_write(shared: Shared) -> None:
    shared.still_serves()
    said = shared.ask("""
sys.path[:0] = [entry for entry in sys.path if entry]
from veneer.formats import worker_wire as wire
def greeted():
    made = connect("nix.sock")
    try:
        made.sendall(wire.encode((wire.CLIENT_MAGIC, 0x125, 0, 0)))
    except BrokenPipeError:  # refused before it was read: what was said is there all the same
        pass
    head = read(made, 16)
    if head[:8] != wire.encode((wire.SERVER_MAGIC,)):
        raise EOFError(head + made.recv(1000))
    size, = struct.unpack("<Q", read(made, 8))
    read(made, size + -size % 8 + 16)
    return made
answers = {}
for number in [*range(1, 48)]:
    if number in wire.OPERATIONS:
        continue
    made = greeted()
    made.sendall(wire.encode((number, path, 1, 1)))
    answers[number] = made.recv(65536).decode("latin-1")
made = greeted()
made.sendall(wire.encode((1, path)))
kept = []
try:
    while len(kept) < 200:
        kept.append(greeted())
except EOFError as error:
    refusal = error.args[0].decode()
say(answers=answers, valid=struct.unpack("<2Q", read(made, 16))[1], kept=len(kept), refusal=refusal)
""")
    assert said["valid"] == 1
    assert len(said["answers"]) >= 30
    for number, text in said["answers"].items():
        assert "can only be read" in text, number
    assert said["kept"] + 1 <= NIX_CONNECTIONS_OF_USER
    assert said["refusal"].startswith("veneer: too many connections")
    with WorkerClient(shared.root.cache / "nix.sock") as nix:
        assert nix.ask(worker_wire.IS_VALID_PATH, shared.path) == [1]


def test_a_daemon_started_by_root_runs_as_the_named_user(as_root: Caller, made: str) -> None:
    as_root.home.chmod(0o755)
    for parent in as_root.home.parents:
        assert parent.stat().st_mode & 0o001, f"others may not enter {parent}"
    with daemon(as_root, "--shared", "--user", "nobody"):
        shared = as_root.daemon_pid()
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{shared}/status").read_text().splitlines()
        )
        owner = as_root.cache.stat().st_uid
        assert owner != 0
        assert set(status["Uid"].split()) == {str(owner)}
        assert "0" not in status["Gid"].split() + status["Groups"].split()
        assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == 0
        assert status["NoNewPrivs"].strip() == "1"
        assert as_root.veneer("ls", made).returncode == 0
    refused = as_root.veneer("daemon", "--user", "no-such-user-here")
    assert refused.returncode == 2
    assert "there is no user" in refused.stderr


def test_a_daemon_that_stays_root_keeps_only_the_right_to_open_files(as_root: Caller, made: str) -> None:
    with daemon(as_root):
        status = Path(f"/proc/{as_root.daemon_pid()}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines())
        for kind in ("CapEff", "CapPrm", "CapBnd"):
            assert int(fields[kind], 16) & ~0b110 == 0, kind
        assert (int(fields["CapInh"], 16), int(fields["CapAmb"], 16)) == (0, 0)
        assert fields["NoNewPrivs"].strip() == "1"
        assert as_root.veneer("ls", made).returncode == 0
