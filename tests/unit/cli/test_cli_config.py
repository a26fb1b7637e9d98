"""Settings: what goes before what, and what a misspelt configuration says."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.cli.config import Flags, load_settings, nix_conf_files, source_url
from veneer.cli.limits import LIMITS, Limit, store_limits
from veneer.cli.output import parse_size
from veneer.cli.private_daemon import daemon_command
from veneer.daemon.worker import ANSWER_SECONDS
from veneer.model.errors import UsageError
from veneer.mount.misses import MAX_PARKED
from veneer.sources.options import parse_source_url
from veneer.store.store import Limits

NIX_CONF = "substituters = https://one.example s3://bucket?region=x ssh://builder daemon\ntrusted-public-keys = a-1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA= b-1:BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBA=\n"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A user with nothing configured."""
    return {
        "HOME": str(tmp_path / "home"),
        "NIX_CONF_DIR": str(tmp_path / "nix"),
        "XDG_CONFIG_DIRS": str(tmp_path / "xdg"),
    }


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_without_any_configuration_nix_defaults_hold(environ: dict[str, str]) -> None:
    settings = load_settings(Flags(), environ, uid=1000)
    assert [s.url for s in settings.sources] == ["https://cache.nixos.org/"]
    assert settings.keys[0].startswith("cache.nixos.org-1:")
    assert settings.require_signatures
    assert settings.cache_dir == Path(environ["HOME"], ".cache/veneer")
    assert settings.environments_dir == Path(environ["HOME"], ".local/state/veneer/environments")


def test_root_has_system_directories(environ: dict[str, str], tmp_path: Path) -> None:
    settings = load_settings(Flags(config_file=str(write(tmp_path / "c", ""))), environ, uid=0)
    assert settings.cache_dir == Path("/var/cache/veneer")
    assert settings.environments_dir == Path("/var/lib/veneer/environments")


def test_xdg_directories_are_honoured(environ: dict[str, str]) -> None:
    xdg = {"XDG_CACHE_HOME": "/c", "XDG_STATE_HOME": "/s", "XDG_CONFIG_HOME": "relative is ignored"}
    settings = load_settings(Flags(), environ | xdg, uid=1000)
    assert (settings.cache_dir, settings.environments_dir) == (
        Path("/c/veneer"),
        Path("/s/veneer/environments"),
    )


def test_sources_and_keys_come_from_nix_conf(environ: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path / "nix/nix.conf", NIX_CONF)
    write(tmp_path / "nix/netrc", "")
    settings = load_settings(Flags(), environ, uid=1000)
    assert [s.url for s in settings.sources] == ["https://one.example", "s3://bucket?region=x"]
    assert settings.keys == (
        "a-1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        "b-1:BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBA=",
    )
    assert settings.netrc == str(tmp_path / "nix/netrc")


def test_user_files_add_to_the_system_file_and_nix_config_has_the_last_word(
    environ: dict[str, str], tmp_path: Path
) -> None:
    write(tmp_path / "nix/nix.conf", NIX_CONF)
    write(tmp_path / "home/.config/nix/nix.conf", "extra-substituters = https://two.example\n")
    environ["NIX_CONFIG"] = "require-sigs = false"
    settings = load_settings(Flags(), environ, uid=1000)
    assert [s.url for s in settings.sources][-1] == "https://two.example"
    assert not settings.require_signatures


def test_nix_user_conf_files_replace_the_usual_places(environ: dict[str, str], tmp_path: Path) -> None:
    environ["NIX_USER_CONF_FILES"] = "/first:/second"
    assert nix_conf_files(environ) == [tmp_path / "nix/nix.conf", Path("/second"), Path("/first")]


def test_given_caches_and_keys_replace_all_others_and_nix_conf_is_not_read(
    environ: dict[str, str], tmp_path: Path
) -> None:
    write(tmp_path / "nix/nix.conf", "this is not a nix.conf")
    settings = load_settings(
        Flags(
            caches=("http://a",), keys=("k:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",), verify="deferred"
        ),
        environ,
        uid=1000,
    )
    assert settings.view("s")["sources"] == [{"url": "http://a", "verify": "deferred"}]
    assert settings.keys == ("k:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",)
    assert settings.view("s")["session"] == "s"


