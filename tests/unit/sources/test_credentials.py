"""Logins from URLs, netrc files and AWS's files."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from veneer.model.errors import UsageError
from veneer.sources.credentials import AwsProfile, Logins, read_aws_profile
from veneer.sources.options import parse_source_url
from veneer.sources.stored_objects import s3_settings


def login(header: str | None) -> str | None:
    return None if header is None else base64.b64decode(header.removeprefix("Basic ")).decode()


@pytest.fixture
def netrc_file(tmp_path: Path) -> Path:
    file = tmp_path / "netrc"
    file.write_text(
        "machine cache.example login alice password wonder\nmachine other.example login bob password b\n"
    )
    return file


def test_netrc_logins_go_by_host(netrc_file: Path) -> None:
    logins = Logins(parse_source_url("https://cache.example"), netrc_file)
    assert login(logins.authorization("https://cache.example/x")) == "alice:wonder"
    assert login(logins.authorization("https://other.example/x")) == "bob:b"
    assert logins.authorization("https://third.example/x") is None


def test_the_urls_login_is_for_its_own_origin_only(netrc_file: Path) -> None:
    logins = Logins(parse_source_url("https://me:own@cache.example/base"), netrc_file)
    assert login(logins.authorization("https://cache.example:443/anything")) == "me:own"
    assert login(logins.authorization("http://cache.example/x")) == "alice:wonder"
    assert login(logins.authorization("https://cache.example:8443/x")) == "alice:wonder"


def test_an_absent_netrc_file_is_an_empty_one(tmp_path: Path) -> None:
    logins = Logins(parse_source_url("https://cache.example"), tmp_path / "absent")
    assert logins.authorization("https://cache.example/x") is None


@pytest.mark.parametrize("content", [b"machine\n", b"gibberish here\n", b"\xff\xfe\x00"])
def test_a_broken_netrc_file_is_told_without_its_content(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "netrc"
    file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        Logins(parse_source_url("https://cache.example"), file)
    assert caught.value.where == str(file)


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("AWS_SHARED_CREDENTIALS_FILE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(
        "[default]\naws_access_key_id = D\naws_secret_access_key = d%d\n"
        "[ci]\naws_access_key_id = C\naws_secret_access_key = c\naws_session_token = t\n"
    )
    (tmp_path / ".aws/config").write_text("[default]\nregion = eu-1\n[profile ci]\nregion = us-9\n")
    return tmp_path


def test_aws_profiles_are_read(aws: Path) -> None:
    environ = {"HOME": str(aws)}
    assert read_aws_profile("default", environ) == AwsProfile("D", "d%d", "", "eu-1")
    assert read_aws_profile("ci", environ) == AwsProfile("C", "c", "t", "us-9")
    assert read_aws_profile("none", environ) == AwsProfile()
    assert read_aws_profile("ci", {"HOME": "/nonexistent"}) == AwsProfile()


def test_s3_settings_follow_nix_keys(aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "s3://bucket?profile=ci&endpoint=minio:9000&scheme=http"
    assert s3_settings(parse_source_url(url)) == {
        "region": "us-9",
        "endpoint": "http://minio:9000",
        "virtual_hosted_style_request": False,
        "access_key_id": "C",
        "secret_access_key": "c",
        "session_token": "t",
    }
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "E")
    assert s3_settings(parse_source_url("s3://bucket?region=r")) == {"region": "r"}


def test_an_own_endpoint_without_credentials_is_asked_anonymously(aws: Path) -> None:
    (aws / ".aws/credentials").unlink()
    settings = s3_settings(parse_source_url("s3://bucket?endpoint=http://minio:9000"))
    assert settings["skip_signature"] is True
