from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from dstrain.foreign.completed import CompletedShards
from dstrain.foreign.manifest import BLOCK, SAMPLE
from dstrain.foreign.shard_index import ShardIndex


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "a.tar"
    path.write_bytes(b"x" * 1024)
    return path


def some_index() -> ShardIndex:
    samples = {"train": np.array([(512, 3, 2, 0, 0)], SAMPLE), "validation": np.zeros(0, SAMPLE)}
    blocks = {"train": np.array([(0, 1, 2, 77, 0, 0)], BLOCK), "validation": np.zeros(0, BLOCK)}
    return ShardIndex(1024, "ab" * 32, samples, blocks, num_samples=3, num_empty=1, num_missing=1, least_hash=5)


def test_what_was_put_is_found_by_the_next_run(tmp_path: Path, shard: Path) -> None:
    CompletedShards(tmp_path / "c", depends_on={"a": 1}).put(shard, some_index())
    found = CompletedShards(tmp_path / "c", depends_on={"a": 1}).get(shard)
    assert found is not None
    expected = some_index()
    assert (found.bytes, found.sha256, found.num_empty, found.least_hash) == (1024, expected.sha256, 1, 5)
    for split in ("train", "validation"):
        assert (found.samples[split] == expected.samples[split]).all()
        assert (found.blocks[split] == expected.blocks[split]).all()


def test_other_settings_or_a_changed_shard_find_nothing(tmp_path: Path, shard: Path) -> None:
    CompletedShards(tmp_path / "c", depends_on={"a": 1}).put(shard, some_index())
    assert CompletedShards(tmp_path / "c", depends_on={"a": 2}).get(shard) is None
    os.utime(shard, ns=(1, 1))
    assert CompletedShards(tmp_path / "c", depends_on={"a": 1}).get(shard) is None


@pytest.mark.parametrize("keep", [0, 10, 100, -1])
def test_a_damaged_file_counts_as_not_there(tmp_path: Path, shard: Path, keep: int) -> None:
    completed = CompletedShards(tmp_path / "c", depends_on={})
    completed.put(shard, some_index())
    file = next((tmp_path / "c").iterdir())
    file.write_bytes(file.read_bytes()[:keep])
    assert completed.get(shard) is None
