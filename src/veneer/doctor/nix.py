"""Checks of Nix and of an overlay store that it was told to use: by nix.conf, by NIX_REMOTE, or inside an environment."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from veneer.doctor import lower_database
from veneer.doctor.finding import Result, Subject
from veneer.doctor.lower_database import is_store_path
from veneer.environment.nix.version import NixVersion, detect
from veneer.formats import worker_wire as wire
from veneer.formats.overlay_store import (
    StoreUrl,
    cover,
    is_overlay_url,
    mount_fault,
    overlay_command,
    parse_overlay_url,
)
from veneer.model.errors import MachineError, UsageError, VeneerError

FEATURE = "local-overlay-store"
_READ_ONLY = "read-only-local-store"
_SECONDS = 4.0
_MOST_NAMES = 4000


def version(subject: Subject) -> Iterator[Result]:
    """Nix is not needed for veneer itself."""
    try:
        found = detect(None, subject.environ, _SECONDS)
    except UsageError as error:
        yield Result("failed" if _url(subject) else "skipped", error.what, error.hint)
        return
    except MachineError as error:
        yield Result("warning", error.story(), error.hint)
        return
    yield judged_version(found, needed=_url(subject) is not None)


def judged_version(found: NixVersion | None, *, needed: bool) -> Result:
    """``needed``: an overlay store is configured, so that Nix must know that kind."""
    if found is not None and found.has_local_overlay:
        return Result("ok", f"{found} has overlay stores")
    shown = f"{found} has no overlay stores" if found else "this Nix does not say its version"
    fix = "use Nix 2.22 or newer" + ("" if needed else ", or name paths: veneer run --closure PATH")
    return Result("failed" if needed else "warning", shown, fix)


def configuration(subject: Subject) -> Iterator[Result]:
    if subject.nix_error:
        yield Result("failed", subject.nix_error, "mend that line: Nix reads the same file")
        return
    features = subject.nix.get("experimental-features", "").split()
    url, lower_read_only = _url(subject), False
    if url is not None:
        lower_read_only = "read-only=" in parse_overlay_url(url).lower_store
    missing = [
        f
        for f, needed in ((FEATURE, url is not None), (_READ_ONLY, lower_read_only))
        if needed and f not in features
    ]
    if missing:
        line = f"extra-experimental-features = {' '.join(missing)}"
        yield Result(
            "failed", f"experimental features are not enabled: {', '.join(missing)}", f"in nix.conf: {line}"
        )
    elif not subject.nix:
        yield Result("skipped", "there is no Nix configuration")
    elif "nix-command" not in features:
        what = "the commands of `nix` (nix build, nix store, …) are not enabled"
        yield Result("warning", what, "in nix.conf: extra-experimental-features = nix-command flakes")
    else:
        yield Result("ok", f"experimental features: {' '.join(features)}")
    remote = subject.environ.get("NIX_REMOTE", "")
    store = subject.nix.get("store", "")
    if remote and store and remote != store and is_overlay_url(remote):
        yield Result("failed", "nix.conf says store =, which goes before NIX_REMOTE", "remove one of the two")


def store_url(subject: Subject) -> Iterator[Result]:
    url = _url(subject)
    if url is None:
        yield Result("skipped", "Nix uses no overlay store here (veneer config nix prints the lines for one)")
        return
    faults = parse_overlay_url(url).faults
    for fault in faults:
        yield Result("failed" if fault.refused else "warning", f"{fault.what}: {url}", fault.fix)
    if not faults:
        yield Result("ok", url)


def mounts(subject: Subject) -> Iterator[Result]:
    store = _store(subject)
    if store is None:
        yield Result("skipped", "Nix uses no overlay store here")
        return
    text = Path("/proc/self/mounts").read_text("utf-8", "surrogateescape")
    merged, lower = store.real_store_dir, store.lower_store_dir
    fault = mount_fault(text, merged, lower, store.upper_layer)
    covering = cover(text, merged)
    if fault is not None and store.check_mount:
        yield Result("failed", f"Nix will say 'mounted incorrectly': {fault.what}", fault.fix)
    elif fault is not None and "no overlay is mounted" in fault.what:
        yield Result("failed", fault.what, fault.fix)
    elif covering is not None:
        yield Result("failed", f"a mount ({covering}) on {merged} hides the overlay", f"umount {merged}")
    elif fault is not None:
        yield Result(
            "ok", f"the overlay is mounted; Nix does not check it (check-mount = false): {fault.what}"
        )
    else:
        yield Result("ok", f"the overlay on {merged} is as Nix wants it")
    if (
        lower
        and not any(line.split(" ")[1:2] == [lower] for line in text.splitlines())
        and store.lower_socket
    ):
        hidden = (
            fault is None or not store.check_mount
        )  # beneath an environment's root it may be mounted all the same
        fix = f"veneer mount {lower}; then {overlay_command(merged, lower, store.upper_layer)}"
        yield Result(
            "warning" if hidden else "failed", f"nothing is mounted on {lower}, the lower store", fix
        )


def remount_hook(subject: Subject) -> Iterator[Result]:
    store = _store(subject)
    if store is None:
        yield Result("skipped", "Nix uses no overlay store here")
    elif not store.remount_hook:
        yield Result(
            "warning",
            "the store has no remount-hook",
            'append &remount-hook= and a script: exec mount -o remount "$1"',
        )
    elif not os.access(store.remount_hook, os.X_OK):
        yield Result("failed", f"{store.remount_hook} cannot be executed", f"chmod 755 {store.remount_hook}")
    else:
        yield Result("ok", store.remount_hook)


def lower_store(subject: Subject) -> Iterator[Result]:
    store = _store(subject)
    if store is None:
        yield Result("skipped", "Nix uses no overlay store here")
    elif store.lower_socket:
        yield greet(store.lower_socket)
    elif store.lower_store_dir:
        yield lower_database.examine(Path(store.lower_store_dir))


def greet(path: str) -> Result:
    """Whether Nix's protocol is spoken on the socket."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_SECONDS)
    answer = b""
    try:
        connection.connect(path)
        # Who hangs up at Nix's greeting, before or after an answer of its own, is another server: not nobody.
        with contextlib.suppress(ConnectionError):
            connection.sendall(wire.encode((wire.CLIENT_MAGIC, wire.VERSION)))
            while len(answer) < 16 and (piece := connection.recv(16 - len(answer))):
                answer += piece
    except OSError as error:
        fix = "veneer daemon, with the sources as flags or in the configuration: only then it has nix.sock"
        return Result("failed", f"nobody answers on {path}: {error.strerror or error}", fix)
    finally:
        connection.close()
    if len(answer) < 16 or struct.unpack("<QQ", answer)[0] != wire.SERVER_MAGIC:
        return Result(
            "failed",
            f"{path} does not speak Nix's protocol",
            "lower-store must name nix.sock, not daemon.sock",
        )
    number = struct.unpack("<QQ", answer)[1]
    return Result("ok", f"{path} speaks Nix's protocol {number >> 8}.{number & 0xFF}")


