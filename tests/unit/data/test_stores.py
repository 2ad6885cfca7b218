from __future__ import annotations

import pytest
from pydantic import ValidationError

from dstrain.base.errors import DataError
from dstrain.data import stores
from dstrain.data.stores import LocalStore, StorageConfig


def test_a_local_store_reads_exactly_what_is_asked(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(200)))
    store = LocalStore(tmp_path)
    assert store.size("a") == 200
    assert store.read("a", 10, 20) == bytes(range(10, 30))
    assert store.read("a", 10, 0) == b""
    with pytest.raises(DataError, match=r"a: ends at byte 200: cut"):
        store.read("a", 190, 20)
    for missing in (lambda: store.size("b"), lambda: store.read("b", 0, 1)):
        with pytest.raises(DataError, match="b: this shard is missing"):
            missing()
    store.close()
    assert store.read("a", 0, 1) == b"\0"


def test_reading_again_sees_a_file_that_was_put_right(tmp_path):
    (tmp_path / "a").write_bytes(b"wrong")
    store = LocalStore(tmp_path)
    assert store.read("a", 0, 5) == b"wrong"
    (tmp_path / "b").write_bytes(b"right")
    (tmp_path / "b").replace(tmp_path / "a")
    assert store.read("a", 0, 5) == b"wrong"  # the old file is still open
    assert store.read_again("a", 0, 5) == b"right"


def test_open_files_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "MAX_OPEN_FILES", 2)
    store = LocalStore(tmp_path)
    for name in "abcde":
        (tmp_path / name).write_bytes(name.encode())
        assert store.read(name, 0, 1) == name.encode()
    assert list(store._files) == ["d", "e"]


def test_a_cache_below_the_horizon_is_refused(tmp_path):
    with pytest.raises(ValidationError, match=r"cache_limit_bytes 100000 is below prefetch_bytes 200000"):
        StorageConfig(cache_dir=tmp_path, cache_limit_bytes=100_000, prefetch_bytes=200_000)
    StorageConfig(cache_limit_bytes=100_000, prefetch_bytes=200_000)  # without a cache there is no limit to break
    with pytest.raises(ValidationError):
        StorageConfig(deadline_s=0)
