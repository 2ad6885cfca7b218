"""Only what is meant is opened, and nothing secret is shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import DataError
from dstrain.base.locations import RemoteUrl, child_location, parse_location, scrub


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("pipe:cat /etc/passwd", "'pipe:' is not a place"),
        ("pipe://x", "'pipe:' is not a place"),
        ("ftp://host/x", "'ftp:' is not a place"),
        ("memory://x", "'memory:' is not a place"),
        ("github://a:b@/x", "'github:' is not a place"),
        ("simplecache::s3://bucket/x", "'simplecache:' is not a place"),
        ("s3://bucket/a::http://x", "chained"),
        ("s3://bucket/{000..999}", "nothing is expanded"),
        ("s3://bucket/$HOME", "nothing is expanded"),
        ("s3://bucket/a*", "nothing is expanded"),
        ("s3://bucket/`id`", "nothing is expanded"),
        ("s3://bucket/a b", "nothing is expanded"),
        ("s3://bucket/a\nb", "nothing is expanded"),
        ("s3://bucket/../other", "without '..'"),
        ("https://host/a/%2e%2e/b", "without '..'"),
        ("https://host/a/%252e%252e/b", "without '..'"),
        ("https://host//b", "empty parts"),
        ("s3:///x", "names a host or bucket"),
        ("s3://bucket/x?versionId=1", "a query"),
        ("https://host/x#part", "fragment"),
        ("s3://KEYID:SECRETKEY@bucket/x", "keys do not belong into a URL"),
        ("gs://token@bucket/x", "keys do not belong into a URL"),
        ("file:///data/../../etc", "'..' in a file URL"),
        ("file:///data/%2e%2e/etc", "'..' in a file URL"),
        ("file://host/data", "without host"),
        ("file://data", "without host"),
        ("file:relative", "'file:' is not a place"),
    ],
)
def test_what_is_not_a_plain_place_is_refused_by_name(text, reason):
    with pytest.raises(DataError, match=reason) as refusal:
        parse_location(text)
    assert "SECRETKEY" not in str(refusal.value)


def test_a_url_that_went_through_pathlib_is_told_apart_from_a_folder():
    with pytest.raises(DataError, match="two slashes"):
        parse_location(Path("s3://bucket/shards"))
    assert parse_location("plain/folder") == Path("plain/folder")
    assert parse_location(Path("/data/shards")) == Path("/data/shards")
    assert parse_location("file:///data/a%20b") == Path("/data/a b")


def test_a_local_name_with_a_colon_is_a_local_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run:1").mkdir()
    assert parse_location("run:1") == Path("run:1")


@pytest.mark.parametrize("scheme", ["s3", "gs", "gcs", "az", "http", "https", "hf"])
def test_known_schemes_name_a_folder_and_its_children(scheme):
    url = parse_location(f"{scheme.upper()}://place/a/b/")
    assert isinstance(url, RemoteUrl)
    assert url.clean == str(url) == f"{scheme}://place/a/b"
    assert child_location(url, "train").file("x.tar") == f"{scheme}://place/a/b/train/x.tar"
    for name in ("../x", "a/b", ".hidden", "a?b", "", "a b", "a\n"):
        with pytest.raises(DataError, match="plain file name"):
            url.file(name)


def test_secrets_reach_the_server_and_nobody_else():
    url = parse_location("https://user:pa55word@host:8080/data?sv=1&sig=abc%2Fdef")
    assert url.child("train").file("x.tar") == "https://user:pa55word@host:8080/data/train/x.tar?sv=1&sig=abc%2Fdef"
    assert str(url) == "https://host:8080/data"
    for shown in (repr(url), str(url), f"{url}", scrub(f"failed: {url.text()} (sig abc/def)", url.secrets)):
        for secret in ("pa55word", "abc%2Fdef", "abc/def", "user:"):
            assert secret not in shown
    assert parse_location("abfs://container@account.dfs.core.windows.net/x").clean.startswith(
        "abfs://container@account"
    )


@given(st.text(max_size=60))
def test_any_text_is_a_place_or_a_refusal(text):
    try:
        found = parse_location(text)
    except DataError:
        return
    assert isinstance(found, Path) or found.scheme in ("s3", "gs", "gcs", "az", "abfs", "http", "https", "hf")
