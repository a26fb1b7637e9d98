"""What a run cost: the mount server's figures (touched, waited) and the daemon's (fetched) put together. Pure.

The document of ``veneer run --report``; times in seconds, sizes in bytes:

    {"command": [...], "status": int, "seconds": float,
     "closure": {"paths": n, "bytes": n} or null    (of all paths touched; null: nobody can say yet)
     "fetched": n                                    (over the wire, metadata included)
     "requests": n, "waited": float, "touched": n,
     "prefetched": {"paths", "done", "changed", "unmatched", "skipped", "failed", "bytes": n}    (with --prefetch; `Prefetched`)
     "paths": {base name: {"touched": bool, "bytes": n read by the kernel, "first_touch": seconds after the start or null,
                           "wait": float, "fetched": n over the wire, "fetched_nar": n}},
     "failures": [{"at": seconds since the epoch, "errno", "where", "why"}]    (the last ones that readers met)
     "failure_count": n, "warnings": [sentence, ...]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from veneer.cli.output import count, format_seconds, format_size, number
from veneer.model.errors import printable

SHOWN_FAILURES = 5

Document = Mapping[str, object]


def touched(mount: Document) -> list[str]:
    """Base names of the store paths that the run touched."""
    return [name for name, row in _rows(mount).items() if _is_touched(row)]


def combine(
    command: Sequence[str], status: int, seconds: float, mount: Document, daemon: Document | None
) -> dict[str, object]:
    """The report. ``mount``: RunOutcome.report; ``daemon``: the answer to control "report", None when there was none."""
    served, moved = _rows(mount), _rows(daemon or {})
    paths = {name: _path(served.get(name, {}), moved.get(name, {})) for name in sorted({*served, *moved})}
    closure = None
    if daemon is not None and daemon.get("closure_paths") is not None:
        closure = {"paths": number(daemon, "closure_paths"), "bytes": number(daemon, "closure_bytes")}
    return {
        "command": list(command),
        "status": status,
        "seconds": round(seconds, 6),
        "closure": closure,
        "fetched": number(daemon or {}, "wire_bytes"),
        "requests": number(daemon or {}, "requests"),
        "waited": round(sum(_seconds(row, "wait_seconds") for row in served.values()), 6),
        "touched": sum(1 for row in paths.values() if row["touched"]),
        **({"prefetched": daemon["prefetched"]} if daemon and "prefetched" in daemon else {}),
        "paths": paths,
        "failures": list(_list(mount, "failures")),
        "failure_count": number(mount, "failure_count"),
        "warnings": [str(text) for text in _list(mount, "warnings")],
    }


def closing_line(report: Document) -> str:
    """One line for people."""
    paths = number(report, "touched")
    if not paths:
        return "no store path was touched"
    closure, fetched = report.get("closure"), format_size(number(report, "fetched"))
    waited = f"waited {format_seconds(_seconds(report, 'waited'))}"
    if not isinstance(closure, dict) or not number(closure, "bytes"):
        return f"touched {count(paths, 'store path')}, fetched {fetched}, {waited}"
    share = number(report, "fetched") / number(closure, "bytes")
    return (
        f"closure {format_size(number(closure, 'bytes'))} in {count(number(closure, 'paths'), 'path')},"
        f" fetched {fetched} ({share:.1%}), touched {count(paths, 'path')}, {waited}"
    )


def troubles(mount: Document) -> list[str]:
    """The stories of the failures that readers met, one line each: the command saw only their errno."""
    failures = [row for row in _list(mount, "failures") if isinstance(row, dict)]
    shown = failures[-SHOWN_FAILURES:]
    lines = [f"{row.get('errno')} on {row.get('where')}: {row.get('why')}" for row in shown]
    more = number(mount, "failure_count") - len(shown)
    if more > 0:
        lines.append(f"and {count(more, 'earlier failure')}")
    return [printable(line) for line in lines]


def _list(document: Document, key: str) -> list[object]:
    value = document.get(key)
    return value if isinstance(value, list) else []


def _path(served: Document, moved: Document) -> dict[str, object]:
    first = served.get("first_touch")
    return {
        "touched": _is_touched(served),
        "bytes": number(served, "bytes_read"),
        "first_touch": first if isinstance(first, int | float) else None,
        "wait": _seconds(served, "wait_seconds"),
        "fetched": number(moved, "fetched_wire"),
        "fetched_nar": number(moved, "fetched_nar"),
    }


def _is_touched(row: Document) -> bool:
    return row.get("first_touch") is not None


def _rows(document: Document) -> dict[str, Document]:
    rows = document.get("paths")
    if not isinstance(rows, dict):
        return {}
    return {str(row.get("name") or name): row for name, row in rows.items() if isinstance(row, dict)}


def _seconds(document: Document, key: str) -> float:
    value = document.get(key)
    return round(float(value), 6) if isinstance(value, int | float) else 0.0
