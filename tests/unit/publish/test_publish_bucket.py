"""Publishing into a bucket, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.s3_place import Bucket, s3_place
from tests.unit.publish.test_publish_upload import COUNT, publish
from veneer.model.errors import SourceError
from veneer.publish.target import open_target
from veneer.sources.options import parse_source_url

BIG = 12 << 20


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with s3_place("shelf") as place:
        yield place


def test_a_bucket_gets_the_same_objects_as_a_directory(bucket: Bucket, tmp_path: Path) -> None:
    with open_target(parse_source_url(bucket.url)) as target:
        assert len(publish(target).paths) == COUNT
    with open_target(parse_source_url(str(tmp_path / "directory"))) as target:
        publish(target)
    files = {
        f"prefix/{file.relative_to(tmp_path / 'directory')}": file.read_bytes()
        for file in (tmp_path / "directory").rglob("*")
        if file.is_file()
    }
    assert bucket.objects == files


def test_narinfos_come_after_those_that_they_refer_to(bucket: Bucket) -> None:
    with open_target(parse_source_url(bucket.url)) as target:
        publish(target)
    narinfos = [key for key in bucket.puts if key.endswith(".narinfo")]
    assert narinfos == sorted(narinfos)


def test_a_second_run_into_a_bucket_writes_nothing(bucket: Bucket) -> None:
    with open_target(parse_source_url(bucket.url)) as target:
        publish(target)
        bucket.puts.clear()
        publish(target)
    assert bucket.puts == []


def test_a_big_file_arrives_whole_in_parts(bucket: Bucket) -> None:
    with open_target(parse_source_url(bucket.url)) as target:
        file = target.scratch / "big"
        file.write_bytes(bytes(range(256)) * (BIG // 256))
        target.put_file("nar/big", file)
        assert target.size("nar/big") == BIG
        assert target.size("nar/none") is None
    assert bucket.objects["prefix/nar/big"] == bytes(range(256)) * (BIG // 256)


def test_a_refused_object_is_told_without_the_servers_words(bucket: Bucket) -> None:
    bucket.refuse = (".ls", 403)
    with open_target(parse_source_url(bucket.url)) as target, pytest.raises(SourceError) as failure:
        publish(target)
    assert "403" in str(failure.value) or "permission" in str(failure.value)
    assert "Secret" not in str(failure.value) and "endpoint" not in str(failure.value)
    assert not any(key.endswith(".narinfo") for key in bucket.objects)
    bucket.refuse = None
    with open_target(parse_source_url(bucket.url)) as target:
        publish(target)
    assert sum(key.endswith(".narinfo") for key in bucket.objects) == COUNT
