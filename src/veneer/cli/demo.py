"""``veneer demo``: the whole way from a signed binary cache to a running program, on this machine and offline."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from veneer.cache.directory import wait_until_free
from veneer.cli.options import json_option
from veneer.cli.output import Output, count, format_seconds, format_size, number, table
from veneer.model.errors import UsageError, VeneerError

KEY_NAME = "demo-1"
SHOWN_UNTOUCHED = 8
_SECONDS = 60
_DAEMON_SECONDS = 10


@click.command()
@click.option(
    "--keep",
    metavar="DIR",
    help="Make it in this new directory and leave it: binary-cache, key.pub, program, cache.",
)
@json_option()
@click.pass_obj
def demo(output: Output, keep: str | None) -> int:
    """Show the idea on this machine: offline, without Nix, in seconds.

    Makes a signed binary cache out of programs that are installed here, serves it on 127.0.0.1, runs one of them out of
    /nix/store with `veneer run`, and shows what was fetched and what was not. Needs FUSE, and root or user namespaces.

    \b
    Example:
      veneer demo
    """
    from veneer.cli import demo_closure
    from veneer.environment import probe

    probe()
    with _directory(keep) as root:
        output.note("making a signed binary cache out of programs of this machine")
        began = time.monotonic()
        closure = demo_closure.plan()
        made = _make_cache(root / "binary-cache", closure)
        total = sum(row.nar_size for row in made.rows)
        output.note(
            f"{count(len(made.rows), 'store path')}, {format_size(total)}, in {format_seconds(time.monotonic() - began)}"
        )
        with _server(root / "binary-cache") as url:
            runs = [_run(root, url, made.key, closure.command, output, shown) for shown in ("first", "again")]
        document = _document(made, closure.command, runs)
        output.result(_text(document), document)
        if keep is not None:
            (root / "key.pub").write_text(made.key + "\n")
            (root / "program").write_text(closure.command[0] + "\n")
            flags = f"--cache {root}/binary-cache --trusted-public-key {made.key}"
            output.note(f"kept in {root}: veneer run {flags} -- {closure.command[0]}")
    return next((run.status for run in runs if run.status), 0)


@dataclass(frozen=True, slots=True)
class Row:
    """One store path of the demo's cache; sizes in bytes, of the NAR and of its compressed file."""

    basename: str
    nar_size: int
    file_size: int


@dataclass(frozen=True, slots=True)
class Made:
    key: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One ``veneer run``. ``report``: its own."""

    status: int
    seconds: float
    stdout: str
    report: dict[str, object]


@contextlib.contextmanager
def _directory(keep: str | None) -> Iterator[Path]:
    """The demo's directory; gone afterwards, unless it is to be kept."""
    if keep is not None:
        root = Path(keep).absolute()
        try:
            root.mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"cannot make the directory: {error.strerror}", where=str(root)) from error
    else:
        root = Path(tempfile.mkdtemp(prefix="veneer-demo-"))
    try:
        yield root
    finally:
        wait_until_free(root / "cache", _DAEMON_SECONDS)  # the private daemon outlives its last client
        if keep is None:
            shutil.rmtree(root)


def _make_cache(cache: Path, closure: object) -> Made:
    from veneer.cli.demo_cache import add_path, write_header
    from veneer.cli.demo_closure import Closure
    from veneer.formats.signature import SecretKey

    assert isinstance(closure, Closure)
    key = SecretKey.generate(KEY_NAME)
    write_header(cache)
    infos = [add_path(cache, p.path, p.content, p.references, key) for p in closure.paths]
    rows = tuple(Row(info.store_path.basename, info.nar_size, info.file_size or 0) for info in infos)
    return Made(str(key.public_key()), rows)


@contextlib.contextmanager
def _server(directory: Path) -> Iterator[str]:
    """The URL under which a process of its own serves ``directory``. It ends with its standard input: with us."""
    with subprocess.Popen(
        [sys.executable, "-m", "veneer.cli.demo_server", str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            port = process.stdout.readline().strip()
            if not port:
                raise VeneerError("the demo's HTTP server did not start")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.stdin.close()


def _run(root: Path, url: str, key: str, command: Sequence[str], output: Output, shown: str) -> Run:
    """Run the command as a user would; what it prints is shown as it comes, unless the answer is JSON."""
    (root / "config.toml").write_text(f"environments-dir = {json.dumps(str(root / 'environments'))}\n")
    report = root / f"report-{shown}.json"
    own = ["run", "--cache", url, "--trusted-public-key", key]
    hidden = ["--cache-dir", str(root / "cache"), "--config", str(root / "config.toml"), "--quiet"]
    full = [sys.executable, "-m", "veneer.cli.main", *own, *hidden, "--report", str(report), "--", *command]
    if not output.json:
        output.stdout.write(f"\n$ veneer {shlex.join([*own, '--', *command])}\n")
        output.stdout.flush()
    began = time.monotonic()
    try:
        done = subprocess.run(
            full, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise VeneerError(f"the demo's program did not end within {_SECONDS} s") from error
    seconds = time.monotonic() - began
    if not output.json:
        output.stdout.write(done.stdout)
        output.stdout.flush()
    return Run(done.returncode, seconds, done.stdout, json.loads(report.read_bytes()))


def _document(made: Made, command: Sequence[str], runs: Sequence[Run]) -> dict[str, object]:
    """The demo's answer. Per path: bytes fetched in the first run."""
    first = runs[0].report.get("paths")
    known = first if isinstance(first, dict) else {}
    paths = [
        {
            "path": row.basename,
            "nar_size": row.nar_size,
            "file_size": row.file_size,
            "fetched": number(known.get(row.basename, {}), "fetched"),
            "touched": bool(known.get(row.basename, {}).get("touched", False)),
        }
        for row in made.rows
    ]
    return {
        "command": list(command),
        "closure_bytes": sum(row.nar_size for row in made.rows),
        "download_bytes": sum(row.file_size for row in made.rows),
        "paths": paths,
        "runs": [
            {
                "status": r.status,
                "seconds": round(r.seconds, 3),
                "fetched": number(r.report, "fetched"),
                "stdout": r.stdout,
            }
            for r in runs
        ],
    }


def _text(document: dict[str, object]) -> str:
    paths, runs = document["paths"], document["runs"]
    assert isinstance(paths, list)
    assert isinstance(runs, list)
    fetched = sorted((p for p in paths if p["touched"]), key=lambda p: -p["fetched"])
    left = sorted((p for p in paths if not p["touched"]), key=lambda p: -p["nar_size"])
    rows = [[p["path"], format_size(p["nar_size"]), format_size(p["fetched"])] for p in fetched]
    rows += [[p["path"], format_size(p["nar_size"]), "-"] for p in left[:SHOWN_UNTOUCHED]]
    more = left[SHOWN_UNTOUCHED:]
    if more:
        rows.append(
            [f"({count(len(more), 'more path')})", format_size(sum(p["nar_size"] for p in more)), "-"]
        )
    total = number(document, "download_bytes")
    lines = [
        "",
        table(rows, ("store path", "size", "fetched"), right=(1, 2)),
        "",
        f"touched {len(fetched)} of {count(len(paths), 'store path')}; fetched {format_size(runs[0]['fetched'])}"
        f" of {format_size(total)} ({runs[0]['fetched'] / max(total, 1):.1%}) in {format_seconds(runs[0]['seconds'])}",
        f"again, from the cache: {format_size(runs[1]['fetched'])} fetched in {format_seconds(runs[1]['seconds'])}",
    ]
    return "\n".join(lines)
