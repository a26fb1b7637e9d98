"""Environments with a name, which several commands share and which live on: through the whole command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_end_to_end_lives import all_end, children, members
from tests.integration.test_environment import HOST_WITH_STORE, Terminal
from tests.support.callers import Caller, read_line
from tests.support.sample import SampleStore
from veneer.environment import named
from veneer.environment.living import read_owner
from veneer.model.errors import UsageError

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.nix]

HOLD = "echo up; read line; exit 7"


@pytest.fixture
def user_of(caller: Caller, nix_cache: SampleStore) -> Iterator[Caller]:
    """The caller with a cache to use; what it brought up is ended after the test."""
    caller.use(f"file://{nix_cache.cache('zstd')}", key=nix_cache.public)
    yield caller
    bring_down(caller)


def bring_down(caller: Caller) -> None:
    for name in environments(caller):
        done = caller.veneer("down", "--kill", name, sources=False)
        assert done.returncode == 0, done.stderr


def environments(caller: Caller) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in caller.document("ls", sources=False)["environments"]}


def owner(caller: Caller, script: str = HOLD, name: str = "dev") -> Any:
    return caller.running("run", "--name", name, "--", "sh", "-c", script)


def joined(caller: Caller, script: str = HOLD, name: str = "dev") -> Any:
    return caller.running("enter", name, "--", "sh", "-c", script, sources=False)


def enter(caller: Caller, script: str, name: str = "dev") -> subprocess.CompletedProcess[str]:
    return caller.veneer("enter", name, "--", "sh", "-c", script, sources=False)


def in_run(caller: Caller, script: str, name: str = "dev") -> subprocess.CompletedProcess[str]:
    return caller.veneer("run", "--name", name, "--", "sh", "-c", script)


def up(caller: Caller, name: str = "dev", *words: str) -> subprocess.CompletedProcess[str]:
    return caller.veneer("up", name, *words)


# Together in one, apart in others.


def test_commands_of_one_name_see_each_others_writes_and_the_store(
    user_of: Caller, nix_cache: SampleStore
) -> None:
    note = nix_cache.paths["note"]
    with owner(user_of) as first:
        second = in_run(
            user_of, f"cat {note}; echo second > /nix/store/f; id -u; pwd; echo $$; cat /proc/1/comm"
        )
        text, uid, directory, _, init = second.stdout.splitlines()
        assert (text, directory, init) == ("a note", str(user_of.home), "veneer-init"), second.stderr
        assert uid == ("0" if user_of.is_root else str(user_of.home.stat().st_uid))
        assert enter(user_of, "cat /nix/store/f").stdout == "second\n"
        assert first.communicate("\n", timeout=20)[0] == ""
        assert first.returncode == 7
    assert in_run(user_of, "cat /nix/store/f").stdout == "second\n"


def test_runs_that_start_at_once_come_together(user_of: Caller) -> None:
    script = "echo $0 > /nix/store/$0; echo up; read line; cd /nix/store; ls 0 1 2 3"
    words = [user_of.words("run", "--name", "dev", "--", "sh", "-c", script, str(n)) for n in range(4)]
    processes = [user_of.popen(line) for line in words]
    try:
        for process in processes:
            assert process.stdout is not None
            assert read_line(process.stdout) == "up\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            out, errors = process.communicate(timeout=30)
            assert (out, process.returncode) == ("0\n1\n2\n3\n", 0), errors
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=20)


def test_environments_of_other_names_share_the_daemon_and_nothing_else(
    user_of: Caller, nix_cache: SampleStore
) -> None:
    note = nix_cache.paths["note"]
    with owner(user_of, f"cat {note} > /nix/store/mine; {HOLD}", "one"):
        daemon = user_of.daemon_pid()
        with owner(user_of, "echo two > /nix/store/other; " + HOLD, "two"):
            assert user_of.daemon_pid() == daemon
            assert enter(user_of, "cd /nix/store; ls mine other", "one").stdout == "mine\n"
            assert enter(user_of, "cd /nix/store; ls mine other", "two").stdout == "other\n"


def test_exit_status_and_signals_of_a_joined_command_are_its_own(user_of: Caller) -> None:
    with owner(user_of):
        assert enter(user_of, "exit 3").returncode == 3
        assert enter(user_of, "kill -USR1 $$").returncode == -signal.SIGUSR1
        assert user_of.veneer("enter", "dev", "--", "no-such-program", sources=False).returncode == 127
        script = "trap 'echo caught; exit 9' TERM; echo up; while :; do read line; done"
        with joined(user_of, script) as process:
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=20)
        assert (out, process.returncode) == ("caught\n", 9)


def test_ctrl_c_ends_a_joined_command_and_nothing_else(user_of: Caller) -> None:
    terminal = Terminal()
    with owner(user_of) as first:
        options: dict[str, Any] = {**terminal.options(), "stdin": terminal.slave, "start_new_session": False}
        script = "trap 'echo int; exit 5' INT; echo up; while :; do read line; done"
        process = user_of.popen(
            user_of.words("enter", "dev", "--", "bash", "-c", script, sources=False), **options
        )
        try:
            terminal.expect("up")
            terminal.type("\x03")
            terminal.expect("int")
            assert process.wait(20) == 5
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(20)
            terminal.close()
        assert first.poll() is None


# Ends.


def test_the_environment_outlives_the_first_command(user_of: Caller) -> None:
    with owner(user_of) as first, joined(user_of, "echo up; read line; cat /nix/store/f") as second:
        enter(user_of, "echo kept > /nix/store/f")
        assert first.stdin is not None
        first.stdin.write("\n")
        first.stdin.flush()
        assert first.stderr is not None
        assert "others use the environment" in read_line(first.stderr)
        assert enter(user_of, "cat /nix/store/f").stdout == "kept\n"
        assert second.communicate("\n", timeout=20)[0] == "kept\n"
        assert first.wait(20) == 7


def test_a_first_command_that_waits_for_others_can_be_interrupted(user_of: Caller) -> None:
    with owner(user_of) as first, joined(user_of) as second:
        assert first.stdin is not None
        first.stdin.write("\n")
        first.stdin.flush()
        assert first.stderr is not None
        assert "others use the environment" in read_line(first.stderr)
        first.send_signal(signal.SIGINT)
        assert second.wait(20) == 125
        assert first.wait(20) == 7
    assert environments(user_of)["dev"]["state"] == "idle"


def joiner_members(joiner: int) -> dict[str, int]:
    (keeper,) = children(joiner)
    (stand_in,) = children(keeper)
    (command,) = children(stand_in)
    (child,) = children(command)
    return {"joiner": joiner, "keeper": keeper, "joined": stand_in, "command": command, "child": child}


@pytest.mark.parametrize("victim", ["joiner", "keeper", "command"])
def test_a_killed_joiner_takes_its_command_along_and_nothing_else(victim: str, user_of: Caller) -> None:
    with owner(user_of) as first:
        with owner(user_of, "sleep 1000 & echo up; wait") as second:
            pids = joiner_members(second.pid)
            with all_end(pids.values()):
                os.kill(pids[victim], signal.SIGKILL)
                second.wait(20)
        assert enter(user_of, "echo alive").stdout == "alive\n"
        first.communicate("\n", timeout=20)
        assert first.returncode == 7


@pytest.mark.parametrize("victim", ["run", "keeper", "init"])
def test_a_killed_environment_ends_all_commands_in_it(victim: str, user_of: Caller) -> None:
    with owner(user_of) as first, joined(user_of, "sleep 1000 & echo up; wait") as second:
        theirs = members(first.pid)
        pids = [*theirs.values(), *joiner_members(second.pid).values()]
        with all_end(pids):
            os.kill(theirs[victim], signal.SIGKILL)
            _, errors = second.communicate(timeout=20)
        assert second.returncode == 125
        assert "the environment was killed" in errors
    assert enter(user_of, "true").returncode == 125
    assert in_run(user_of, "echo again").stdout == "again\n"


def test_what_enter_leaves_running_stays_and_what_run_leaves_does_not(user_of: Caller) -> None:
    up(user_of)
    in_run(user_of, "sleep 1001 > /dev/null 2>&1 &")
    assert environments(user_of)["dev"]["processes"] == []
    enter(user_of, "sleep 1002 > /dev/null 2>&1 &")
    assert [p["command"] for p in environments(user_of)["dev"]["processes"]] == ["sleep 1002"]


# up, enter, down.


def test_up_and_down_with_a_layer_that_is_kept(user_of: Caller, nix_cache: SampleStore) -> None:
    started = up(user_of)
    assert (started.returncode, started.stdout) == (0, ""), started.stderr
    assert "veneer enter dev" in started.stderr
    row = environments(user_of)["dev"]
    assert (row["state"], row["processes"], row["paths"]) == ("up", [], 0)
    assert row["sources"] == [f"file://{nix_cache.cache('zstd')}"]
    assert enter(user_of, f"cat {nix_cache.paths['note']}; echo kept > /nix/store/f").stdout == "a note\n"
    assert "up already" in up(user_of).stderr
    ended = user_of.veneer("down", "--keep", "dev", sources=False)
    assert ended.returncode == 0, ended.stderr
    assert environments(user_of)["dev"]["state"] == "idle"
    assert "not up" in enter(user_of, "true").stderr
    assert up(user_of).returncode == 0
    assert enter(user_of, "cat /nix/store/f").stdout == "kept\n"
    assert user_of.veneer("down", "dev", sources=False).returncode == 0
    assert environments(user_of) == {}
    assert list((user_of.home / "environments").iterdir()) == []
    gone = user_of.veneer("down", "dev", sources=False)
    assert (gone.returncode, "there is no environment dev" in gone.stderr) == (2, True)


def test_up_with_other_sources_is_refused_while_it_is_up(user_of: Caller, nix_cache: SampleStore) -> None:
    up(user_of)
    user_of.use(f"file://{nix_cache.cache('xz')}", key=nix_cache.public)
    refused = up(user_of)
    assert (refused.returncode, "other sources" in refused.stderr) == (2, True)
    assert "other sources" in in_run(user_of, "true").stderr


def test_up_that_fails_says_why(user_of: Caller) -> None:
    user_of.use("file:///no/such/cache", key="")
    (user_of.home / "environments").mkdir()
    place = user_of.home / "environments" / "dev"
    place.mkdir()
    (place / "upper").write_text("in the way")
    if not user_of.is_root:
        for path in (place.parent, place, place / "upper"):
            os.chown(path, user_of.home.stat().st_uid, -1)
    failed = up(user_of)
    assert failed.returncode == 6
    assert "cannot make the environment dev" in failed.stderr
    (place / "upper").unlink()


def test_down_names_the_processes_in_its_way(user_of: Caller) -> None:
    up(user_of)
    with joined(user_of, "echo up; exec sleep 1003") as process:
        refused = user_of.veneer("down", "dev", sources=False)
        assert refused.returncode == 2
        (command,) = children(children(children(process.pid)[0])[0])
        assert f"{command} sleep 1003" in refused.stderr
        assert environments(user_of)["dev"]["state"] == "in use"
        killed = user_of.veneer("down", "--kill", "dev", sources=False)
        assert killed.returncode == 0, killed.stderr
        assert process.wait(20) == 125
    assert environments(user_of) == {}


def test_what_still_dies_in_an_environment_that_down_has_ended_is_not_in_its_way(
    as_root: Caller, nix_cache: SampleStore
) -> None:
    as_root.use(f"file://{nix_cache.cache('zstd')}", key=nix_cache.public)
    place = as_root.home / "environments/dev"
    try:
        assert up(as_root).returncode == 0
        with joined(as_root, "echo up; exec sleep 1003"):
            owner = read_owner(place)
            assert owner is not None
            assert named.end_once(place, owner, kill=False) == owner
            with pytest.raises(UsageError, match="in use by"):
                named.end_once(place, replace(owner, start=owner.start - 1), kill=False)
    finally:
        bring_down(as_root)


def test_down_of_a_run_is_refused(user_of: Caller) -> None:
    with owner(user_of) as first:
        refused = user_of.veneer("down", "dev", sources=False)
        assert (refused.returncode, f"{members(first.pid)['command']} sh -c" in refused.stderr) == (2, True)


def test_diff_tells_new_changed_and_removed_paths(user_of: Caller, nix_cache: SampleStore) -> None:
    note, shapes = nix_cache.paths["note"], nix_cache.paths["shapes"]
    script = f"""
    mkdir -p /nix/store/new/d; printf 12345 > /nix/store/new/d/f; ln -s x /nix/store/link
    rm -f {note}; chmod u+w {shapes}; echo more > {shapes}/added
    touch /nix/store/some.lock; mkdir /nix/store/.links
    """
    done = in_run(user_of, script)
    assert done.returncode == 0, done.stderr
    found = user_of.veneer("diff", "dev", "--json", sources=False)
    rows = {row.pop("name"): row for row in json.loads(found.stdout)["paths"]}
    assert rows == {
        "new": {"change": "new", "type": "directory", "size": 5},
        "link": {"change": "new", "type": "symlink", "size": 0},
        Path(note).name: {"change": "removed", "type": "other", "size": 0},
        Path(shapes).name: {"change": "changed", "type": "directory", "size": 5},
    }
    assert "removed" in user_of.veneer("diff", "dev", sources=False).stdout


def test_a_stale_owner_is_not_believed(user_of: Caller) -> None:
    with owner(user_of) as first, all_end(members(first.pid).values()):
        first.kill()
    place = user_of.home / "environments" / "dev"
    stale = read_owner(place)
    assert stale is not None
    document = json.loads((place / "owner.json").read_text())
    (place / "owner.json").write_text(json.dumps({**document, "pid": os.getpid()}))
    assert "is not up" in enter(user_of, "true").stderr
    assert in_run(user_of, "echo own").stdout == "own\n"


# Other users, other hosts.


def test_another_user_is_refused_and_root_is_not(
    as_root: Caller, unprivileged: Caller, nix_cache: SampleStore
) -> None:
    for caller in (as_root, unprivileged):
        caller.use(f"file://{nix_cache.cache('zstd')}", key=nix_cache.public)
    place = unprivileged.home / "environments"
    as_root.configure(environments_dir=str(place))
    try:
        up(unprivileged)
        script = f"id -u; cat {nix_cache.paths['note']}; echo x > /nix/store/by-root"
        done = enter(as_root, script)
        assert done.stdout == f"{unprivileged.home.stat().st_uid}\na note\n", done.stderr
        assert (place / "dev/upper/by-root").stat().st_uid == unprivileged.home.stat().st_uid
    finally:
        bring_down(unprivileged)
    elsewhere = as_root.home / "environments"
    as_root.configure()
    unprivileged.configure(environments_dir=str(elsewhere))
    try:
        up(as_root)
        elsewhere.chmod(0o755)
        for words in (["run", "--name", "dev", "true"], ["enter", "dev"], ["down", "dev"]):
            refused = unprivileged.veneer(words[0], *words[1:], sources=False)
            assert refused.returncode in (2, 125)
            assert "belongs to another user" in refused.stderr
    finally:
        bring_down(as_root)
        unprivileged.configure()


def test_joined_commands_see_the_hosts_store_too(user_of: Caller, nix_cache: SampleStore) -> None:
    root = user_of.home / "host-root"
    root.mkdir()
    host = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", HOST_WITH_STORE, "sh", str(root)]
    user_of.environment["OWNER"] = f"{user_of.home.stat().st_uid}"
    user_of.prefix = [*host, *user_of.prefix]
    up(user_of)
    done = enter(user_of, f"cat /nix/store/hosts-own/file {nix_cache.paths['note']}; ls /nix/store")
    assert done.stdout == "host\na note\nhosts-own\n", done.stderr
