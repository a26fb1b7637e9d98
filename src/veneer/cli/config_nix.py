"""``veneer config nix``: the lines for a nix.conf of one's own, and the commands that they rely on.

Everything printed is meant to be used literally: the settings as they stand, the commands without their ``#``.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from veneer.cli.config import Flags, Settings, source_url
from veneer.cli.options import json_option, settings_flags
from veneer.cli.output import Output
from veneer.formats.overlay_store import STORE, OverlayStore, mount_fault
from veneer.model.errors import UsageError

BASE = "/var/lib/veneer/nix"
FEATURES = ("nix-command", "local-overlay-store")


@dataclass(frozen=True, slots=True)
class Wiring:
    """What the lines are made of. ``work``: beside the upper layer. ``flags``: of the daemon and the mount."""

    store: OverlayStore
    work: str
    flags: tuple[str, ...]
    has_build_group: bool


@click.group()
def config() -> None:
    """Print the lines for your own nix.conf.

    \b
    Example:
      veneer config nix >> ~/.config/nix/nix.conf
    """


@config.command()
@settings_flags()
@click.option(
    "--mount",
    "lower",
    metavar="DIR",
    help=f"The mount's root; veneer mounts DIR{STORE} [default: {BASE}/lower].",
)
@click.option("--upper", metavar="DIR", help=f"The writable layer, on a local disk [default: {BASE}/upper].")
@click.option(
    "--name",
    metavar="ENV",
    help="Use the writable layer and database of this environment, while it is not up.",
)
@click.option(
    "--socket", metavar="FILE", help="The daemon's socket for Nix [default: nix.sock in the cache directory]."
)
@click.option(
    "--merged",
    metavar="DIR",
    default=STORE,
    show_default=True,
    help=f"The merged store; another one ends with {STORE}.",
)
@json_option("The settings and commands as one JSON document.")
@click.pass_obj
def nix(
    output: Output,
    flags: Flags,
    lower: str | None,
    upper: str | None,
    name: str | None,
    socket: str | None,
    merged: str,
) -> None:
    """Print the lines for your own nix.conf, and the commands that go with them.

    For those who start `veneer daemon`, `veneer mount` and the overlay themselves; `veneer run` does all of it. Needs
    root and Nix 2.22 or newer. Changes nothing.

    \b
    Example:
      veneer config nix --cache https://cache.example.org
    """
    from veneer.cli.config import load_settings

    settings = load_settings(flags)
    wiring = wire(settings, flags, lower=lower, upper=upper, name=name, socket=socket, merged=merged)
    document = {
        "settings": dict(setting_lines(wiring)),
        "commands": {"once": once(wiring), "each start": each_start(wiring)},
        "url": wiring.store.url(),
    }
    output.result("\n".join(text_lines(wiring)), document)
    if not output.json:
        for warning in warnings(wiring):
            output.warning(warning)


def wire(
    settings: Settings,
    flags: Flags,
    *,
    lower: str | None = None,
    upper: str | None = None,
    name: str | None = None,
    socket: str | None = None,
    merged: str = STORE,
) -> Wiring:
    """UsageError for paths that Nix's check of the mount would never accept."""
    from veneer.environment.facts import BUILD_GROUP, has_group

    if name is not None and upper is not None:
        raise UsageError("--name and --upper both name the writable layer")
    layer = Path(upper) if upper else Path(BASE) / "upper"
    if name is not None:
        layer = settings.environments_dir / name / "upper"
    root = _resolved(merged)
    if not root.endswith(STORE):
        raise UsageError(
            "the merged store must end with " + STORE,
            where=merged,
            hint=f"--merged {merged.rstrip('/')}{STORE}",
        )
    upper_layer = _resolved(layer)
    store = OverlayStore(
        lower_socket=_resolved(socket or settings.cache_dir / "nix.sock"),
        lower_root=_resolved(lower or f"{BASE}/lower").removesuffix(STORE),
        upper_layer=upper_layer,
        root=root.removesuffix(STORE),
        remount_hook=f"{Path(upper_layer).parent}/remount-hook",
        state_dir=f"{Path(upper_layer).parent}/var/nix" if name is not None else "",
    )
    mounted = f"overlay {store.real_store_dir} overlay lowerdir={store.lower_store_dir},upperdir={upper_layer} 0 0\n"
    fault = mount_fault(mounted, store.real_store_dir, store.lower_store_dir, upper_layer)
    if fault is not None:
        raise UsageError(fault.what, hint=fault.fix)
    return Wiring(
        store, f"{Path(upper_layer).parent}/work", tuple(_flags(flags, settings)), has_group(BUILD_GROUP)
    )


def setting_lines(wiring: Wiring) -> Iterator[tuple[str, str]]:
    """Names and values for nix.conf."""
    yield "extra-experimental-features", " ".join(FEATURES)
    yield "store", wiring.store.url()
    if not wiring.has_build_group:
        yield "build-users-group", ""


def once(wiring: Wiring) -> list[str]:
    store = wiring.store
    directories = (store.lower_store_dir, store.upper_layer, wiring.work, store.real_store_dir)
    hook = shlex.quote(store.remount_hook)
    return [
        "mkdir -p " + " ".join(map(shlex.quote, directories)),
        f"printf '#!/bin/sh\\nexec mount -o remount \"$1\"\\n' > {hook} && chmod 755 {hook}",
    ]


def each_start(wiring: Wiring) -> list[str]:
    flags = [shlex.quote(flag) for flag in wiring.flags]
    return [
        " ".join(["veneer daemon", *flags]),
        " ".join(["veneer mount", shlex.quote(wiring.store.lower_store_dir), *flags]),
        wiring.store.mount_command(wiring.work),
    ]


def text_lines(wiring: Wiring) -> Iterator[str]:
    yield "# Once, as root:"
    yield from (f"#   {command}" for command in once(wiring))
    yield "# At each start, as root, in this order; the first two go on running (services, or terminals of their own):"
    yield from (f"#   {command}" for command in each_start(wiring))
    yield "# Then Nix, as root or through a nix-daemon that is started afterwards. `veneer doctor` says what is missing."
    for name, value in setting_lines(wiring):
        if name == "build-users-group":
            yield "# There is no group nixbld on this machine, so builds run as root:"
        yield f"{name} = {value}".rstrip()


def warnings(wiring: Wiring) -> Iterator[str]:
    """What would surprise on this machine."""
    merged = Path(wiring.store.real_store_dir)
    try:
        has_paths = any(entry.name != ".links" for entry in merged.iterdir()) and not merged.is_mount()
    except OSError:
        return
    if has_paths:
        yield f"{merged} has paths of its own, which the overlay would hide; choose another --merged, or use veneer run"


def _flags(flags: Flags, settings: Settings) -> Iterator[str]:
    yield from ("--cache-dir", str(settings.cache_dir))
    for url in flags.caches:
        yield from ("--cache", source_url(url))
    for key in flags.keys:
        yield from ("--trusted-public-key", key)
    if flags.verify is not None:
        yield from ("--verify", flags.verify)
    if flags.config_file is not None:
        yield from ("--config", str(Path(flags.config_file).absolute()))


def _resolved(path: str | Path) -> str:
    """Absolute and without links: the kernel lists a mount point so, and Nix compares texts."""
    return str(Path(path).resolve())
