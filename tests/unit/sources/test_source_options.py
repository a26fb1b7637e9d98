"""Store URLs: what is accepted, what is identity, and that secrets show nowhere."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.model.errors import UsageError
from veneer.sources.options import parse_source_url, unknown_keys, without_secrets


@pytest.mark.parametrize(
    ("text", "url", "address"),
    [
        ("https://cache.nixos.org", "https://cache.nixos.org", "https://cache.nixos.org"),
        ("https://cache.nixos.org/", "https://cache.nixos.org", "https://cache.nixos.org"),
        ("http://HOST:8080/a%20b/c/?priority=3", "http://host:8080/a%20b/c", "http://host:8080/a%20b/c"),
        ("http://[::1]:80/x", "http://[::1]:80/x", "http://[::1]:80/x"),
        ("file:///srv/my%20cache/", "file:///srv/my%20cache", "/srv/my cache"),
        ("file:///", "file:///", "/"),
        ("/srv/my cache", "file:///srv/my%20cache", "/srv/my cache"),
        ("/srv/50%25?x=1", "file:///srv/50%2525%3Fx%3D1", "/srv/50%25?x=1"),
        ("s3://bucket", "s3://bucket", "bucket"),
        ("s3://bucket/pre%20fix?region=eu-1", "s3://bucket/pre%20fix?region=eu-1", "bucket/pre fix"),
        ("gs://bucket/x", "gs://bucket/x", "bucket/x"),
        ("az://account/container", "az://account/container", "account/container"),
        ("local", "local", "/nix/store"),
        ("local?priority=3&trusted=true", "local", "/nix/store"),
        ("local?root=/mnt/a%20b/", "local?root=/mnt/a%20b", "/mnt/a b/nix/store"),
        ("local:///mnt/x", "local?root=/mnt/x", "/mnt/x/nix/store"),
        ("local?root=", "local", "/nix/store"),
        ("local?root=/", "local?root=/", "/nix/store"),
        ("local?state=/s&real=/r&root=/x", "local?root=/x&real=/r&state=/s", "/r"),
    ],
)
def test_identity_and_address(text: str, url: str, address: str) -> None:
    config = parse_source_url(text)
    assert (config.url, config.address) == (url, address)


def test_a_relative_directory_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_source_url("./cache").address == os.path.join(tmp_path, "cache")  # noqa: PTH118
    assert parse_source_url("cache").address == str(tmp_path / "cache")


def test_identity_is_parsed_back_to_itself() -> None:
    for text in (
        "file:///a%20b",
        "https://u:p@host/x?priority=1",
        "s3://b/c?endpoint=http://h:1&region=r",
        "/x?y#z",
        "local",
        "local:///x?real=/a%26b&state=/s&store=/gnu/store",
    ):
        url = parse_source_url(text).url
        assert parse_source_url(url).url == url


def test_keys_of_every_source() -> None:
    config = parse_source_url("https://host?priority=-5&trusted=true&want-mass-query=1")
    assert (config.priority, config.trusted, config.want_mass_query) == (-5, True, True)
    plain = parse_source_url("https://host")
    assert (plain.priority, plain.trusted, plain.want_mass_query) == (None, False, None)
    assert parse_source_url("https://host?trusted=false").trusted is False


def test_nix_keys_for_writers_are_ignored_and_others_told() -> None:
    config = parse_source_url(
        "file:///x?compression=zstd&nobody-knows=1&secret-key=/k&parallel-compression=true&nobody-knows=2&\x1b=3"
    )
    assert config.unknown == ("nobody-knows", "\\x1b")
    assert unknown_keys("https://host?region=eu&priority=3") == ("region",)
    assert unknown_keys("s3://bucket?region=eu&buffer-size=3") == ()
    assert unknown_keys("https://host?trustd=true&other=1") == ()  # refused as a whole when it is opened


@pytest.mark.nix
def test_every_key_of_nix_has_an_effect_or_none_that_matters_here(nix_programs: Path, tmp_path: Path) -> None:
    environment = os.environ | {"NIX_STATE_DIR": str(tmp_path), "HOME": str(tmp_path)}  # it makes a profile
    command = [str(nix_programs / "nix"), "__dump-cli"]
    done = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60)
    stores = json.loads(done.stdout)["stores"]
    for kind, url in (("HTTP", "https://host"), ("Local", "file:///x"), ("S3", "s3://bucket")):
        keys = set(stores.get(f"{kind} Binary Cache Store", {"settings": ()})["settings"])  # S3: not in all
        values = {"priority": "1", "trusted": "true", "want-mass-query": "true"}
        query = "&".join(f"{key}={values.get(key, 'x')}" for key in sorted(keys))
        assert set(parse_source_url(f"{url}?{query}").unknown) <= {"tls-certificate", "tls-private-key"}


def test_a_store_directory_has_its_state_where_nix_has_it() -> None:
    for text, state in (
        ("local", "/nix/var/nix"),
        ("local?root=/x", "/x/nix/var/nix"),
        ("local?root=/x&state=/s", "/s"),
        ("local?real=/x", "/nix/var/nix"),
    ):
        assert parse_source_url(text).state_dir == state


def test_s3_keys_are_part_of_the_identity() -> None:
    config = parse_source_url(
        "s3://bucket?region=r&endpoint=https://minio:9000&profile=p&scheme=http&priority=1"
    )
    assert config.url == "s3://bucket?endpoint=https://minio:9000&profile=p&region=r&scheme=http"
    assert dict(config.s3)["endpoint"] == "https://minio:9000"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "not a store URL"),
        ("http:host", "not a store URL"),
        ("ssh://host", "not supported: ssh"),
        ("http://", "no host"),
        ("https:///path", "no host"),
        ("s3:///x", "no bucket"),
        ("file://relative/path", "names no host"),
        ("http://host:port", "not a URL"),
        ("http://[::1", "not a URL"),
        ("http://host/#x", "fragment"),
        ("http://host?priority=high", "not a number"),
        ("http://host?priority=1_0", "not a number"),
        ("http://host?trusted=maybe", "neither true nor false"),
        ("http://host?trusted=", "neither true nor false"),
        ("http://host?trustd=true", "unknown key"),
        ("http://host?prioritiy=1", "unknown key"),
        ("s3://bucket?endpont=x", "unknown key"),
        ("local?rot=/x", "unknown key"),
        ("local?root=x", "not an absolute path"),
        ("local?state=/a%00b", "not an absolute path"),
        ("local://x", "not an absolute path"),
        ("local:///x?root=/y", "two roots"),
        ("local:/x", "not a store URL"),
    ],
)
def test_refused_urls_say_why(text: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        parse_source_url(text)


def test_a_near_miss_gets_a_hint() -> None:
    with pytest.raises(UsageError) as caught:
        parse_source_url("http://host?trustd=true")
    assert caught.value.hint == "did you mean trusted?"


def test_secrets_show_nowhere() -> None:
    config = parse_source_url("https://us%3Aer:pa%40ss@host/x")
    assert (config.user, config.password) == ("us:er", "pa@ss")
    assert config.url == config.address == "https://host/x"
    assert "pa" not in repr(config)
    for text in ("https://u:secret@host:port/", "https://u:secret@host?trustd=1", "ssh://u:secret@host"):
        with pytest.raises(UsageError) as caught:
            parse_source_url(text)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://u:p@host/a?token=x#y", "https://host/a"),
        ("local?root=/x", "local?root=/x"),
        ("https://u:p@ss@host/a", "https://host/a"),
        ("https://host/a@b", "https://host/a@b"),
        ("https://host/\x1b[31m", "https://host/\\x1b[31m"),
    ],
)
def test_urls_in_messages_hold_no_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


@given(
    st.text(max_size=80),
    st.sampled_from(
        ["", "http://", "https://u:p@h/", "file:///", "s3://b/", "gs://", "local?root=/", "local://"]
    ),
)
def test_any_text_is_accepted_or_refused_as_usage(text: str, before: str) -> None:
    try:
        config = parse_source_url(before + text)
    except UsageError:
        return
    assert config.url.isprintable()
