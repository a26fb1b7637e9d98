"""All checks, in the order in which they are shown, and how they are run. The reference page is made from this table."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from veneer.doctor import machine, nix, places, sources
from veneer.doctor.finding import STATES, Check, Finding, Result, Subject
from veneer.model.errors import VeneerError

CHECKS = (
    Check("kernel", "machine", "the version of Linux", "overlays without root need 5.11", machine.kernel),
    Check(
        "fuse device", "machine", "/dev/fuse can be opened", "the store is a FUSE file system", machine.fuse
    ),
    Check(
        "user namespaces",
        "machine",
        "they can be made by a user (tried)",
        "without root every mount needs one",
        machine.namespaces,
        10.0,
    ),
    Check(
        "overlay",
        "machine",
        "mounting, writing through an overlay, mounting FUSE (tried, in namespaces that end at once)",
        "an environment's store is an overlay on the mount",
        machine.overlay,
        10.0,
    ),
    Check(
        "stale mounts",
        "machine",
        "each mount of veneer is served",
        "every access to a mount without a server fails: Transport endpoint is not connected",
        machine.stale_mounts,
    ),
    Check(
        "cache directory",
        "cache",
        "it is ours and can be written to",
        "what is fetched is kept there",
        places.cache_directory,
    ),
    Check(
        "disk space",
        "cache",
        "free space against the size limit",
        "a full disk fails reads",
        places.disk_space,
    ),
    Check(
        "file system",
        "cache",
        "its type",
        "locks and mapped files do not work everywhere; memory is soon full",
        places.file_system,
    ),
    Check(
        "index",
        "cache",
        "the index is there and is one",
        "without it everything is fetched again",
        places.index,
    ),
    Check(
        "daemon",
        "daemon",
        "it answers, in our version, and is ours",
        "one daemon serves a cache directory",
        places.daemon,
        12.0,
    ),
    Check(
        "failures",
        "daemon",
        "what failed lately",
        "a read that fails is an I/O error to programs",
        places.failures,
        12.0,
    ),
    Check(
        "sources",
        "sources",
        "nix-cache-info of each: answers, store directory, priority",
        "what no source has cannot be read",
        sources.reachable,
        15.0,
    ),
    Check("keys", "sources", "keys parse, and there are some", "unsigned paths are refused", sources.keys),
    Check(
        "clock",
        "sources",
        "our time against that of HTTP sources",
        "certificates and absences count by it",
        sources.clock,
        15.0,
    ),
    Check(
        "named paths",
        "sources",
        "who has the paths given as arguments, and whether the sources agree on their NarHash",
        "of two different contents the first source's is used",
        sources.named_paths,
        20.0,
    ),
    Check(
        "nix version",
        "nix",
        "Nix 2.22 or newer, and no fork",
        "older ones have no local-overlay store",
        nix.version,
        6.0,
    ),
    Check(
        "nix.conf",
        "nix",
        "it can be read; experimental features; store against NIX_REMOTE",
        "Nix refuses what is not enabled",
        nix.configuration,
    ),
    Check(
        "store URL",
        "nix",
        "encoding, lower-store, root, read-only, upper-layer of a local-overlay URL",
        "one wrong character leads Nix to another store",
        nix.store_url,
    ),
    Check(
        "overlay mount",
        "nix",
        "Nix's check-mount rules on /proc/self/mounts, and the mount beneath",
        "Nix refuses to start: mounted incorrectly",
        nix.mounts,
    ),
    Check(
        "remount hook",
        "nix",
        "it can be executed",
        "a path deleted in the upper layer else stays an empty directory",
        nix.remount_hook,
    ),
    Check(
        "lower store",
        "nix",
        "the daemon's socket answers Nix's protocol; of a directory, that its database and files agree",
        "Nix asks it which paths are valid",
        nix.lower_store,
        10.0,
    ),
    Check(
        "upper paths below",
        "nix",
        "upper layers against what the daemon remembers of the sources",
        "they occupy space twice, and hide what the source has",
        nix.both_layers,
        12.0,
    ),
    Check(
        "hidden paths",
        "nix",
        "whiteouts in the upper layer",
        "a path removed by hand is gone while Nix calls it valid",
        nix.whiteouts,
    ),
    Check(
        "stale names",
        "nix",
        "the paths given as arguments, in the lower store and in the merged one",
        "an overlay remembers absences: a path that came later stays invisible",
        nix.stale_names,
        35.0,
    ),
)


@dataclass(slots=True)
class _Run:
    check: Check
    subject: Subject
    results: list[Result] = field(default_factory=list)

    def work(self) -> None:
        # Whatever a check meets is a finding: the others must be heard.
        try:
            self.results += self.check.examine(self.subject)
        except VeneerError as error:
            self.results.append(Result("failed", error.story(), error.hint))
        except Exception as error:  # noqa: BLE001
            self.results.append(
                Result("warning", f"this check failed itself: {type(error).__name__}: {error}")
            )


def examine(subject: Subject, checks: Sequence[Check] = CHECKS) -> Iterator[Finding]:
    """Findings in the table's order. The checks run at the same time; one that takes too long is a failure."""
    runs = [_Run(check, subject) for check in checks]
    threads = [threading.Thread(target=run.work, daemon=True, name=run.check.name) for run in runs]
    for thread in threads:
        thread.start()
    for run, thread in zip(runs, threads, strict=True):
        check = run.check
        thread.join(check.seconds)
        results = list(run.results)
        if thread.is_alive():
            results.append(
                Result("failed", f"no answer within {check.seconds:g} s", "is something it looks at hanging?")
            )
        for result in results:
            yield Finding(check.name, check.group, result.state, result.what, check.why, result.fix)


def worst(findings: Sequence[Finding]) -> str:
    """The worst state among them; "ok" when there are none."""
    return min((finding.state for finding in findings), key=STATES.index, default="ok")


def page() -> str:
    """The reference page."""
    lines = [
        "<!-- Made by `python -m veneer.cli.reference`; change the code, not this page. -->\n",
        "# Checks of veneer doctor\n",
        "`veneer doctor [PATH…]` changes nothing. Exit status 0 when no check failed, else 1. With `--json`: a list `findings` of",
        "`name`, `group`, `state` (`failed`, `warning`, `ok`, `skipped`), `what`, `why`, `fix`, and `worst`, the worst state.\n",
        "| check | looks at | because | at most |",
        "| --- | --- | --- | --- |",
    ]
    lines += (f"| {c.group}: {c.name} | {c.looks_at} | {c.why} | {c.seconds:g} s |" for c in CHECKS)
    return "\n".join(lines) + "\n"
