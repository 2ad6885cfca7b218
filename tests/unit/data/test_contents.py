"""P17: manifests and indexes from a URL are bounded and checked before anything is believed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dstrain.base.errors import ConfigError, DataError
from dstrain.base.locations import parse_location
from dstrain.data import contents
from dstrain.data.contents import open_contents
from dstrain.data.reader import ShardDataset
from dstrain.data.stores import StorageConfig
from tests.support.block_shards import write_random_shards
from tests.support.http_range_server import serve_ranges

pytest.importorskip("aiohttp")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return write_random_shards(tmp_path_factory.mktemp("sound") / "d", documents=40, shard_bytes=1 << 15)


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "d"))


def opened(url: str, **settings):
    return open_contents(parse_location(url), StorageConfig(**{"deadline_s": 5.0, **settings}))


def test_a_url_and_its_folder_hold_the_same(folder):
    with serve_ranges(folder) as server:
        remote, local = opened(server.url), open_contents(folder, StorageConfig())
    assert remote.manifest == local.manifest
    assert np.array_equal(remote.blocks, local.blocks)
    assert remote.notes is None


def test_the_ranks_of_a_node_download_the_index_once(folder, tmp_path):
    cache = tmp_path / "cache"
    with serve_ranges(folder) as server:
        first, second = opened(server.url, cache_dir=cache), opened(server.url, cache_dir=cache)
        asked = [path for method, path, _ in server.requests if method == "GET" and path.endswith("blocks.idx")]
        assert asked == ["/blocks.idx"]
        assert isinstance(second.blocks, np.memmap)
        assert np.array_equal(first.blocks, second.blocks)
        entry = next(cache.rglob(f"{first.manifest.index_sha256}-*"))
        entry.write_bytes(bytes(entry.stat().st_size))
        assert np.array_equal(opened(server.url, cache_dir=cache).blocks[:], ShardDataset(folder).blocks[:])
        assert second.notes is not None
        assert second.notes.is_dir()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("manifest.json", b"<html>404</html>", r"manifest\.json: not readable as JSON"),
        ("manifest.json", b"PK\x03\x04" + bytes(50), r"manifest\.json: not readable as JSON"),
        ("manifest.json", b"\x80\x04cos\nsystem\n", r"manifest\.json: not readable as JSON"),
        ("manifest.json", b"[" * 200_000, r"manifest\.json: not readable as JSON"),
        ("manifest.json", b'{"format_version": 1}', r"manifest\.json: fingerprint"),
        ("manifest.json", b'{"format_version": 99}', r"format_version is 99"),
        ("manifest.json", b'{"format_version": 1, "x": ' + b"9" * 5000 + b"}", r"manifest\.json: "),
        ("blocks.idx", b"", r"blocks\.idx: 0 bytes, but \d+ blocks need"),
        ("blocks.idx", b"x" * 39, r"blocks\.idx: 39 bytes, but"),
    ],
)
def test_what_is_no_dataset_is_refused_by_name(folder, name, data, message):
    (folder / name).write_bytes(data)
    with serve_ranges(folder) as server, pytest.raises(DataError, match=message):
        opened(server.url)


def test_a_changed_index_is_refused(folder):
    data = bytearray((folder / "blocks.idx").read_bytes())
    data[4] ^= 1
    (folder / "blocks.idx").write_bytes(data)
    with serve_ranges(folder) as server, pytest.raises(DataError, match=r"blocks\.idx: sha256 differs"):
        opened(server.url)


def test_an_endless_manifest_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(contents, "MAX_REMOTE_MANIFEST_BYTES", 100)
    with serve_ranges(folder) as server:
        with pytest.raises(DataError, match=r"manifest\.json: \d+ bytes, more than the 100 a manifest may have"):
            opened(server.url)
        assert server.bytes_sent == 0


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "pipe:id", "a/b.tar", "s3://x/y.tar", "$HOME.tar"])
def test_a_manifest_names_files_and_nothing_else(folder, name):
    data = json.loads((folder / "manifest.json").read_text())
    data["shards"][0]["name"] = name
    (folder / "manifest.json").write_text(json.dumps(data))
    with serve_ranges(folder) as server, pytest.raises(DataError, match="not a plain shard file name"):
        opened(server.url)


def test_a_cache_below_what_the_node_fetches_ahead_stops_the_start(folder, tmp_path):
    settings = {"cache_dir": tmp_path / "cache", "cache_limit_bytes": 100_000, "prefetch_bytes": 60_000}
    with serve_ranges(folder) as server:
        first = opened(server.url, **settings)
        with pytest.raises(ConfigError, match=r"cache_limit_bytes: 100000 is less than the 120000 bytes that the 2"):
            opened(server.url, **settings)
        first.store.close()
        opened(server.url, **settings)