def both_layers(subject: Subject) -> Iterator[Result]:
    """Names of upper layers that sources have too, as far as the daemon remembers."""
    layers = [directory / "upper" for directory in _environments(subject.environments_dir)]
    store = _store(subject)
    if store is not None and store.upper_layer:
        layers.append(Path(store.upper_layer))
    seen = 0
    for layer in layers:
        try:
            names = sorted(entry.name for entry in layer.iterdir() if is_store_path(entry.name))[:_MOST_NAMES]
        except OSError:
            continue
        seen += 1
        try:
            double = sorted(subject.memory(names)) if names else []
        except VeneerError:
            yield Result("skipped", "no daemon to ask")
            return
        if double:
            what = f"{len(double)} paths of {layer} are in a source too, such as {double[0]}"
            yield Result(
                "warning",
                what,
                f"nix store delete /nix/store/{double[0]} (inside the environment) frees the copy",
            )
            return
    yield (
        Result("ok", f"{seen} upper layers, none has a path of a source")
        if seen
        else Result("skipped", "no upper layers")
    )


def whiteouts(subject: Subject) -> Iterator[Result]:
    """Lower paths that were removed by hand through the merged store: overlayfs hides them for good."""
    store = _store(subject)
    if store is None or not store.upper_layer:
        yield Result("skipped", "Nix uses no overlay store here")
        return
    try:
        with os.scandir(store.upper_layer) as entries:
            hidden = [e.name for e in entries if stat.S_ISCHR(e.stat(follow_symlinks=False).st_mode)]
    except OSError as error:
        yield Result(
            "failed",
            f"{store.upper_layer} cannot be listed: {error.strerror}",
            f"mkdir -p {store.upper_layer}",
        )
        return
    if hidden:
        fix = f"umount {store.real_store_dir}; rm {store.upper_layer}/{hidden[0]}; mount it again"
        yield Result("failed", f"{len(hidden)} lower paths were removed by hand, such as {hidden[0]}", fix)
    else:
        yield Result("ok", "no lower path is hidden")


def stale_names(subject: Subject) -> Iterator[Result]:
    """Named paths that the lower store shows and the merged one does not: looked up before they were there."""
    store = _store(subject)
    if store is None or not subject.paths:
        yield Result("skipped", "needs an overlay store and paths: veneer doctor PATH…")
        return
    for path in subject.paths:
        below = os.path.lexists(f"{store.lower_store_dir}/{path.basename}")
        shown = os.path.lexists(f"{store.real_store_dir}/{path.basename}")
        if below and not shown:
            what = f"{path.basename} is in the lower store and not in the merged one"
            yield Result("failed", what, f"mount -o remount {store.real_store_dir}")
            return
    yield Result("ok", "the merged store shows what the lower one has")


def _url(subject: Subject) -> str | None:
    """The overlay store that Nix would open; ``store`` of nix.conf goes before NIX_REMOTE."""
    for text in (subject.nix.get("store", ""), subject.environ.get("NIX_REMOTE", "")):
        if text and text not in ("auto",):
            return text if is_overlay_url(text) else None
    return None


def _store(subject: Subject) -> StoreUrl | None:
    url = _url(subject)
    return None if url is None else parse_overlay_url(url)


def _environments(directory: Path) -> list[Path]:
    try:
        return sorted(entry for entry in directory.iterdir() if (entry / "upper").is_dir())
    except OSError:
        return []
