r"""The kernel's list of mounts, ``/proc/PID/mountinfo``.

Specification: proc_pid_mountinfo(5); fs/proc_namespace.c, ``show_mountinfo``. One line per mount, in the order in which
they were attached, fields separated by one space::

    36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 propagate_from:2 - ext3 /dev/root rw,errors=continue
    id parent major:minor root mount-point options [optional fields]* - type source super-options

In ``root``, ``mount-point``, ``type``, ``source`` and most values of ``super-options`` the kernel writes space, tab,
newline, backslash (and sometimes ``#``) as a backslash and three octal digits. Any such escape is undone; a backslash
without three octal digits stays as it is. ``super-options`` are kept as the kernel wrote them: a decoded comma could not
be told from a separator. Names are bytes in any encoding.

Deviations: ``source`` may be empty (two spaces; a tmpfs mounted from ""), and ``super-options`` too. Limits: none of our
own; the kernel makes this list. Who enforces what: ``parse_mountinfo`` refuses lines with missing or non-numeric fields.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from veneer.model.errors import FormatError

_ESCAPE = re.compile(rb"\\([0-3][0-7]{2})")
_FIXED_FIELDS = 6


@dataclass(frozen=True, slots=True)
class MountInfo:
    """One mount. ``major``, ``minor``: the device of its files (st_dev). ``root``: which part of it is mounted."""

    mount_id: int
    parent_id: int
    major: int
    minor: int
    root: bytes
    mount_point: bytes
    options: tuple[bytes, ...]
    optional: tuple[bytes, ...]
    fstype: bytes
    source: bytes
    super_options: bytes


def parse_mountinfo(data: bytes) -> list[MountInfo]:
    """All mounts, in the file's order: a later one lies on top of an earlier one at the same place."""
    return [_parse_line(line, number) for number, line in enumerate(data.split(b"\n"), 1) if line]


def _parse_line(line: bytes, number: int) -> MountInfo:
    fields = line.split(b" ")
    try:
        end = fields.index(b"-", _FIXED_FIELDS)
        fstype, source, super_options = fields[end + 1 : end + 4]
        major, minor = fields[2].split(b":")
        mount_id, parent_id, major_no, minor_no = map(_number, (fields[0], fields[1], major, minor))
    except ValueError as error:
        raise FormatError("not a line of mountinfo", where=f"mountinfo, line {number}") from error
    return MountInfo(
        mount_id=mount_id,
        parent_id=parent_id,
        major=major_no,
        minor=minor_no,
        root=_decode(fields[3]),
        mount_point=_decode(fields[4]),
        options=tuple(fields[5].split(b",")),
        optional=tuple(fields[_FIXED_FIELDS:end]),
        fstype=_decode(fstype),
        source=_decode(source),
        super_options=super_options,
    )


def _number(text: bytes) -> int:
    if not text.isdigit() or len(text) > 10:
        raise ValueError(text)
    return int(text)


def _decode(text: bytes) -> bytes:
    if b"\\" not in text:
        return text
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), text)
