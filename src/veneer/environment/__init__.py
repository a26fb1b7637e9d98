"""One merged store with its writable layer, and a command inside: ``run(RunSpec(...))``.

The command sees the host's root; at the store directory it sees an overlay: its own writable layer above our file system
(above the host's own store, if there is one). Nothing of the host is changed, nothing is left when it ends, and no root is
needed where user namespaces are on.

Layout: ``spec`` (what to run) · ``facts`` (the host, read once) · ``plan`` (pure: steps of the new root) · ``apply``
(does and undoes them) · ``syscalls`` (the only ctypes) · ``namespace`` · ``upper`` (writable layers on disk) ·
``serving`` (the mount server's process) · ``keeper`` (starts it and its successors) · ``figures`` (what they told) ·
``init`` (pid 1 inside) · ``channel`` (to the supervisor) · ``supervise`` (the caller's side) · ``living`` (who owns a
named one) · ``join`` (a further command in it) · ``named`` (listed, compared, ended) · ``nix`` (what Nix inside is told,
its database, its daemon) · ``machine`` (refusals in words).
"""

from veneer.environment.join import join
from veneer.environment.living import Living, attach, claim
from veneer.environment.machine import probe
from veneer.environment.spec import NixSpec, RunOutcome, RunSpec
from veneer.environment.supervise import Companion, run

__all__ = [
    "Companion",
    "Living",
    "NixSpec",
    "RunOutcome",
    "RunSpec",
    "attach",
    "claim",
    "join",
    "probe",
    "run",
]
