"""Who owns a named environment, and whether it is still that process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from veneer.environment import living, named, upper
from veneer.environment.spec import RunSpec
from veneer.model.errors import UsageError


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Stands for init."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def document(process: subprocess.Popen[bytes], **changes: Any) -> dict[str, Any]:
    spec = RunSpec(
        ("true",), Path("/cache"), {"sources": []}, Path("/environments"), 1.0, {}, "/", name="dev"
    )
    start = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
    described = living.describe(spec, (os.geteuid(), os.getegid()), in_user_namespace=False)
    return {**described, "pid": process.pid, "start": start, **changes}


def is_believed(directory: Path, found: dict[str, Any]) -> bool:
    living.announce(directory, found)
    environment = living.look(directory)
    if environment is not None:
        environment.close()
    return environment is not None


def test_a_living_owner_is_found(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    assert is_believed(tmp_path, document(process))
    owner = living.read_owner(tmp_path)
    assert owner is not None
    assert (owner.pid, owner.command) == (process.pid, ("true",))


def test_a_pid_that_another_process_has_now_is_not_believed(
    tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    found = document(process)
    assert not is_believed(tmp_path, {**found, "start": found["start"] - 1})
    assert not is_believed(tmp_path, {**found, "boot": "another"})
    assert not is_believed(tmp_path, {**found, "pid": 1 << 22})


def test_an_ended_owner_is_not_believed(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    found = document(process)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    assert not is_believed(tmp_path, found)
    process.wait()
    assert not is_believed(tmp_path, found)


def test_an_owner_in_another_container_is_refused(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    with pytest.raises(UsageError, match="another container"):
        is_believed(tmp_path, document(process, pid_namespace=1))


def test_an_owner_of_another_version_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / living.OWNER).write_text('{"pid": 1, "command": []}')
    assert living.look(tmp_path) is None
    (tmp_path / living.OWNER).write_text("[")
    assert living.look(tmp_path) is None


def test_the_second_claim_waits_until_the_first_is_ready(
    tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    import fcntl
    import threading

    layer = living.claim(tmp_path, "dev")
    assert isinstance(layer, upper.Layer)
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(living.claim(tmp_path, "dev")), daemon=True)
    waiting.start()
    living.announce(layer.directory, document(process))
    fcntl.flock(layer.users_fd, fcntl.LOCK_UN)
    waiting.join(20)
    (environment,) = found
    assert isinstance(environment, living.Living)
    assert upper.keep_others_out(layer.directory) is None
    environment.close()
    others_out = upper.keep_others_out(layer.directory)
    assert others_out is not None
    os.close(others_out)
    layer.release()


def test_nobody_takes_a_layer_that_a_joined_process_still_sees(tmp_path: Path) -> None:
    layer = upper.take_named(tmp_path, "dev")
    layer.release()
    left = upper.join(tmp_path / "dev")
    assert upper.try_named(tmp_path, "dev") is None
    os.close(left)
    again = upper.try_named(tmp_path, "dev")
    assert again is not None
    again.release()


def test_a_removed_layer_leaves_nothing(tmp_path: Path) -> None:
    layer = upper.take_named(tmp_path, "dev")
    (layer.directory / "upper" / "d").mkdir()
    (layer.directory / "upper" / "d").chmod(0)
    upper.remove_named(layer)
    assert list(tmp_path.iterdir()) == []
    assert not upper.is_used(tmp_path, "dev")


def test_idle_environments_are_listed(tmp_path: Path) -> None:
    assert named.summaries(tmp_path / "absent") == []
    upper.take_named(tmp_path, "dev").release()
    (tmp_path / "dev/upper/file").write_text("12345")
    (summary,) = named.summaries(tmp_path)
    assert (summary.name, summary.state, summary.paths, summary.size) == ("dev", "idle", 1, 5)


def test_what_is_not_an_environment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no environment dev"):
        named.diff(tmp_path, "dev")
    with pytest.raises(UsageError, match="not a name"):
        named.end(tmp_path, "../dev", keep=False, kill=False)


def test_a_name_that_becomes_free_at_the_deadline_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upper.take_named(tmp_path, "work").release()
    real, busy = upper.try_named, [None]
    monkeypatch.setattr(named, "_END_SECONDS", -1.0)
    monkeypatch.setattr(upper, "try_named", lambda *which: busy.pop() if busy else real(*which))
    assert named.end(tmp_path, "work", keep=True, kill=False) == (False, False)
    assert not upper.is_used(tmp_path, "work")
