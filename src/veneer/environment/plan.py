"""The new root, as a list of steps. Pure: nothing here touches the machine.

How the steps reach their end, and the kernel's rules that shape them:

- The new root is a tmpfs. It is mounted on some directory of the host, made the namespace's root, and the host's tree hangs
  in it at ``/.veneer/host`` until everything was bound from there; nothing of the host is changed or made.
- The layers lie at fixed places without links, blanks or ``+``, because Nix compares the text of /proc/self/mounts with
  its configuration: lower root ``/.veneer/lower``, upper layer ``/.veneer/environment/upper``.
- Upper and work directory must be on one mount, so their parent is bound, once.
- A mount on a directory of the host's must bind whole subtrees (recursively): in a user namespace the kernel refuses to
  uncover what lies beneath a mount.
- The overlay asks its lower layers for statfs, so the mount server has to answer before the overlay is mounted.
- Ahead of everything the propagation is cut, in one direction: the host's later mounts still appear inside.

The root itself ends read only: a file made there would be lost without a word. Directories of ours above the store
(``/nix`` on a host without it) are writable, so that Nix can make its state directory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath, PurePosixPath

from veneer.environment.facts import PRIVATE, Entry, HostFacts
from veneer.environment.spec import RunSpec
from veneer.model.errors import UsageError

VENEER = f"/{PRIVATE}"
HOST = f"{VENEER}/host"
LOWER_ROOT = f"{VENEER}/lower"
HOST_STORE = f"{VENEER}/host-store"
ENVIRONMENT = f"{VENEER}/environment"
UPPER = f"{ENVIRONMENT}/upper"
WORK = f"{ENVIRONMENT}/work"
KEPT_STATE = f"{ENVIRONMENT}/var"
STATE = f"{VENEER}/state"
"""Nix's database and roots; in a place of its own because users inside may not enter the layer's directory."""
NIX_SOCKETS = f"{VENEER}/nix"
REMOUNT = f"{VENEER}/remount"
REMOUNT_HOOK = f"{REMOUNT}/hook"
REMOUNT_ASK = f"{REMOUNT}/ask"
REMOUNT_DONE = f"{REMOUNT}/done"
_HOOK = f"""\
#!/bin/sh
# Has the merged store looked at anew, which only the environment's init may do.
: > {REMOUNT_ASK} && : < {REMOUNT_DONE}
"""


@dataclass(frozen=True, slots=True)
class CutPropagation:
    """Mounts made here stay here; the host's go on arriving."""


@dataclass(frozen=True, slots=True)
class MountMemory:
    """An empty tmpfs."""

    target: str


@dataclass(frozen=True, slots=True)
class MakeDir:
    """A directory whose parent exists. No error when it is there."""

    path: str


@dataclass(frozen=True, slots=True)
class MakeFile:
    """An empty file, to bind another one on."""

    path: str


