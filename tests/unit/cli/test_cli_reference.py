"""The reference pages are those that the code makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.cli.reference import pages

DIRECTORY = Path(__file__).parents[3] / "docs" / "reference"


@pytest.mark.parametrize("name", ["cli.md", "exit-codes.md", "configuration.md", "doctor.md"])
def test_the_page_is_up_to_date(name: str) -> None:
    assert (DIRECTORY / name).read_text("utf-8") == pages()[name], "run: python -m veneer.cli.reference"
