"""The tutorial's console blocks, run as they stand by an ordinary user.

In a block, a line that begins with "$ " is a command; the lines after it must appear in its output (stdout and stderr) in
this order, where … stands for anything.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.users import OtherUser

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial" / "first-run.md"
_BLOCK = re.compile(r"^```console\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass
class Step:
    command: str
    expected: list[str] = field(default_factory=list)


def steps_of(text: str) -> list[Step]:
    steps: list[Step] = []
    for block in _BLOCK.findall(text):
        for line in block.splitlines():
            if line.startswith("$ "):
                steps.append(Step(line[2:]))
            else:
                steps[-1].expected.append(line)
    return steps


def missing(expected: list[str], output: str) -> list[str]:
    """The expected lines that are not in the output, or not in their order."""
    lines = iter(output.splitlines())
    patterns = [re.compile(".*".join(map(re.escape, line.split("…")))) for line in expected]
    return [p.pattern for p in patterns if not any(p.fullmatch(line) for line in lines)]


@pytest.mark.fuse
@pytest.mark.slow
def test_the_tutorial_works_as_written(as_user: OtherUser) -> None:
    steps = steps_of(TUTORIAL.read_text("utf-8"))
    assert len(steps) > 10
    programs = as_user.home / "bin"
    programs.mkdir(mode=0o755)
    (programs / "veneer").write_text(f'#!/bin/sh\nexec {as_user.python} -m veneer.cli.main "$@"\n')
    (programs / "veneer").chmod(0o755)
    mark = secrets.token_hex(8)
    script = [f"export PATH={programs}:$PATH", "exec 2>&1"]
    for step in steps:
        script += [step.command, f'echo "{mark} $?"']
    done = as_user.run("bash", "-c", "\n".join(script), timeout=120)
    outputs = re.split(rf"^{mark} (\d+)\n", done.stdout, flags=re.MULTILINE)
    for number, step in enumerate(steps):
        output, status = outputs[2 * number], outputs[2 * number + 1]
        assert status == "0", f"$ {step.command}\n{output}"
        assert not missing(step.expected, output), f"$ {step.command}\n{output}"