@dataclass(frozen=True, slots=True)
class MakeScript:
    """An executable file with ``text``."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class MakeFifo:
    path: str


@dataclass(frozen=True, slots=True)
class MakeLink:
    path: str
    target: str


@dataclass(frozen=True, slots=True)
class EnterRoot:
    """Make the mount at ``new`` the root; the old tree appears at ``old`` (a path in the new root)."""

    new: str
    old: str


@dataclass(frozen=True, slots=True)
class Bind:
    """The subtree ``source``, mounts included, also at ``target``. ``optional``: go on with a warning if refused."""

    source: str
    target: str
    optional: bool = False


@dataclass(frozen=True, slots=True)
class MountProc:
    """The process list of our own pid namespace; ``fallback`` is bound where a container forbids that."""

    target: str
    fallback: str


@dataclass(frozen=True, slots=True)
class MountLower:
    """Our file system; from here on the mount server answers."""

    target: str


@dataclass(frozen=True, slots=True)
class MountOverlay:
    """``lowers``: the first wins. ``restricted``: keep marks in user.* attributes."""

    target: str
    lowers: tuple[str, ...]
    upper: str
    work: str
    restricted: bool


@dataclass(frozen=True, slots=True)
class Detach:
    """Unmount a subtree and remove its mount point; no way back after this one."""

    target: str


@dataclass(frozen=True, slots=True)
class MakeReadOnly:
    """This one mount, not those on top of it."""

    target: str


Step = (
    CutPropagation
    | MountMemory
    | MakeDir
    | MakeFile
    | MakeScript
    | MakeFifo
    | MakeLink
    | EnterRoot
    | Bind
    | MountProc
    | MountLower
    | MountOverlay
    | Detach
    | MakeReadOnly
)


def plan(facts: HostFacts, spec: RunSpec) -> list[Step]:
    """All steps in order. UsageError when the store directory cannot be provided without hiding files of the host."""
    return list(_steps(facts, spec))


def memory_layers() -> list[Step]:
    """Writable layers in memory, instead of ones in a directory."""
    return [MountMemory(ENVIRONMENT), MakeDir(UPPER), MakeDir(WORK), MakeDir(KEPT_STATE)]


def _steps(facts: HostFacts, spec: RunSpec) -> Iterator[Step]:
    yield CutPropagation()
    yield MountMemory(facts.staging)
    yield MakeDir(facts.staging + VENEER)
    yield MakeDir(facts.staging + HOST)
    yield EnterRoot(facts.staging, HOST)
    yield from _host_root(facts, spec.store_dir)
    yield from _store_dir(facts, spec.store_dir)
    yield MakeDir(ENVIRONMENT)
    if facts.environment is None:
        yield from memory_layers()
    else:
        yield Bind(HOST + facts.environment, ENVIRONMENT)
    lowers = [LOWER_ROOT + spec.store_dir]
    if facts.store is not None:
        yield MakeDir(HOST_STORE)
        yield Bind(HOST + facts.store, HOST_STORE)
        lowers.append(HOST_STORE)
    yield MakeDir(LOWER_ROOT)
    yield from _make_dirs(LOWER_ROOT, spec.store_dir)
    yield MountLower(lowers[0])
    yield MountOverlay(spec.store_dir, tuple(lowers), UPPER, WORK, facts.restricted_overlay)
    if spec.nix is not None:
        yield from _for_nix(spec.nix.socket)
    yield Detach(HOST)
    yield MakeReadOnly("/")


def _for_nix(socket: PurePath) -> Iterator[Step]:
    """The worker socket, by its directory: a daemon that is started again makes it anew. Nix's state, and the remount hook."""
    yield MakeDir(STATE)
    yield Bind(KEPT_STATE, STATE)
    yield MakeDir(NIX_SOCKETS)
    yield Bind(HOST + str(socket.parent), NIX_SOCKETS)
    yield MakeDir(REMOUNT)
    yield MakeFifo(REMOUNT_ASK)
    yield MakeFifo(REMOUNT_DONE)
    yield MakeScript(REMOUNT_HOOK, _HOOK)


def _host_root(facts: HostFacts, store_dir: str) -> Iterator[Step]:
    skipped = {PRIVATE}
    if not facts.store_in_place:
        skipped |= {_top(store_dir)} if _owns_top(store_dir, facts) else set()
    for entry in facts.root:
        if entry.name == "proc" and entry.kind == "directory":
            yield MakeDir("/proc")
            yield MountProc("/proc", f"{HOST}/proc")
        elif entry.name not in skipped:
            yield from _same(entry, HOST, "")


def _store_dir(facts: HostFacts, store_dir: str) -> Iterator[Step]:
    """Make the store directory exist, without hiding anything that the host has next to it."""
    if facts.store_in_place:
        return
    if not _owns_top(store_dir, facts):
        raise UsageError(
            "the store directory does not exist, and making it appear would hide the files next to it",
            where=store_dir,
            hint=f"mkdir -p {store_dir}",
        )
    top = f"/{_top(store_dir)}"
    yield MakeDir(top)
    yield MountMemory(top)
    if facts.store_parent is not None:
        for entry in facts.store_siblings:
            if entry.name != PurePosixPath(store_dir).name:
                yield from _same(entry, HOST + facts.store_parent, top)
    yield from _make_dirs(top, store_dir.removeprefix(top))


def _owns_top(store_dir: str, facts: HostFacts) -> bool:
    """Whether the top directory of the store can be one of ours: the host has none, or only the store's siblings in it."""
    return facts.nearest == "/" or PurePosixPath(store_dir).parent == PurePosixPath(f"/{_top(store_dir)}")


def _same(entry: Entry, source: str, target: str) -> Iterator[Step]:
    """The host's ``source/name`` at ``target/name``."""
    path = f"{target}/{entry.name}"
    if entry.kind == "link":
        yield MakeLink(path, entry.target)
        return
    yield MakeDir(path) if entry.kind == "directory" else MakeFile(path)
    yield Bind(f"{source}/{entry.name}", path, optional=True)


def _make_dirs(base: str, path: str) -> Iterator[Step]:
    for part in PurePosixPath(path).parts:
        if part != "/":
            base = f"{base}/{part}"
            yield MakeDir(base)


def _top(store_dir: str) -> str:
    return PurePosixPath(store_dir).parts[1]


def describe(steps: Sequence[Step]) -> list[str]:
    """One line per step, for people."""
    return [str(step) for step in steps]
