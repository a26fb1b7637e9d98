from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.callers import eventually
from veneer.environment.nix.version import NixVersion, detect
from veneer.model.errors import FormatError, MachineError, UsageError

SEEN = [
    ("nix (Nix) 2.8.0", ("Nix", (2, 8, 0), ""), False),
    ("nix-store (Nix) 2.3.16\n", ("Nix", (2, 3, 16), ""), False),
    ("nix-env (Nix) 2.3", ("Nix", (2, 3, 0), ""), False),
    ("nix (Nix) 2.4pre-rc1", ("Nix", (2, 4, 0), "pre-rc1"), False),
    ("nix (Nix) 2.19.0pre20231020_0e1c1b8", ("Nix", (2, 19, 0), "pre20231020_0e1c1b8"), False),
    ("nix (Nix) 2.21.5", ("Nix", (2, 21, 5), ""), False),
    ("nix (Nix) 2.22.0pre20240410_aaaaaaa", ("Nix", (2, 22, 0), "pre20240410_aaaaaaa"), False),
    ("nix (Nix) 2.22.0", ("Nix", (2, 22, 0), ""), True),
    ("nix (Nix) 2.22.1", ("Nix", (2, 22, 1), ""), True),
    ("nix (Nix) 2.25.0pre20241101_abcdef", ("Nix", (2, 25, 0), "pre20241101_abcdef"), True),
    ("nix (Nix) 2.26.3+1", ("Nix", (2, 26, 3), "+1"), True),
    ("nix (Nix) 3.0.0", ("Nix", (3, 0, 0), ""), True),
    ("nix (Lix, like Nix) 2.91.1", ("Lix, like Nix", (2, 91, 1), ""), False),
    ("nix (Lix, like Nix) 2.90-beta.1", ("Lix, like Nix", (2, 90, 0), "-beta.1"), False),
    ("nix (Lix, like Nix) 2.92.0-dev-pre20241012-abcdef", None, False),
    ("nix (Determinate Nix 3.6.2) 2.29.0", ("Determinate Nix 3.6.2", (2, 29, 0), ""), True),
    ("nix (Determinate Nix) 2.26.2", ("Determinate Nix", (2, 26, 2), ""), True),
    ("nix (Another Nix) 2.99.0", ("Another Nix", (2, 99, 0), ""), False),
    ("warning: something\nnix (Nix) 2.34.8\nSystem type: x86_64-linux\n", ("Nix", (2, 34, 8), ""), True),
]


@pytest.mark.parametrize(("text", "parts", "has_local_overlay"), SEEN)
def test_versions_seen_in_the_wild(
    text: str, parts: tuple[str, tuple[int, int, int], str] | None, has_local_overlay: bool
) -> None:
    version = NixVersion.parse(text)
    if parts is not None:
        assert version == NixVersion(*parts)
    assert version.has_local_overlay is has_local_overlay


def test_a_version_as_text() -> None:
    assert str(NixVersion.parse("nix (Nix) 2.19.0pre1_a")) == "Nix 2.19.0pre1_a"


@pytest.mark.parametrize(
    "text",
    ["", "2.8.0", "nix 2.8.0", "nix (Nix)", "nix (Nix) two", "nix (Nix) 2", "nix () 2.8.0", "(" * 5000],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(FormatError):
        NixVersion.parse(text)


def program(directory: Path, script: str, name: str = "nix") -> dict[str, str]:
    file = directory / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


def test_the_program_in_path_is_asked(tmp_path: Path) -> None:
    environ = program(tmp_path, "echo 'nix (Nix) 2.8.0'")
    assert detect(None, environ, 20) == NixVersion("Nix", (2, 8, 0))
    assert detect(str(tmp_path / "nix"), environ, 20) == NixVersion("Nix", (2, 8, 0))


def test_nix_store_alone_will_do(tmp_path: Path) -> None:
    environ = program(tmp_path, "echo 'nix-store (Nix) 2.3.16'", "nix-store") | {"PATH": str(tmp_path)}
    assert detect(None, environ, 20) == NixVersion("Nix", (2, 3, 16))


def test_an_answer_that_is_no_version_is_none(tmp_path: Path) -> None:
    assert detect(None, program(tmp_path, "echo hello"), 20) is None


def test_no_program_is_said_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        detect(None, {"PATH": str(tmp_path)}, 20)
    assert caught.value.hint


def test_a_failing_program_is_an_error_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="no libraries"):
        detect(None, program(tmp_path, "echo no libraries >&2; exit 127"), 20)


def test_a_program_that_cannot_be_run_is_an_error(tmp_path: Path) -> None:
    environ = program(tmp_path, "")
    (tmp_path / "nix").write_text("#!/no/such/interpreter\n")
    with pytest.raises(MachineError):
        detect(None, environ, 20)


def test_a_silent_program_is_ended_with_its_children(tmp_path: Path) -> None:
    environ = program(tmp_path, f"sleep 600 & echo $! > {tmp_path}/pid; exit 0")
    with pytest.raises(MachineError, match="did not say"):
        detect(None, environ, 1.0)
    child = Path("/proc") / (tmp_path / "pid").read_text().strip() / "stat"
    eventually(lambda: not child.exists() or ") Z " in child.read_text())