def test_the_configuration_file_goes_before_nix_conf(environ: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path / "nix/nix.conf", NIX_CONF)
    write(
        tmp_path / "home/.config/veneer/config.toml",
        'max-size = "2G"\nnegative-ttl = 3\nrequire-signatures = false\ncache-dir = "~/c"\n[[source]]\n'
        'url = "https://a.example?x=y"\npriority = 3\ntrusted = true\nverify = "deferred"\n[[source]]\nurl = "/srv/c"\n',
    )
    settings = load_settings(Flags(), environ, uid=1000)
    assert [(s.url, s.verify) for s in settings.sources] == [
        ("https://a.example?x=y&priority=3&trusted=true", "deferred"),
        ("file:///srv/c", "strict"),
    ]
    assert settings.keys == (
        "a-1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        "b-1:BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBA=",
    )
    assert (settings.max_bytes, settings.negative_ttl, settings.require_signatures) == (2 << 30, 3.0, False)


def test_flags_go_before_the_configuration_file(environ: dict[str, str], tmp_path: Path) -> None:
    config = write(tmp_path / "c.toml", 'max-size = 5\ncache-dir = "/a"\n')
    flags = Flags(cache_dir="/b", max_size="6", config_file=str(config))
    settings = load_settings(flags, environ, uid=1000)
    assert (settings.cache_dir, settings.max_bytes) == (Path("/b"), 6)


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("max-sise = 1", "unknown key 'max-sise'", "did you mean max-size?"),
        ("max-size = true", "max-size must be string or integer", ""),
        ("trusted-public-keys = [1]", "trusted-public-keys must be strings", ""),
        ("source = [1]", "source must be tables", "write [[source]]"),
        ("[[source]]\npriority = 1", "a source without url", "url ="),
        ('[[source]]\nurl = "a"\nverify = "no"', "verify must be strict or deferred", ""),
        ('[[source]]\nurl = "a"\nkind = "b"', "unknown key 'kind'", "known keys"),
        ("= 1", "not TOML", ""),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_place(
    environ: dict[str, str], tmp_path: Path, text: str, what: str, hint: str
) -> None:
    config = write(tmp_path / "c.toml", text)
    with pytest.raises(UsageError) as caught:
        load_settings(Flags(config_file=str(config)), environ, uid=1000)
    assert what in caught.value.what
    assert str(config) in caught.value.where
    assert hint in caught.value.hint


def test_a_named_configuration_file_must_be_there(environ: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="no such configuration file"):
        load_settings(Flags(config_file="/no/such"), environ, uid=1000)


def test_nix_ssl_cert_file_goes_first(environ: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path / "nix/nix.conf", "ssl-cert-file = /from/conf\n")
    environ["SSL_CERT_FILE"] = "/last"
    assert load_settings(Flags(), environ, uid=1000).ca_file == "/from/conf"
    environ["NIX_SSL_CERT_FILE"] = "/first"
    assert load_settings(Flags(), environ, uid=1000).ca_file == "/first"


def test_a_directory_is_a_cache_wherever_we_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert source_url("my cache?trusted=true") == f"file://{tmp_path}/my%20cache?trusted=true"


@pytest.mark.parametrize("text", ["ssh://host", "unix:///x", "daemon", "auto"])
def test_what_is_no_binary_cache_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        source_url(text)
    assert "https" in caught.value.hint


