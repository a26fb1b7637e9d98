"""nix.conf: Nix's own rules for words, comments, includes and extra- settings."""

from __future__ import annotations

import pytest

from veneer.formats.nix_conf import MAX_INCLUDES, MAX_SIZE, parse_nix_conf, settings
from veneer.model.errors import FormatError, LimitError


def test_words_comments_and_later_values() -> None:
    text = (
        "# head\n\nsubstituters =  http://a \t http://b # tail\nsandbox = true\nsandbox = false\r\nempty =\n"
    )
    assert parse_nix_conf(text) == {
        "substituters": "http://a http://b",
        "sandbox": "false",
        "empty": "",
    }


def test_extra_settings_append_to_what_is_there_or_to_the_default() -> None:
    values = parse_nix_conf("extra-substituters = http://a\nextra-substituters = http://b\nextra-own = x\n")
    default = settings({}).substituters
    assert settings(values).substituters == (*default, "http://a", "http://b")
    assert values["own"] == "x"
    values = parse_nix_conf("substituters = http://c\n", base=values)
    values = parse_nix_conf("extra-substituters = http://d\nextra-substituters = http://c", base=values)
    assert settings(values).substituters == ("http://c", "http://d")


def test_extra_of_a_single_value_is_ignored() -> None:
    assert parse_nix_conf("extra-netrc-file = /x\n") == {}


def test_old_names_mean_the_new_ones() -> None:
    values = parse_nix_conf(
        "binary-caches = http://a\nextra-binary-caches = http://b\nbinary-cache-public-keys = k:A\n"
    )
    assert values == {"substituters": "http://a http://b", "trusted-public-keys": "k:A"}


def test_defaults_are_those_of_nix() -> None:
    found = settings({})
    assert found.netrc_file == "/etc/nix/netrc"
    assert found.ssl_cert_file is None
    assert found.require_sigs is True
    assert found.narinfo_cache_negative_ttl == 3600
    assert len(found.substituters) == len(found.trusted_public_keys) == 1
    assert found.trusted_substituters == ()


def test_typed_values() -> None:
    text = "require-sigs = no\nnarinfo-cache-negative-ttl = 0\nssl-cert-file = /ca.crt\ntrusted-substituters = x x y"
    found = settings(parse_nix_conf(text))
    assert found.require_sigs is False
    assert found.narinfo_cache_negative_ttl == 0
    assert found.ssl_cert_file == "/ca.crt"
    assert found.trusted_substituters == ("x", "y")


@pytest.mark.parametrize(
    "text", ["require-sigs = maybe", "narinfo-cache-negative-ttl = -1", "require-sigs ="]
)
def test_values_of_the_wrong_type_are_refused_when_asked_for(text: str) -> None:
    with pytest.raises(FormatError):
        settings(parse_nix_conf(text))


def test_includes_are_relative_to_the_including_file_and_stand_in_place() -> None:
    files = {
        "/etc/nix/more/a.conf": "x = 1\ninclude ../b.conf\n",
        "/etc/nix/b.conf": "x = 2\n!include missing\n",
    }
    text = "x = 0\ninclude more/a.conf\ny = 3\n"
    assert parse_nix_conf(text, path="/etc/nix/nix.conf", include=files.get) == {"x": "2", "y": "3"}
    assert parse_nix_conf("include /etc/nix/b.conf", path="/home/nix.conf", include=files.get) == {"x": "2"}


def test_a_missing_include_is_told_with_its_place() -> None:
    with pytest.raises(FormatError, match=r"/a/gone.*\(/a/nix\.conf line 2\)"):
        parse_nix_conf("\ninclude gone\n", path="/a/nix.conf")


def test_files_that_include_themselves_are_refused() -> None:
    with pytest.raises(LimitError):
        parse_nix_conf("include nix.conf", path="/nix.conf", include=lambda _: "include nix.conf")


def test_files_that_include_themselves_twice_are_refused_at_once() -> None:
    asked: list[str] = []

    def include(name: str) -> str:
        asked.append(name)
        return "!include nix.conf\n" * (2 if len(asked) < MAX_INCLUDES else 0)

    with pytest.raises(LimitError):
        parse_nix_conf("include nix.conf\n" * 2, path="/nix.conf", include=include)
    assert len(asked) <= MAX_INCLUDES


def test_many_files_may_be_included_one_after_the_other() -> None:
    text = "include a\n" * MAX_INCLUDES
    assert parse_nix_conf(text, include=lambda _: "x = 1") == {"x": "1"}
    with pytest.raises(LimitError, match="includes"):
        parse_nix_conf(text + "include b\n", include=lambda _: "x = 1")


@pytest.mark.parametrize(
    "text", ["word", "a b", "a=b", "= b", "include", "include a b", "include = b", "a b = c"]
)
def test_other_lines_are_refused(text: str) -> None:
    with pytest.raises(FormatError):
        parse_nix_conf(text)


def test_a_huge_file_is_refused() -> None:
    with pytest.raises(LimitError):
        parse_nix_conf("#" * (MAX_SIZE + 1))
