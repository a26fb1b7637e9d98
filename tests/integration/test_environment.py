"""Environments under a real kernel, as root and as an ordinary user: the real mount server over a stub of the daemon."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.callers import eventually
from tests.support.stub_daemon import StubDaemon
from tests.support.users import OtherUser
from veneer.environment import RunSpec, plan, serving, syscalls
from veneer.environment.apply import Executor, StepError
from veneer.environment.facts import read_facts
from veneer.environment.running import DIRECTORY
from veneer.formats.mountinfo import parse_mountinfo
from veneer.formats.request_wire import Kind

DRIVER = Path(__file__).with_name("environment_driver.py")
PATIENCE = 30

pytestmark = [pytest.mark.root, pytest.mark.fuse]

# A host with a store of its own: a copy of this one's root directory (mounts only) with a /nix in it.
HOST_WITH_STORE = """
cd "$1"; shift
mount -t tmpfs -o mode=755 none .; cd "$PWD"
for entry in /* /.[!.]*; do
    name=${entry#/}
    if [ "$name" = nix ]; then continue; fi  # a real one is not ours to write to
    if [ -L "$entry" ]; then cp -P "$entry" .
    elif [ -d "$entry" ]; then mkdir "$name"; mount --rbind "$entry" "$name"
    elif [ -e "$entry" ]; then : > "$name"; mount --bind "$entry" "$name"
    fi
done
mkdir -p nix/store/hosts-own/dir nix/var old
chmod -R 777 nix
echo host > nix/store/hosts-own/file
echo inner > nix/store/hosts-own/dir/inner
[ -z "$OWNER" ] || chown -R "$OWNER" nix
pivot_root . old
cd /
umount -l /old
exec "$@"
"""


@dataclass
class Machine:
    """Who runs environments here, and how to run them."""

    home: Path
    prefix: list[str]
    environment: dict[str, str]
    python: str
    daemon: StubDaemon
    uid: int
    host: list[str] = field(default_factory=list)
    """A prefix that makes another host, as root."""

    @property
    def environments(self) -> Path:
        return self.home / "environments"

    def layers(self) -> list[str]:
        found = self.environments.iterdir() if self.environments.exists() else ()
        return sorted(path.name for path in found if path.name != DIRECTORY)

    def start(self, *command: str, stdin: Any = subprocess.DEVNULL, **fields: Any) -> Running:
        token = secrets.token_hex(4)
        spec, result = self.home / f"spec-{token}", self.home / f"result-{token}"
        known: dict[str, Any] = {"view": None, "miss_seconds": 10.0, "cache_root": str(self.daemon.cache)}
        options = fields.pop("options", {})
        known |= {"environments_root": str(self.environments), "command": command, **fields}
        spec.write_text(json.dumps(known))
        words = [*self.host, *self.prefix, self.python, str(DRIVER), str(spec), str(result)]
        process = subprocess.Popen(
            words,
            env=self.environment,
            cwd=options.pop("cwd", self.home),
            stdin=stdin,
            stdout=options.pop("stdout", subprocess.PIPE),
            stderr=options.pop("stderr", subprocess.PIPE),
            text=True,
            **options,
        )
        return Running(process, result)

    def run(self, *command: str, **fields: Any) -> Done:
        running = self.start(*command, **fields)
        try:
            return running.finish()
        finally:
            running.kill()

    def shell(self, script: str, **fields: Any) -> Done:
        return self.run("sh", "-ec", script, **fields)


@dataclass
class Done:
    """``code``: of the process. ``result``: what ``run`` returned or raised."""

    code: int
    out: str
    err: str
    result: dict[str, Any]

    @property
    def warnings(self) -> list[str]:
        warnings = self.result["report"]["warnings"]
        assert isinstance(warnings, list)
        return warnings


@dataclass
class Running:
    process: subprocess.Popen[str]
    result: Path

    def finish(self) -> Done:
        out, err = self.process.communicate(timeout=PATIENCE)
        result = json.loads(self.result.read_text()) if self.result.exists() else {}
        return Done(self.process.returncode, out or "", err or "", result)

    def line(self) -> str:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], PATIENCE)[0], "no line came"
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def members(self) -> dict[str, int]:
        """The pids of P, K, I, M and C."""
        keeper = _children(self.process.pid)[0]
        by_name = {Path(f"/proc/{pid}/comm").read_text().strip(): pid for pid in _children(keeper)}
        init, server = by_name["veneer-init"], by_name["veneer-mount"]
        (command,) = _children(init)
        return {"P": self.process.pid, "K": keeper, "I": init, "M": server, "C": command}


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _holds(pid: int, name: str) -> bool:
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if str(fd.readlink()) == name:
                return True
    return False


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


@contextlib.contextmanager
def _watched(pids: Iterator[int] | list[int]) -> Iterator[Callable[[], None]]:
    """Gives a function that waits until all these processes are gone."""
    handles = [os.pidfd_open(pid) for pid in pids]

    def wait() -> None:
        deadline = time.monotonic() + PATIENCE
        for handle in handles:
            ended = select.select([handle], [], [], max(0.0, deadline - time.monotonic()))[0]
            assert ended, "a process is left"

    try:
        yield wait
    finally:
        for handle in handles:
            os.close(handle)


@pytest.fixture
def daemon(open_directory: Path) -> Iterator[StubDaemon]:
    cache = open_directory / f"cache-{secrets.token_hex(4)}"
    cache.mkdir()
    daemon = StubDaemon(cache)
    daemon.start()
    (cache / "daemon.sock").chmod(0o777)
    yield daemon
    daemon.stop()


@pytest.fixture
def as_root(open_directory: Path, daemon: StubDaemon) -> Machine:
    home = open_directory / f"root-{secrets.token_hex(4)}"
    home.mkdir()
    return Machine(home, [], dict(os.environ), sys.executable, daemon, 0)


@pytest.fixture
def unprivileged(as_user: OtherUser, daemon: StubDaemon) -> Machine:
    return Machine(as_user.home, list(as_user.prefix), as_user.environment, as_user.python, daemon, 12345)


@pytest.fixture(params=["root", "user"])
def machine(request: pytest.FixtureRequest) -> Machine:
    """Root, then an ordinary user."""
    machine = request.getfixturevalue("as_root" if request.param == "root" else "unprivileged")
    assert isinstance(machine, Machine)
    return machine


def give_host_store(machine: Machine) -> Machine:
    """The same machine, as if it had a /nix/store of its own."""
    root = machine.home / "host-root"
    root.mkdir()
    machine.environment["OWNER"] = f"{machine.uid}:{machine.uid}"
    unshare = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", HOST_WITH_STORE, "sh"]
    machine.host = [*unshare, str(root)]
    return machine


# What the command sees, and what comes back.


@pytest.mark.parametrize("status", [0, 7])
def test_exit_status_passes_through(machine: Machine, status: int) -> None:
    done = machine.shell(f"exit {status}")
    assert (done.code, done.result["status"], done.result["signal"]) == (status, status, 0)


def test_death_by_a_signal_is_told(machine: Machine) -> None:
    done = machine.shell("kill -USR1 $$")
    assert (done.result["status"], done.result["signal"]) == (128 + signal.SIGUSR1, signal.SIGUSR1)


@pytest.mark.parametrize(
    ("program", "status"), [("no-such-program", 127), ("/no/such", 127), ("/etc/passwd", 126)]
)
def test_command_that_cannot_start_ends_as_in_a_shell(machine: Machine, program: str, status: int) -> None:
    done = machine.run(program)
    assert done.code == status
    assert done.err.startswith(f"veneer: {program}: ")


def test_program_runs_out_of_the_store(machine: Machine) -> None:
    name = machine.daemon.add("tool", {b"bin": {b"hello": b"#!/bin/sh\ncat ${0%/bin/*}/share/text\n"}, b"share": {b"text": b"from the store"}})  # fmt: skip
    done = machine.run(f"/nix/store/{name}/bin/hello")
    assert (done.code, done.out) == (0, "from the store")
    assert done.result["report"]["paths"]


def test_environment_directory_and_descriptors_pass_through(machine: Machine) -> None:
    machine.environment["MARK_OF_TEST"] = "ä b"
    with open(machine.home / "input", "w+") as file:
        file.write("from the caller")
        file.seek(0)
        options = {"pass_fds": [file.fileno()]}
        script = f'pwd; echo "$MARK_OF_TEST"; cat <&{file.fileno()}; echo; ls /proc/$$/fd; true'
        done = machine.run("bash", "-c", script, options=options)
        number = str(file.fileno())
    pwd, mark, text, *descriptors = done.out.splitlines()
    assert (pwd, mark, text) == (str(machine.home), "ä b", "from the caller")
    assert set(descriptors) - {"255"} == {"0", "1", "2", number}


def test_signal_mask_and_ignored_signals_are_the_callers(machine: Machine) -> None:
    done = machine.shell("grep -E 'Sig(Blk|Ign)' /proc/self/status")
    plain = subprocess.run(
        ["sh", "-ec", "grep -E 'Sig(Blk|Ign)' /proc/self/status"], capture_output=True, text=True
    )
    assert done.out == plain.stdout


def test_closed_standard_input_stays_closed(machine: Machine) -> None:
    words = machine.prefix
    machine.prefix = [*words, "sh", "-c", 'exec "$@" <&-', "sh"]
    done = machine.shell("test ! -e /proc/self/fd/0 && echo closed; echo x > /nix/store/x")
    assert done.out == "closed\n"


def test_vanished_working_directory_is_a_warning(machine: Machine) -> None:
    done = machine.shell("pwd", cwd="/no/such/directory")
    assert done.out == "/\n"
    assert "/no/such/directory" in done.warnings[0]
    assert "/no/such/directory" in done.err


def test_host_root_is_visible_and_cannot_be_added_to(machine: Machine) -> None:
    done = machine.shell(
        "ls -A /; ls -A /usr > ls-usr; if touch /new 2> /dev/null; then echo wrote /new; fi; echo here > file"
    )
    assert set(done.out.split()) - {".veneer", "nix"} == {path.name for path in Path("/").iterdir()}
    assert set((machine.home / "ls-usr").read_text().split()) == {p.name for p in Path("/usr").iterdir()}
    assert (machine.home / "file").read_text() == "here\n"


def test_user_is_the_same_inside_and_has_no_rights(unprivileged: Machine) -> None:
    done = unprivileged.shell("id -u; id -g; grep -E 'Cap(Prm|Eff|Inh|Amb)' /proc/self/status")
    uid, gid, *capabilities = done.out.split("\n")
    assert (uid, gid) == ("12345", "12345")
    assert {line.split()[1] for line in capabilities if line} == {"0" * 16}


def test_user_can_be_shown_as_root(unprivileged: Machine) -> None:
    done = unprivileged.shell(
        "id -u; chown 0:0 /nix/store; mount -t tmpfs none /mnt; echo mounted", map_root=True
    )
    assert done.out == "0\nmounted\n"


def test_only_own_processes_are_visible(machine: Machine) -> None:
    done = machine.shell("echo $PPID; cat /proc/1/comm; kill -0 2; ls -d /proc/[0-9]* | wc -l")
    parent, name, count = done.out.split()
    assert (parent, name) == ("1", "veneer-init")
    assert int(count) < 10


# The merged store.


def test_temporary_writes_vanish(machine: Machine) -> None:
    script = (
        "mkdir -p /nix/store/d/e && echo x > /nix/store/d/f && chmod -R a-w /nix/store/d && ls -A /nix/store"
    )
    assert machine.shell(script).out == "d\n"
    assert machine.layers() == []
    assert machine.shell("ls -A /nix/store").out == ""


def test_named_writes_persist(machine: Machine) -> None:
    machine.shell("echo kept > /nix/store/f", name="dev")
    assert (machine.environments / "dev/upper/f").read_text() == "kept\n"
    assert machine.shell("cat /nix/store/f", name="dev").out == "kept\n"
    assert machine.shell("ls -A /nix/store", name="other").out == ""


def test_named_environment_in_use_is_refused_and_its_user_named(machine: Machine) -> None:
    first = machine.start("sh", "-c", "echo up; read line", name="dev", stdin=subprocess.PIPE)
    try:
        assert first.line() == "up"
        refused = machine.shell("true", name="dev")
        assert refused.result["error"] == "UsageError"
        assert f"in use by process {first.process.pid}" in refused.result["what"]
    finally:
        first.kill()


def test_state_beside_the_store_can_be_made(machine: Machine) -> None:
    assert machine.shell("mkdir -p /nix/var/nix && ls -A /nix").out.split() == ["store", "var"]
    assert not os.path.lexists("/nix")


def test_host_store_lies_beneath(machine: Machine) -> None:
    name = give_host_store(machine).daemon.add("lower", {b"f": b"ours"})
    done = machine.shell(
        f"cat /nix/store/{name}/f; cat /nix/store/hosts-own/file; ls -A /nix; ls -A /nix/store"
    )
    assert done.out == "ourshost\nstore\nvar\nhosts-own\n"


def test_lower_directories_are_renamed_and_removed(machine: Machine) -> None:
    give_host_store(machine)
    name = machine.daemon.add("lower", {b"d": {b"f": b"ours"}})
    script = f"""
    cd /nix/store
    mv hosts-own moved
    cat moved/dir/inner
    rm -r moved/dir
    ls moved
    chmod -R u+w {name}
    mv {name} renamed
    cat renamed/d/f
    rm -r renamed
    ls
    """
    done = machine.shell(script, name="dev")
    assert (done.code, done.out) == (0, "inner\nfile\noursmoved\n"), done.err
    assert (
        machine.shell(f"ls; ls moved; ls {name} || echo gone", name="dev", cwd="/nix/store").out
        == "moved\nfile\ngone\n"
    )


def test_files_of_the_store_belong_to_the_user(unprivileged: Machine) -> None:
    name = unprivileged.daemon.add("lower", {b"f": b"ours"})
    done = unprivileged.shell(f"stat -c '%u:%g %a' /nix/store/{name}/f /nix/store; stat -c %u /etc/passwd")
    assert done.out == "12345:12345 444\n12345:12345 755\n65534\n"


@pytest.mark.parametrize("store_dir", ["/gnu/store", "/deep/er/store"])
def test_store_can_be_elsewhere(machine: Machine, store_dir: str) -> None:
    name = machine.daemon.add("lower", {b"f": b"ours"})
    done = machine.shell(
        f"cat {store_dir}/{name}/f; echo x > {store_dir}/x; ls /nix || true", store_dir=store_dir
    )
    assert done.out == "ours"
    assert not Path(store_dir).parent.exists()


def test_store_in_an_existing_directory_goes_on_top(machine: Machine) -> None:
    store = machine.home / "place" / "store"
    store.mkdir(parents=True)
    (store / "below").write_text("below")
    store.chmod(0o777)
    done = machine.shell(f"echo x > {store}/x; ls {store}", store_dir=str(store))
    assert done.out == "below\nx\n"
    assert [path.name for path in store.iterdir()] == ["below"]


def test_store_directory_that_would_hide_files_is_refused(machine: Machine) -> None:
    done = machine.shell("true", store_dir=f"{machine.home}/missing/store")
    assert done.result["error"] == "UsageError"
    assert done.result["hint"] == f"mkdir -p {machine.home}/missing/store"


def test_mounts_pass_nixs_own_check(machine: Machine) -> None:
    """What local-overlay does: the last line that mounts an overlay there, two options by regular expression."""
    mounts = machine.shell("cat /proc/self/mounts").out
    line = re.findall(r"(?:^|\n)(overlay /nix/store .*)(?=\n|$)", mounts)[-1]
    assert re.search(r"\blowerdir=/.veneer/lower/nix/store( |,)", line)
    assert re.search(r"\bupperdir=/.veneer/environment/upper( |,)", line)
    assert ("userxattr" in line) == (machine.uid != 0)


def test_layers_are_reachable_inside(machine: Machine) -> None:
    name = machine.daemon.add("lower", {b"f": b"ours"})
    done = machine.shell(
        f"echo x > /nix/store/x; cat /.veneer/environment/upper/x /.veneer/lower/nix/store/{name}/f"
    )
    assert done.out == "x\nours"


def test_layer_that_the_file_system_refuses_is_kept_in_memory(as_root: Machine) -> None:
    """As in a container, whose root is an overlay."""
    script = """
    cd "$1"; shift
    mkdir -p l t m; mount -t tmpfs none t; mkdir t/u t/w
    mount -t overlay overlay -o lowerdir=l,upperdir=t/u,workdir=t/w m
    exec "$@"
    """
    as_root.host = ["unshare", "-m", "--propagation", "private", "sh", "-ec", script, "sh", str(as_root.home)]
    root = f"{as_root.home}/m/environments"
    done = as_root.shell("echo x > /nix/store/x; cat /nix/store/x", environments_root=root)
    assert done.out == "x\n"
    assert "kept in memory" in done.warnings[0]
    refused = as_root.shell("true", environments_root=root, name="dev")
    assert refused.result["error"] == "MachineError"
    assert "ext4" in refused.result["hint"]


def test_unwritable_directory_of_environments_means_memory(unprivileged: Machine) -> None:
    done = unprivileged.shell(
        "echo x > /nix/store/x; cat /nix/store/x", environments_root="/proc/environments"
    )
    assert done.out == "x\n"
    assert "kept in memory" in done.warnings[0]


# Signals and terminals.


def test_signal_to_the_supervisor_reaches_the_command(machine: Machine) -> None:
    running = machine.start("sh", "-c", "trap 'echo got; exit 3' TERM; echo up; while :; do sleep 0.05; done")
    try:
        assert running.line() == "up"
        running.process.terminate()
        done = running.finish()
    finally:
        running.kill()
    assert (done.out, done.code) == ("got\n", 3)


def test_signal_before_the_command_runs_ends_everything(machine: Machine) -> None:
    name = machine.daemon.add("slow", {b"f": b"x"})
    machine.daemon.hold(name)
    # exec of the program waits for the daemon; so do the programs of a shell. Here: not even that far.
    running = machine.start("sh", "-c", "true", cwd=f"/nix/store/{name}", miss_seconds=60.0)
    try:
        machine.daemon.wait_for(_lookup_kind())
        running.process.terminate()
        done = running.finish()
    finally:
        running.kill()
    assert done.result["signal"] == signal.SIGTERM
    assert machine.layers() == []


def _lookup_kind() -> Any:
    from veneer.formats.request_wire import Kind

    return Kind.LOOKUP


class Terminal:
    """A pseudo-terminal as a session's own, and what came out of it."""

    def __init__(self) -> None:
        self.master, self.slave = os.openpty()
        self.seen = ""

    def options(self) -> dict[str, Any]:
        def take() -> None:
            import fcntl
            import termios

            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        return {"stdout": self.slave, "stderr": self.slave, "preexec_fn": take}

    def expect(self, text: str) -> None:
        """Reads until ``text`` has come; forgets everything up to it."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.seen:
            ready = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))[0]
            assert ready, f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self.master, 4096).decode(errors="replace")
        self.seen = self.seen.split(text, 1)[1]

    def expect_foreground(self, of: Callable[[int], bool]) -> None:
        """Waits until the terminal's foreground group is one for which ``of`` says yes."""
        deadline = time.monotonic() + PATIENCE
        while not of(os.tcgetpgrp(self.master)):
            assert time.monotonic() < deadline, "another process is in the foreground"
            select.select([], [], [], 0.02)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


def test_ctrl_c_reaches_the_command_once(machine: Machine, terminal: Terminal) -> None:
    script = "trap 'echo int; n=1$n' INT; tty; echo up; read x; echo n=$n-$x; exit 5"
    running = machine.start("bash", "-c", script, stdin=terminal.slave, options=terminal.options())
    try:
        terminal.expect(os.ttyname(terminal.slave))
        terminal.expect("up")
        terminal.type("\x03")
        terminal.expect("int")
        terminal.type("line\n")
        terminal.expect("n=1-line")
        assert running.finish().code == 5
    finally:
        running.kill()


def test_shell_inside_has_job_control_and_gives_the_terminal_back(
    machine: Machine, terminal: Terminal
) -> None:
    command = ["bash", "--norc", "--noprofile", "-i"]
    running = machine.start(*command, stdin=terminal.slave, options=terminal.options())
    try:
        terminal.type("sleep 1000\n")
        terminal.expect_foreground(lambda group: _name(group) == "sleep")
        terminal.type("\x1a")
        terminal.expect("Stopped")
        terminal.type("echo job-$((1 + 1))\n")
        terminal.expect("job-2")
        terminal.type("exit 4\nexit 4\n")  # with a stopped job, the second time counts
        assert running.finish().code == 4
        assert "no job control" not in terminal.seen
    finally:
        running.kill()


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except FileNotFoundError:
        return ""


def test_whole_job_stops_and_goes_on(machine: Machine, terminal: Terminal) -> None:
    """An interactive shell, veneer as its job, Ctrl-Z, fg: with a command that leaves stopping to the terminal."""
    _stop_and_continue(machine, terminal, "echo up; cat; true")  # not `cat` last: bash would become it


def test_command_that_stops_itself_stops_the_job(machine: Machine, terminal: Terminal) -> None:
    """As pagers do: they catch Ctrl-Z and stop themselves alone."""
    _stop_and_continue(
        machine, terminal, "trap 'trap - TSTP; kill -TSTP $$; cat; exit 0' TSTP; echo up; sleep 1000 & wait"
    )


def _is_stopped(script: str) -> bool:
    """Whether the command that runs ``script`` is stopped."""
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if (directory / "cmdline").read_bytes() == b"bash\0-c\0" + script.encode() + b"\0":
                return "State:\tT" in (directory / "status").read_text()
    return False


def _stop_and_continue(machine: Machine, terminal: Terminal, script: str) -> None:
    spec, result = machine.home / "spec", machine.home / "result"
    spec.write_text(json.dumps({
        "command": ["bash", "-c", script], "view": None, "miss_seconds": 10.0,
        "cache_root": str(machine.daemon.cache), "environments_root": str(machine.environments),
    }))  # fmt: skip
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        env=machine.environment | {"PS1": "ready> "}, cwd=machine.home, stdin=terminal.slave, **terminal.options(),
    )  # fmt: skip
    job = shell.pid
    try:
        terminal.expect("ready>")
        terminal.type(shlex.join([*machine.prefix, machine.python, str(DRIVER), "spec", "result"]) + "\n")
        terminal.expect("up")
        job = os.tcgetpgrp(terminal.master)
        terminal.type("\x1a")
        terminal.expect("Stopped")
        terminal.expect("ready>")
        # A command that stops itself may do so after the shell is back: continued before that, it would stop for good.
        eventually(lambda: _is_stopped(script))
        terminal.type("fg\n")
        terminal.expect_foreground(lambda group: group == job)
        terminal.type("again\n")
        terminal.expect("again")
        terminal.expect("again")  # the echo, then the command
        terminal.type("\x04")
        terminal.expect("ready>")
        terminal.type("echo status-$?; exit\n")
        terminal.expect("status-0")
        shell.wait(PATIENCE)
    finally:
        if shell.poll() is None:  # with the job, which may be stopped
            for group in {job, shell.pid}:
                os.killpg(group, signal.SIGKILL)
        shell.wait(PATIENCE)
    assert json.loads(result.read_text())["status"] == 0


# What is left.


def test_what_the_command_left_running_is_killed(machine: Machine) -> None:
    done = machine.shell("sleep 1000 & setsid sleep 1001 & echo started")
    assert done.out == "started\n"
    commands = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert not [c for c in commands if c in (b"sleep\x001000\x00", b"sleep\x001001\x00")]


@pytest.mark.parametrize("victim", ["P", "K", "I", "C"])
def test_nothing_is_left_when_one_is_killed(machine: Machine, victim: str) -> None:
    running = machine.start("sh", "-c", "setsid sleep 1000 & echo up; wait")
    try:
        assert running.line() == "up"
        members = running.members()
        (left,) = _children(members["C"])
        with _watched([*members.values(), left]) as wait_until_gone:
            os.kill(members[victim], signal.SIGKILL)
            wait_until_gone()
        done = running.finish()
    finally:
        running.kill()
    if victim == "P":
        assert len(machine.layers()) == 1
        assert machine.shell("true").code == 0
    elif victim == "C":
        assert (done.result["status"], done.result["signal"]) == (137, 9)
    else:
        assert done.result["what"] == "the environment was killed"
    assert machine.layers() == []


def kill_server(running: Running) -> None:
    """Its mount server; it is gone then."""
    server = running.members()["M"]
    with _watched([server]) as wait_until_gone:
        os.kill(server, signal.SIGKILL)
        wait_until_gone()


@pytest.mark.hand_over
@pytest.mark.parametrize("kind", [Kind.LOOKUP, Kind.CONTENT])
def test_what_a_killed_mount_server_owed_its_successor_answers(machine: Machine, kind: Kind) -> None:
    name = machine.daemon.add("owed", {b"f": b"ours"})
    number = machine.daemon.numbers[name]
    machine.daemon.hold(name if kind is Kind.LOOKUP else number)
    running = machine.start("cat", f"/nix/store/{name}/f")
    try:
        machine.daemon.wait_for(kind)
        asked = machine.daemon.count(kind)
        kill_server(running)
        machine.daemon.wait_for(kind, asked + 1)
        machine.daemon.release()
        done = running.finish()
    finally:
        running.kill()
    assert (done.out, done.code) == ("ours", 0)
    assert done.warnings == ["the mount server ended (killed by signal 9); another took over"]


@pytest.mark.hand_over
def test_the_report_has_what_all_mount_servers_told(machine: Machine) -> None:
    first = machine.daemon.add("first", {b"f": b"1" * 5000})
    second = machine.daemon.add("second", {b"f": b"2" * 7000})
    script = f"cat /nix/store/{first}/f >/dev/null; echo up; read line; cat /nix/store/{second}/f >/dev/null"
    running = machine.start("sh", "-c", script, stdin=subprocess.PIPE)
    try:
        assert running.line() == "up"
        time.sleep(
            2 * serving.WORD_SECONDS
        )  # it is promised that it speaks that often, and shown nowhere else
        kill_server(running)
        assert running.process.stdin is not None
        running.process.stdin.write("go\n")
        running.process.stdin.flush()
        done = running.finish()
    finally:
        running.kill()
    rows = {row["name"]: row["bytes_read"] for row in done.result["report"]["paths"].values()}
    assert rows == {first: 5000, second: 7000}
    assert "mount_server_ended" not in done.result["report"]


def test_reads_fail_once_mount_servers_died_too_often(machine: Machine) -> None:
    name = machine.daemon.add("lower", {b"f": b"ours"})
    script = f"echo up; read line; cat /nix/store/{name}/f || echo failed; exit 3"
    running = machine.start("sh", "-c", script, stdin=subprocess.PIPE)
    try:
        assert running.line() == "up"
        keeper = running.members()["K"]

        def server() -> int:
            named = [pid for pid in _children(keeper) if _comm(pid) == "veneer-mount"]
            return named[0] if named else 0

        def no_more() -> bool:
            with contextlib.suppress(ProcessLookupError):
                if pid := server():
                    os.kill(pid, signal.SIGKILL)
            return not _holds(keeper, "/dev/fuse")

        eventually(no_more)
        assert running.process.stdin is not None
        running.process.stdin.write("go\n")
        running.process.stdin.flush()
        done = running.finish()
    finally:
        running.kill()
    assert (done.out, done.code) == ("failed\n", 3)
    assert "not connected" in done.err
    ended = done.result["report"]["mount_server_ended"]
    assert ended.startswith("killed by signal 9; ")


def test_mount_server_keeps_nothing_of_the_command(machine: Machine) -> None:
    running = machine.start("sh", "-c", "echo up; read line", stdin=subprocess.PIPE)
    try:
        assert running.line() == "up"
        members = running.members()
        server = Path(f"/proc/{members['M']}")
        open_files = {str(link.readlink()) for link in (server / "fd").iterdir() if link.name != "2"}
        own = {"/dev/null", "/dev/fuse", str(machine.daemon.cache), f"{server}/statm"}
        assert {name for name in open_files if name.startswith("/") and name not in own} == set()
        assert (server / "cwd").readlink() == Path("/")
        mounts = parse_mountinfo((server / "mountinfo").read_bytes())
        assert b"/nix/store" not in [mount.mount_point for mount in mounts]
        assert os.getsid(members["M"]) == members["M"]
        assert os.getpgid(members["C"]) == os.getpgid(members["P"])
    finally:
        running.kill()


def test_stale_layers_are_swept_and_used_ones_are_not(machine: Machine) -> None:
    running = machine.start("sh", "-c", "echo x > /nix/store/x; echo up; read line", stdin=subprocess.PIPE)
    try:
        assert running.line() == "up"
        (used,) = machine.layers()
        stale = machine.environments / "tmp-00000000" / "work" / "work"
        stale.mkdir(parents=True)
        for path in (stale, stale.parent, stale.parent.parent):
            os.chown(path, machine.uid, machine.uid)
        stale.chmod(0)
        assert machine.shell("true").warnings == []
        assert machine.layers() == [used]
        assert (machine.environments / used / "upper/x").read_text() == "x\n"
    finally:
        running.kill()


# What is missing.


def test_device_that_may_not_be_opened_is_explained(unprivileged: Machine) -> None:
    if Path("/dev/fuse").stat().st_mode & 0o006:
        pytest.skip("everybody may open /dev/fuse here")
    start = next(i for i, word in enumerate(unprivileged.prefix) if Path(word).name == "setpriv")
    unprivileged.prefix = unprivileged.prefix[start:]
    done = unprivileged.shell("true")
    assert done.result["error"] == "MachineError"
    assert done.result["where"] == "/dev/fuse"
    assert "666" in done.result["hint"]


def test_missing_cache_directory_is_refused(machine: Machine) -> None:
    done = machine.shell("true", cache_root="/no/such/cache")
    assert done.result["error"] == "CacheError"
    assert machine.layers() == []


@pytest.mark.parametrize("root", ["that can be moved", "that cannot be moved"])
def test_failed_plan_is_rolled_back(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a mount namespace of its own: everything up to the first mount that nobody can do, and back."""
    if root == "that cannot be moved":  # as a boot-time ramdisk

        def refuse(new_root: str, put_old: str) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), new_root)

        monkeypatch.setattr(syscalls, "pivot_root", refuse)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            syscalls.unshare(syscalls.CLONE_NEWNS)
            syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_SLAVE)
            before = _mounts_and_root()
            facts = read_facts("/nix/store", None)
            spec = RunSpec(("true",), Path("/"), None, Path("/"), 1.0, {}, "/")
            steps: list[plan.Step] = []
            for step in plan.plan(facts, spec):
                broken = isinstance(step, plan.MountLower)
                steps.append(plan.Bind("/no/such", "/nix/store") if broken else step)
            executor = Executor(-1, lambda: None, lambda text: None)
            try:
                executor.apply(steps)
            except StepError as error:
                inside = {path.name for path in Path("/").iterdir()}
                executor.roll_back()
                undone = _mounts_and_root() == before and error.rest
                status = 0 if undone and {".veneer", "nix", *before[1]} == inside else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _mounts_and_root() -> tuple[set[tuple[bytes, bytes]], list[str]]:
    mounts = parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())
    return {(mount.mount_point, mount.fstype) for mount in mounts}, sorted(
        p.name for p in Path("/").iterdir()
    )
