"""``.drv`` files; real ones are read in tests/integration/test_nix_filled_database.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.formats.derivation import parse_outputs
from veneer.model.errors import FormatError
from veneer.model.store_path import StorePath

A = StorePath("a" * 32, "one")
B = StorePath("b" * 32, "one-dev")
REST = b',[],[],"x86_64-linux","/bin/sh",["-c","[(\\"x"],[("name","one")])'


def test_outputs_are_read_in_their_order() -> None:
    text = f'Derive([("dev","/nix/store/{B}","",""),("out","/nix/store/{A}","r:sha256","00")]'.encode()
    assert parse_outputs(text + REST) == (("dev", B), ("out", A))


def test_the_newer_heading() -> None:
    text = f'DrvWithVersion("xp-dyn-drv",[("out","/nix/store/{A}","","")]'.encode()
    assert parse_outputs(text + REST) == (("out", A),)


def test_an_output_without_a_path_is_left_out() -> None:
    text = f'Derive([("dev","","r:sha256",""),("out","/nix/store/{A}","","")]'.encode()
    assert parse_outputs(text + REST) == (("out", A),)


def test_escapes_are_undone() -> None:
    text = f'Derive([("a\\"\\\\\\n","/nix/store/{A}","","")]'.encode()
    assert parse_outputs(text + REST) == (('a"\\\n', A),)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"Derive([",
        b"Derive([]",
        b'Derive([("out","/nix/store/none","","")]',
        b'Derive([("out","/elsewhere/' + str(A).encode() + b'","","")]',
        b'Derive([("out","/nix/store/' + str(A).encode() + b'","")]',
        b'Derive([("out","/nix/store/' + str(A).encode() + b'","","")',
        b'Derive([("o\xff","/nix/store/' + str(A).encode() + b'","","")]',
    ],
)
def test_what_is_no_derivation_is_refused(text: bytes) -> None:
    with pytest.raises(FormatError):
        parse_outputs(text)


@given(st.binary())
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for text in (data, b"Derive([" + data, b'Derive([("' + data):
        try:
            parse_outputs(text)
        except FormatError:
            continue
