"""What is put into a store is read back, listed and removed; what cannot be written is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dstrain.base.errors import ConfigError, DataError
from dstrain.base.locations import RemoteUrl, parse_location
from dstrain.base.remote_writer import RemoteWriter, is_missing
from tests.support.object_stores import object_store

TIMEOUT_S = 20.0


@pytest.fixture(scope="module", params=["s3", "gs"])
def writer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteWriter]:
    folder = tmp_path_factory.mktemp("origin")
    (folder / "here.txt").write_text("was here before")
    with object_store(request.param, folder) as store, store.at(store.port) as url:
        place = parse_location(url)
        assert isinstance(place, RemoteUrl)
        yield RemoteWriter(place)


def read(writer: RemoteWriter, name: str) -> bytes:
    return writer.read_range(name, 0, writer.size(name, timeout_s=TIMEOUT_S), timeout_s=TIMEOUT_S)


def test_a_file_is_put_over_an_older_one_and_removed(writer: RemoteWriter, tmp_path: Path) -> None:
    for data in (b"first" * 1000, b"second"):
        (tmp_path / "a").write_bytes(data)
        writer.put("a.bin", tmp_path / "a", timeout_s=TIMEOUT_S)
        assert read(writer, "a.bin") == data
    writer.remove("a.bin", timeout_s=TIMEOUT_S)
    with pytest.raises(DataError) as caught:
        writer.size("a.bin", timeout_s=TIMEOUT_S)
    assert is_missing(caught.value)
    writer.remove("a.bin", timeout_s=TIMEOUT_S)


def test_names_are_those_directly_inside(writer: RemoteWriter) -> None:
    inner = writer.inside("step-1")
    assert inner.names(timeout_s=TIMEOUT_S) == []
    inner.put_bytes("manifest.json", b"{}", timeout_s=TIMEOUT_S)
    inner.inside("tokenizer").put_bytes("t.json", b"[]", timeout_s=TIMEOUT_S)
    assert inner.names(timeout_s=TIMEOUT_S) == ["manifest.json", "tokenizer"]
    assert inner.inside("tokenizer").names(timeout_s=TIMEOUT_S) == ["t.json"]
    assert {"here.txt", "step-1"} <= set(writer.names(timeout_s=TIMEOUT_S))
    assert read(inner, "manifest.json") == b"{}"


def test_a_name_never_leads_out_of_the_folder(writer: RemoteWriter, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    for name in ("../a", "a/b", ".a", ""):
        with pytest.raises(DataError, match="plain file name"):
            writer.put(name, tmp_path / "a", timeout_s=TIMEOUT_S)
        with pytest.raises(DataError, match="plain file name"):
            writer.inside(name)


@pytest.mark.parametrize("url", ["https://user:SECRETPW@host/x?sig=SECRETSIG", "hf://datasets/a/b"])
def test_servers_that_take_no_files_are_refused_without_their_secrets(url: str) -> None:
    place = parse_location(url)
    assert isinstance(place, RemoteUrl)
    with pytest.raises(ConfigError, match="cannot be written: use s3://") as caught:
        RemoteWriter(place)
    assert "SECRET" not in str(caught.value)
