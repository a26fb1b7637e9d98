"""Errors carry what, where and what to do, and nothing from a source drives a terminal."""

from __future__ import annotations

import errno

import pytest

from veneer.model import errors
from veneer.model.errors import FormatError, NotFoundError, VeneerError, printable


def test_text_has_all_fields_and_story_is_one_line() -> None:
    error = FormatError("bad\x1b[31m", where="http://x", hint="try again")
    assert str(error) == "bad\x1b[31m (http://x)\nhint: try again"
    assert error.story() == "bad\\x1b[31m (http://x)"
    assert str(VeneerError("bad")) == "bad"


def test_only_a_missing_path_is_enoent() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, VeneerError)]
    assert [k for k in kinds if k.errno == errno.ENOENT] == [NotFoundError]


def test_a_reader_gets_eio_for_everything_else_also_when_the_caches_disk_is_full() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, VeneerError)]
    assert {k.errno for k in kinds if k is not NotFoundError} == {errno.EIO}
    assert errors.CacheFullError.exit_code == 7


@pytest.mark.parametrize("text", ["a\nb", "\x1b]0;x\x07", "\x9b", "\u202e", "\udcff"])
def test_control_characters_are_escaped(text: str) -> None:
    assert printable(text).isprintable()
    assert printable("ä b") == "ä b"
