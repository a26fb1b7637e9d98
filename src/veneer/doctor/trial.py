"""``python -m veneer.doctor.trial user|root``: really mounts what an environment needs, in namespaces that end with the process.

Prints one JSON object: ``step`` that failed ("" when none did) and ``errno``. A process of its own, because namespaces
cannot be left and because a kernel that hangs must not hang its caller.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from veneer.environment import namespace, syscalls
from veneer.environment.facts import in_first_user_namespace

STEPS = ("user namespace", "mount namespace", "tmpfs", "overlay", "write through the overlay", "fuse")


class _FailedError(Exception):
    def __init__(self, step: str, number: int) -> None:
        super().__init__(step)
        self.step, self.number = step, number


@contextmanager
def _step(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _FailedError(name, error.errno or 0) from error


def attempt(*, with_user: bool) -> None:
    """All steps; ``_FailedError`` at the first that is refused. Changes this process's namespaces for good."""
    uid, gid = os.geteuid(), os.getegid()
    with _step("user namespace"):
        if with_user:
            namespace.enter(uid, gid, with_user=True)
    with _step("mount namespace"):
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_SLAVE)
    base = next(place for place in ("/tmp", "/run", "/mnt", "/var", "/usr") if Path(place).is_dir())
    with _step("tmpfs"):
        syscalls.mount("trial", base, "tmpfs")
    for name in ("lower", "upper", "work", "merged", "fuse"):
        Path(base, name).mkdir()
    Path(base, "lower/below").mkdir()
    restricted = with_user or not in_first_user_namespace()
    options = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
    with _step("overlay"):
        syscalls.mount(
            "overlay", f"{base}/merged", "overlay", 0, options + (",userxattr" if restricted else "")
        )
    with _step("write through the overlay"):
        Path(base, "merged/new").mkdir()
        Path(base, "merged/new").rename(Path(base, "merged/renamed"))
        Path(base, "merged/below").rmdir()
    with _step("fuse"):
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        user = 0 if with_user else uid
        syscalls.mount(
            "trial",
            f"{base}/fuse",
            "fuse",
            syscalls.MS_NODEV | syscalls.MS_NOSUID,
            f"fd={fd},rootmode=40000,user_id={user},group_id={user}",
        )


def main() -> int:
    failed = ("", 0)
    try:
        attempt(with_user=sys.argv[1:] == ["user"])
    except _FailedError as error:
        failed = (error.step, error.number)
    sys.stdout.write(json.dumps({"step": failed[0], "errno": failed[1]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
