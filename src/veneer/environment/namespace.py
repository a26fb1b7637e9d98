"""New user and pid namespaces for this process and its children.

Without root the kernel lets us map exactly one user and one group, our own. Two user namespaces, one in the other:

- The outer one, where the mounts are made, maps us to root. Our file system says that its files are root's, so they are
  ours there; with another mapping they would belong to nobody known, and the overlay could not rename or remove them.
- The inner one is the command's. It maps root back to us: files and processes look as on the host, exec drops every
  capability because the user is not root, and nothing done inside can touch the mounts. ``map_root`` leaves it out.

Supplementary groups go on counting for access, but ``setgroups`` has to be given up (user_namespaces(7)).
"""

from __future__ import annotations

from veneer.environment import syscalls


def enter(uid: int, gid: int, *, with_user: bool) -> None:
    """A pid namespace for our children; if ``with_user``, and we are (uid, gid), as root of a new user namespace.

    OSError when refused. Needs a process with one thread.
    """
    if not with_user:
        syscalls.unshare(syscalls.CLONE_NEWPID)
        return
    syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWPID)
    _write("setgroups", "deny")
    _write("uid_map", f"0 {uid} 1")
    _write("gid_map", f"0 {gid} 1")


def show_as(uid: int, gid: int) -> None:
    """From root of the outer user namespace to (uid, gid) of an inner one. OSError when refused."""
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    _write("uid_map", f"{uid} 0 1")
    _write("gid_map", f"{gid} 0 1")


def _write(name: str, text: str) -> None:
    with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
        file.write(text)
