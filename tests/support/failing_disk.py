"""A disk that fails as told: a FUSE file system over a directory, which gives an error for chosen operations. Root mounts it.

::

    with FailingDisk(backing, target) as disk:
        disk.fail("read", "nars/*", errno.EIO)      # from now on
        disk.heal()

Operations: create (open of a new file, mkdir, mknod), open, read, write, fsync, rename, unlink, and lookup (stat). Names are
relative to the target. Files ``*.nar*`` are read and written without the kernel's page cache, so that each read is asked
for. The server is a process of its own (this module as a program), one thread, so that nobody can wait for himself.
"""

# Names and descriptors are passed through as they come:
# ruff: noqa: PTH101, PTH102, PTH104, PTH106, PTH108, PTH115, PTH211
from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import json
import os
import select
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 20
_ROOT = Path(__file__).resolve().parents[2]


class FailingDisk:
    """The mounted file system, from the test's side."""

    def __init__(self, backing: Path, target: Path) -> None:
        self.backing = backing
        self.target = target

    def __enter__(self) -> FailingDisk:
        self.backing.mkdir(exist_ok=True)
        self.target.mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.failing_disk", str(self.backing), str(self.target)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            text=True,
        )
        self._heard("ready")
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.target)], check=False, timeout=SECONDS, capture_output=True)
        try:
            self._process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def fail(self, operation: str, names: str, code: int, *, start: int = 0) -> None:
        """``names``: a pattern of fnmatch. ``start``: reads and writes of bytes before it go well."""
        self._tell({"operation": operation, "names": names, "errno": code, "start": start})

    def heal(self) -> None:
        self._tell(None)

    def _tell(self, rule: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(rule) + "\n")
        self._process.stdin.flush()
        self._heard("ok")

    def _heard(self, word: str) -> None:
        assert self._process.stdout is not None
        assert select.select([self._process.stdout], [], [], SECONDS)[0], "the failing disk is silent"
        assert self._process.stdout.readline().strip() == word


def _serve(backing: str, target: str) -> None:
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"failing-disk", os.fsencode(target), b"fuse.test", ctypes.c_ulong(0), options.encode()):
        raise OSError(ctypes.get_errno(), "mount")
    server = _Server(backing)
    print("ready", flush=True)
    told = b""
    waiting: list[int] = [device, 0]
    while True:
        for ready in select.select(waiting, [], [])[0]:
            if ready == 0:
                data = os.read(0, 65536)
                if not data:
                    waiting = [device]
                told += data
                while b"\n" in told:
                    line, told = told.split(b"\n", 1)
                    rule = json.loads(line)
                    server.rules = [*server.rules, rule] if rule else []
                    print("ok", flush=True)
                continue
            try:
                request = os.read(device, 1 << 21)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno in (errno.ENOENT, errno.EINTR):
                    continue
                raise
            reply = server.answer(request)
            if reply is not None:
                with contextlib.suppress(FileNotFoundError):  # interrupted meanwhile
                    os.write(device, reply)


