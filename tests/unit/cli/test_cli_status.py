"""The status in words."""

from __future__ import annotations

from veneer.cli.status import render


def test_every_part_of_the_daemons_answer_is_shown() -> None:
    text = render(
        {
            "sources": [{"url": "http://a", "verify": "strict"}],
            "pid": 7,
            "uptime_seconds": 3.14159,
            "max_bytes": None,
            "totals": {"paths": 2, "nar_bytes": 2048},
            "downloads": [],
            "connections": [{"peer": "pid 1", "sources": ["http://a", "http://b"]}],
            "stories": [{"time": 0.0, "kind": "SourceError", "text": "down\x1b[2J"}],
        }
    )
    assert "  http://a  strict" in text
    assert "uptime_seconds: 3.14 s" in text
    assert "max_bytes: -" in text
    assert "  nar_bytes  2.0 KiB" in text
    assert "downloads: none" in text
    assert "http://a, http://b" in text
    assert "down\\x1b[2J" in text


def test_nothing_that_another_users_daemon_says_drives_the_terminal() -> None:
    bad = "\x1b[2J\x07"
    text = render({bad: bad, "cache": bad, "list": [{bad: bad}], "dict": {bad: bad}, "words": [bad]})
    assert all(character == "\n" or character.isprintable() for character in text)