@pytest.mark.parametrize("key", ["", "a-1", "a-1:", ":AAAA", "a-1:AA", "a-1:!" + "A" * 43])
def test_a_key_that_is_none_is_wrong_usage_before_anything_starts(key: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a public key"):
        load_settings(Flags(caches=("https://one.example",), keys=(key,)), {"HOME": str(tmp_path)}, uid=1000)


def test_unknown_options_of_a_source_are_told_once_and_nixs_own_are_not(tmp_path: Path) -> None:
    told: list[str] = []
    environ = {"HOME": str(tmp_path), "NIX_CONF_DIR": str(tmp_path)}
    url = "https://me:secret@a.example?parallel-compression=true&want-mass-query=1&nobody-knows=1"
    config = write(tmp_path / "c", f'trusted-public-keys = []\n[[source]]\nurl = "{url}"\npriority = 3\n')
    load_settings(Flags(config_file=str(config), warn=told.append), environ, uid=1000)
    load_settings(Flags(caches=(url, url), warn=told.append), environ, uid=1000)
    assert told == ["unknown option 'nobody-knows' of https://a.example is ignored"] * 2


def limits_of(environ: dict[str, str], tmp_path: Path, text: str) -> dict[str, int]:
    return dict(load_settings(Flags(config_file=str(write(tmp_path / "c", text))), environ, uid=1000).limits)


def test_limits_reach_the_daemon_that_a_command_starts(environ: dict[str, str], tmp_path: Path) -> None:
    text = "[limits]\nparallel-downloads = 3\nmemory = '64M'\nanswer-seconds = 5\nparked-requests = 100\n"
    settings = load_settings(Flags(config_file=str(write(tmp_path / "c", text))), environ, uid=1000)
    command = daemon_command(settings, client_fd=3)
    at = command.index("--parallel-downloads")
    assert command[at : at + 6] == [
        "--parallel-downloads", "3", "--memory", str(64 << 20), "--answer-seconds", "5"
    ]  # fmt: skip
    assert store_limits(settings.limits) == Limits(parallel_downloads=3, memory=64 << 20)


def test_without_limits_the_daemon_is_told_none(environ: dict[str, str]) -> None:
    settings = load_settings(Flags(), environ, uid=1000)
    assert "--memory" not in daemon_command(settings, client_fd=3)
    assert store_limits(settings.limits) == Limits()


def test_defaults_of_the_page_are_those_of_the_code() -> None:
    defaults = {limit.name: limit.default for limit in LIMITS}
    assert parse_size(defaults["memory"]) == Limits().memory
    assert int(defaults["parallel-downloads"]) == Limits().parallel_downloads
    assert int(defaults["parallel-requests"]) == Limits().parallel_requests
    assert float(defaults["answer-seconds"]) == ANSWER_SECONDS
    assert int(defaults["parked-requests"]) == MAX_PARKED


@pytest.mark.parametrize("limit", LIMITS, ids=[limit.name for limit in LIMITS])
def test_limits_are_taken_at_their_bounds_and_refused_beyond(
    environ: dict[str, str], tmp_path: Path, limit: Limit
) -> None:
    for value in (limit.least, limit.most):
        assert limits_of(environ, tmp_path, f"[limits]\n{limit.name} = {value}") == {limit.name: value}
    for value in (limit.least - 1, limit.most + 1):
        with pytest.raises(UsageError, match=f"{limit.name} must be from"):
            limits_of(environ, tmp_path, f"[limits]\n{limit.name} = {value}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("parallel = 3", "unknown limit"),
        ("parallel-downloads = '3'", "a whole number"),
        ("parallel-downloads = true", "a whole number"),
        ("memory = 'much'", "not a size"),
        ("memory = 1.5", "a size"),
    ],
)
def test_limits_that_are_none_are_refused(
    environ: dict[str, str], tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        limits_of(environ, tmp_path, f"[limits]\n{text}")


def test_a_rate_of_the_source_table_becomes_part_of_its_url(environ: dict[str, str], tmp_path: Path) -> None:
    text = "[[source]]\nurl = 'https://one.example'\nbytes-per-second = '2M'\nrequests-per-second = 12.5\n"
    settings = load_settings(Flags(config_file=str(write(tmp_path / "c", text))), environ, uid=1000)
    config = parse_source_url(settings.sources[0].url)
    assert (config.bytes_per_second, config.requests_per_second) == (2 << 20, 12.5)