class _Server:
    """Node ids stand for names; who is open is asked by descriptor, also after its name is gone."""

    def __init__(self, backing: str) -> None:
        from veneer.formats import fuse_wire

        self.wire = fuse_wire
        self.backing = backing
        self.rules: list[dict[str, Any]] = []
        self.names: dict[int, str | None] = {1: ""}
        self.nodes: dict[str, int] = {"": 1}
        self.opened: dict[int, list[int]] = {}
        self.lists: dict[int, list[tuple[str, int, int]]] = {}
        self.serial = 1
        self.rows: dict[int, Callable[[int, bytes], bytes | None]] = {
            26: self.init, 1: self.lookup, 3: self.getattr, 4: self.setattr, 5: self.readlink, 6: self.symlink,
            8: self.mknod, 9: self.mkdir, 10: self.unlink, 11: self.rmdir, 12: self.rename, 45: self.rename2,
            14: self.open, 35: self.create, 15: self.read, 16: self.write, 18: self.release, 20: self.fsync,
            25: lambda node, body: b"", 27: self.opendir, 28: self.readdir, 29: self.releasedir,
            30: lambda node, body: b"", 17: self.statfs,
        }  # fmt: skip

    def answer(self, request: bytes) -> bytes | None:
        _, opcode, unique, node, *_ = self.wire.IN_HEADER.unpack_from(request)
        if opcode in (2, 36, 42):
            return None
        row = self.rows.get(opcode)
        try:
            if row is None:
                raise OSError(errno.ENOSYS, "")
            return self.wire.reply(unique, row(node, request[self.wire.IN_SIZE :]) or b"")
        except OSError as error:
            return self.wire.error_reply(unique, error.errno or errno.EIO)

    # -- names

    def check(self, operation: str, name: str, end: int | None = None) -> None:
        for rule in self.rules:
            if rule["operation"] != operation or (end is not None and end <= rule["start"]):
                continue
            if fnmatch.fnmatch(name, rule["names"]):
                raise OSError(rule["errno"], "")

    def name(self, node: int) -> str:
        found = self.names.get(node)
        if found is None:
            raise OSError(errno.ESTALE, "")
        return found

    def path(self, name: str) -> str:
        return f"{self.backing}/{name}" if name else self.backing

    def below(self, node: int, body: bytes) -> str:
        word = os.fsdecode(body.split(b"\0", 1)[0])
        return f"{self.name(node)}/{word}".lstrip("/")

    def node(self, name: str) -> int:
        if name not in self.nodes:
            self.serial += 1
            self.nodes[name] = self.serial
            self.names[self.serial] = name
        return self.nodes[name]

    def gone(self, name: str) -> None:
        node = self.nodes.pop(name, None)
        if node is not None:
            self.names[node] = None

    def attributes(self, found: os.stat_result) -> tuple[int, ...]:
        times = (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)
        return (
            found.st_ino, found.st_size, found.st_blocks, *(t // 10**9 for t in times), *(t % 10**9 for t in times),
            found.st_mode, found.st_nlink, found.st_uid, found.st_gid, found.st_rdev, 4096, 0,
        )  # fmt: skip

    def entry(self, name: str) -> bytes:
        found = os.lstat(self.path(name))
        return self.wire.ENTRY_OUT.pack(self.node(name), 0, 0, 0, 0, 0, *self.attributes(found))

    def stat(self, node: int) -> os.stat_result:
        name = self.names.get(node)
        return os.lstat(self.path(name)) if name is not None else os.fstat(self.opened[node][-1])

    # -- operations

    def init(self, node: int, body: bytes) -> bytes:
        _, minor, ahead, *_ = struct.unpack_from("<IIII", body)
        return self.wire.INIT_OUT.pack(7, min(minor, 31), ahead, 1 | 1 << 5, 16, 12, 1 << 17, 1, 32, 0, 0, 0)

    def lookup(self, node: int, body: bytes) -> bytes:
        name = self.below(node, body)
        self.check("lookup", name)
        return self.entry(name)

    def getattr(self, node: int, body: bytes) -> bytes:
        return self.wire.ATTR_OUT.pack(0, 0, 0, *self.attributes(self.stat(node)))

    def setattr(self, node: int, body: bytes) -> bytes:
        valid, _, _, size, _, atime, mtime, _, ansec, mnsec, _, mode, _, uid, gid, _ = (
            self.wire.SETATTR_IN.unpack_from(body)
        )
        name = self.names.get(node)
        place: str | int = self.path(name) if name is not None else self.opened[node][-1]
        if valid & 1:
            os.chmod(place, stat.S_IMODE(mode))
        if valid & 6:
            os.chown(place, uid if valid & 2 else -1, gid if valid & 4 else -1)
        if valid & 8:
            if name is not None:
                self.check("write", name, size)
            os.truncate(place, size)
        if valid & 0x1B0:
            found = self.stat(node)
            a = found.st_atime_ns if not valid & 0x10 else atime * 10**9 + ansec
            m = found.st_mtime_ns if not valid & 0x20 else mtime * 10**9 + mnsec
            os.utime(place, ns=(a, m)) if valid & 0x30 else None
            if valid & 0x180:
                os.utime(place)
        return self.getattr(node, body)

    def readlink(self, node: int, body: bytes) -> bytes:
        return os.fsencode(os.readlink(self.path(self.name(node))))

    def symlink(self, node: int, body: bytes) -> bytes:
        word, target = body.split(b"\0")[:2]
        name = self.below(node, word)
        os.symlink(target, self.path(name))
        return self.entry(name)

    def mknod(self, node: int, body: bytes) -> bytes:
        mode, *_ = self.wire.MKNOD_IN.unpack_from(body)
        name = self.below(node, body[self.wire.MKNOD_IN.size :])
        self.check("create", name)
        os.mknod(self.path(name), mode)
        return self.entry(name)

    def mkdir(self, node: int, body: bytes) -> bytes:
        name = self.below(node, body[self.wire.MKDIR_IN.size :])
        self.check("create", name)
        os.mkdir(self.path(name), stat.S_IMODE(self.wire.MKDIR_IN.unpack_from(body)[0]))
        return self.entry(name)

    def unlink(self, node: int, body: bytes) -> bytes:
        name = self.below(node, body)
        self.check("unlink", name)
        os.unlink(self.path(name))
        self.gone(name)
        return b""

    def rmdir(self, node: int, body: bytes) -> bytes:
        name = self.below(node, body)
        os.rmdir(self.path(name))
        self.gone(name)
        return b""

    def rename(self, node: int, body: bytes, size: int = 8) -> bytes:
        (to,) = struct.unpack_from("<Q", body)
        old, new = body[size:].split(b"\0")[:2]
        source, target = self.below(node, old), self.below(to, new)
        self.check("rename", target)
        os.rename(self.path(source), self.path(target))
        self.gone(target)
        for name in [n for n in self.nodes if n == source or n.startswith(source + "/")]:
            moved = self.nodes.pop(name)
            self.names[moved] = target + name[len(source) :]
            self.nodes[target + name[len(source) :]] = moved
        return b""

    def rename2(self, node: int, body: bytes) -> bytes:
        if struct.unpack_from("<QI", body)[1]:
            raise OSError(errno.EINVAL, "")
        return self.rename(node, body, 16)

    def handle(self, node: int, fd: int, name: str) -> bytes:
        self.opened.setdefault(node, []).append(fd)
        return self.wire.OPEN_OUT.pack(fd, 1 if ".nar" in name else 0, 0)

    def open(self, node: int, body: bytes) -> bytes:
        name = self.name(node)
        self.check("open", name)
        flags = self.wire.OPEN_IN.unpack_from(body)[0] & ~(os.O_APPEND | os.O_CREAT | os.O_EXCL)
        return self.handle(node, os.open(self.path(name), flags | os.O_NOFOLLOW), name)

    def create(self, node: int, body: bytes) -> bytes:
        flags, mode, *_ = self.wire.CREATE_IN.unpack_from(body)
        name = self.below(node, body[self.wire.CREATE_IN.size :])
        self.check("create", name)
        fd = os.open(self.path(name), (flags | os.O_CREAT | os.O_NOFOLLOW) & ~os.O_APPEND, stat.S_IMODE(mode))
        entry = self.entry(name)
        return entry + self.handle(self.node(name), fd, name)

    def read(self, node: int, body: bytes) -> bytes:
        fd, offset, size, *_ = self.wire.READ_IN.unpack_from(body)
        self.check("read", self.names.get(node) or "", offset + size)
        return os.pread(fd, size, offset)

    def write(self, node: int, body: bytes) -> bytes:
        fd, offset, size, *_ = self.wire.WRITE_IN.unpack_from(body)
        self.check("write", self.names.get(node) or "", offset + size)
        written = os.pwrite(fd, body[self.wire.WRITE_IN.size :][:size], offset)
        return struct.pack("<II", written, 0)

    def fsync(self, node: int, body: bytes) -> bytes:
        self.check("fsync", self.names.get(node) or "")
        os.fsync(self.wire.FSYNC_IN.unpack_from(body)[0])
        return b""

    def release(self, node: int, body: bytes) -> bytes:
        fd = self.wire.RELEASE_IN.unpack_from(body)[0]
        self.opened[node].remove(fd)
        os.close(fd)
        return b""

    def opendir(self, node: int, body: bytes) -> bytes:
        self.check("open", self.name(node))
        self.serial += 1
        with os.scandir(self.path(self.name(node))) as entries:
            self.lists[self.serial] = [
                (e.name, e.inode(), e.stat(follow_symlinks=False).st_mode >> 12) for e in entries
            ]
        return self.wire.OPEN_OUT.pack(self.serial, 0, 0)

    def readdir(self, node: int, body: bytes) -> bytes:
        handle, offset, size, *_ = self.wire.READ_IN.unpack_from(body)
        out = b""
        for at, (name, inode, kind) in enumerate(self.lists[handle][offset:], offset + 1):
            encoded = os.fsencode(name)
            row = self.wire.DIRENT.pack(inode, at, len(encoded), kind) + encoded
            row += bytes(-len(row) % 8)
            if len(out) + len(row) > size:
                break
            out += row
        return out

    def releasedir(self, node: int, body: bytes) -> bytes:
        del self.lists[self.wire.RELEASE_IN.unpack_from(body)[0]]
        return b""

    def statfs(self, node: int, body: bytes) -> bytes:
        s = os.statvfs(self.backing)
        return self.wire.STATFS_OUT.pack(
            s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree, s.f_bsize, s.f_namemax, s.f_frsize, 0
        )


if __name__ == "__main__":
    _serve(*sys.argv[1:])
