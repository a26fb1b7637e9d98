"""A machine without a usable /dev/null is told of, before anything is set up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from veneer.cli.config import Settings
from veneer.cli.private_daemon import start
from veneer.environment.spec import RunSpec
from veneer.environment.supervise import run
from veneer.model.errors import MachineError


@pytest.fixture(params=["missing", "not a device that opens"])
def null(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "null"
    if request.param != "missing":
        path.mkdir()
    monkeypatch.setattr(os, "devnull", str(path))
    return path


def test_an_environment_is_not_begun(null: Path, tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(MachineError) as caught:
        run(RunSpec(("true",), tmp_path, None, tmp_path / "environments", 1.0, {}, "/"))
    assert caught.value.where == str(null)
    assert caught.value.hint
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert not (tmp_path / "environments").exists()


def test_a_daemon_is_not_started(null: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="the store daemon cannot be started") as caught:
        start(Settings(tmp_path / "cache", tmp_path / "environments", (), ()))
    assert caught.value.hint
