"""The kernel's list of mounts, written as the kernel does, to be read back."""

from __future__ import annotations

import re
from collections.abc import Sequence

from veneer.formats.mountinfo import MountInfo

_ESCAPED = re.compile(rb"[ \t\n\\]")


def write_mountinfo(mounts: Sequence[MountInfo]) -> bytes:
    return b"".join(_write_line(mount) for mount in mounts)


def _write_line(mount: MountInfo) -> bytes:
    head = b"%d %d %d:%d" % (mount.mount_id, mount.parent_id, mount.major, mount.minor)
    places = [_encode(mount.root), _encode(mount.mount_point), b",".join(mount.options), *mount.optional]
    kind = [b"-", _encode(mount.fstype), _encode(mount.source), mount.super_options]
    return b" ".join([head, *places, *kind]) + b"\n"


def _encode(text: bytes) -> bytes:
    return _ESCAPED.sub(lambda match: b"\\%03o" % match[0][0], text)
