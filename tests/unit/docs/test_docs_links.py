"""What the documentation names is there: files, headings, commands and flags."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from veneer.cli.main import COMMANDS, group

ROOT = Path(__file__).parents[3]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```.*?\n(.*?)^```|`([^`\n]+)`", re.DOTALL | re.MULTILINE)
_COMMAND = re.compile(r"(?:^|[\s$/(])veneer ([^\n|#;)]*)")
_FLAG = re.compile(r"--[a-z][a-z-]*")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def pages() -> list[object]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES]


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for target in _LINK.findall(page.read_text("utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert not dead


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
        for heading in _HEADING.findall(page.read_text("utf-8"))
    }


@pytest.mark.parametrize("page", pages())
def test_commands_and_flags_exist(page: Path) -> None:
    wrong = []
    for block, inline in _CODE.findall(page.read_text("utf-8")):
        for line in _COMMAND.findall((block or inline).replace("\\\n", " ")):
            words = line.split(" -- ")[0].split()
            if not words or not re.fullmatch(r"[a-z]+", words[0]):
                continue  # `veneer --version`, `veneer …`
            if words[0] not in COMMANDS:
                wrong.append(f"veneer {words[0]}")
                continue
            known = flags(words[0])
            wrong += [
                f"veneer {words[0]} {flag}" for flag in _FLAG.findall(" ".join(words)) if flag not in known
            ]
    assert not wrong


def flags(name: str) -> set[str]:
    context = click.Context(group, info_name="veneer", **group.context_settings)
    command = group.get_command(context, name)
    assert command is not None
    below = command.commands.values() if isinstance(command, click.Group) else ()
    return {"--help"}.union(*(p.opts for each in (command, *below) for p in each.params))
