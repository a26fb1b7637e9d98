"""``.drv`` files, as far as their outputs are concerned.

Source: Nix manual, "Derivation (ATerm format)", and files written by Nix 2.8, 2.26 and 2.34.

    file    = "Derive(" rest | 'DrvWithVersion("xp-dyn-drv",' rest
    rest    = "[" output { "," output } "]," …       inputs, builder, arguments, environment: not read here
    output  = "(" name "," path "," method "," digest ")"       four strings
    string  = '"' { any byte but '"' and "\\" | "\\" any byte } '"'       \\n, \\r and \\t are control characters

``path`` is "" where it is known only after the build (content-addressed, and what depends on such). Limits: MAX_OUTPUTS;
the size of the file is the caller's to limit.
"""

from __future__ import annotations

import re

from veneer.model.errors import FormatError, LimitError
from veneer.model.store_path import DEFAULT_STORE_DIR, StorePath

SUFFIX = ".drv"
MAX_OUTPUTS = 10_000
_HEADS = (b"Derive([", b'DrvWithVersion("xp-dyn-drv",[')
_STRING = rb'"((?:[^"\\]|\\.)*)"'
_OUTPUT = re.compile(rb"\(" + b",".join([_STRING] * 4) + rb"\)", re.DOTALL)
_ESCAPE = re.compile(rb"\\(.)", re.DOTALL)
_CONTROLS = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def parse_outputs(data: bytes, *, store_dir: str = DEFAULT_STORE_DIR) -> tuple[tuple[str, StorePath], ...]:
    """(output's name, its path) of a ``.drv`` file's content, without outputs whose path is not known before the build.

    FormatError when it is no derivation, or an output is not below ``store_dir``.
    """
    head = next((head for head in _HEADS if data.startswith(head)), None)
    if head is None:
        raise FormatError("not a derivation", where="derivation")
    position = len(head)
    found = []
    for _ in range(MAX_OUTPUTS):
        match = _OUTPUT.match(data, position)
        if match is None:
            raise FormatError("not an output of a derivation", where=f"derivation, byte {position}")
        name, path = (_text(match[group], position) for group in (1, 2))
        if path:
            found.append((name, StorePath.parse_absolute(path, store_dir)))
        position = match.end() + 1
        end = data[match.end() : position]
        if end == b"]":
            return tuple(found)
        if end != b",":
            raise FormatError("the outputs of a derivation do not end", where=f"derivation, byte {position}")
    raise LimitError(f"a derivation with more than {MAX_OUTPUTS} outputs", where="derivation")


def _text(escaped: bytes, position: int) -> str:
    plain = _ESCAPE.sub(lambda match: _CONTROLS.get(match[1], match[1]), escaped)
    try:
        return plain.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("an output's name is not UTF-8", where=f"derivation, byte {position}") from error
