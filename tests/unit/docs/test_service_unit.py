"""The systemd unit: what systemd itself says of it, and that it names a command line that exists."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from veneer.cli.main import group

UNIT = Path(__file__).parents[3] / "packaging/systemd/veneer-daemon.service"
WORST_EXPOSURE = 1.5


def test_its_command_line_is_one_of_ours() -> None:
    (line,) = re.findall(r"^ExecStart=/usr/bin/veneer (.*)$", UNIT.read_text(), re.MULTILINE)
    command, *words = line.split()
    found = group.get_command(None, command)  # type: ignore[arg-type]
    assert found is not None
    known = {option for parameter in found.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_it_and_calls_it_little_exposed(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/usr/bin/veneer", shutil.which("true") or "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    assert UNIT.name not in done.stderr, done.stderr
    words = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    said = subprocess.run(words, capture_output=True, text=True, timeout=60).stdout
    (exposure,) = re.findall(r"exposure level for \S+: ([0-9.]+)", said)
    assert float(exposure) <= WORST_EXPOSURE
