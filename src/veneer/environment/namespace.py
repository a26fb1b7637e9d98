"""New user and pid namespaces for this process and its children.

Without root the kernel lets us map exactly one user and one group: our own. Mapped to itself, files and processes look as
outside, and exec drops the namespace's capabilities because the user is not root in it; mapped to root, it keeps them.
Supplementary groups go on counting for access, but ``setgroups`` has to be given up (user_namespaces(7)).
"""

from __future__ import annotations

import os

from veneer.environment import syscalls


def enter(*, with_user: bool, map_root: bool) -> None:
    """A pid namespace for our children, inside a user namespace of our own if ``with_user``. OSError when refused.

    Needs a process with one thread.
    """
    uid, gid = os.geteuid(), os.getegid()
    if not with_user:
        syscalls.unshare(syscalls.CLONE_NEWPID)
        return
    syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWPID)
    _write("setgroups", "deny")
    _write("uid_map", f"{0 if map_root else uid} {uid} 1")
    _write("gid_map", f"{0 if map_root else gid} {gid} 1")


def _write(name: str, text: str) -> None:
    with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
        file.write(text)
