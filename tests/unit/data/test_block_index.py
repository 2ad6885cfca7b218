from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import DataError
from dstrain.data.block_index import INDEX_NAME, RECORD, check_records, parse_records, read_index
from dstrain.data.manifest import read_manifest


@pytest.fixture
def records(shards) -> np.ndarray:
    manifest = read_manifest(shards / "train")
    return np.array(read_index(shards / "train" / INDEX_NAME, num_blocks=manifest.num_blocks))


def check(records: np.ndarray, sizes: list[int]) -> None:
    check_records(records, shard_bytes=np.array(sizes, dtype=np.int64), token_bytes=2, source="blocks.idx")


def sizes_of(shards) -> list[int]:
    return [shard.bytes for shard in read_manifest(shards / "train").shards]


def test_a_record_is_forty_bytes_without_gaps():
    assert RECORD.itemsize == 40
    assert sum(RECORD[name].itemsize for name in RECORD.names) == 40


def test_a_built_index_passes_and_its_sums_are_the_manifests(records, shards):
    check(records, sizes_of(shards))
    manifest = read_manifest(shards / "train")
    assert int(records["tokens"].sum()) == manifest.num_tokens
    assert int(records["docs"].sum()) == manifest.num_documents
    assert len(manifest.shards) > 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shard", 999, "block 1 points at an unknown shard"),
        ("off", 1 << 40, "block 1 lies outside its shard"),
        ("off", (1 << 64) - 1, "block 1 lies outside its shard"),
        ("ends_off", 0, "block 1 has no place for its document ends"),
        ("ends_off", 1 << 31, "block 1 lies outside its shard"),
        ("tokens", 1 << 31, "block 1 has an impossible number of tokens"),
        ("docs", 0, "block 1 has an impossible number of documents"),
        ("docs", 1 << 31, "block 1 has an impossible number of documents"),
        ("flags", 2, "block 1 is stored in an unknown way"),
        ("flags", 3, "block 1 is stored in an unknown way"),
        ("raw_len", 1 << 20, "block 1 is stored in an unknown way"),
        ("raw_len", (1 << 32) - 1, "block 1 is larger than a member may be"),
    ],
)
def test_a_record_that_cannot_be_is_named(records, shards, field, value, message):
    records[1][field] = value
    with pytest.raises(DataError, match=message):
        check(records, sizes_of(shards))


def test_overlapping_and_unordered_blocks_are_refused(records, shards):
    twice = records.copy()
    twice[1] = twice[0]
    with pytest.raises(DataError, match="block 1 overlaps"):
        check(twice, sizes_of(shards))
    with pytest.raises(DataError, match="out of order"):
        check(records[::-1].copy(), sizes_of(shards))


def test_a_member_beyond_the_limit_is_refused(records):
    records[0]["len"] = records[0]["raw_len"] = (64 << 20) + 1
    with pytest.raises(DataError, match="block 0 is larger than a member may be"):
        check(records[:1], [1 << 40])


def test_a_cut_or_missing_index_is_refused(tmp_path, records):
    path = tmp_path / INDEX_NAME
    with pytest.raises(DataError, match="index is missing"):
        read_index(path, num_blocks=1)
    path.write_bytes(records.tobytes()[:-1])
    with pytest.raises(DataError, match="bytes, but"):
        read_index(path, num_blocks=len(records))
    with pytest.raises(DataError, match="no whole number"):
        parse_records(records.tobytes()[:-1], source="x")


@given(st.binary(max_size=400))
def test_random_bytes_are_either_sound_or_refused_by_name(data):
    records = parse_records(data[: len(data) // 40 * 40], source="x")
    problem = refusal(records, [10_000, 20_000])
    if problem is not None:
        assert "block " in problem
        return
    for record in records:
        assert int(record["off"]) + int(record["len"]) <= [10_000, 20_000][int(record["shard"])]
        assert int(record["off"]) >= int(record["ends_off"])


def refusal(records: np.ndarray, sizes: list[int]) -> str | None:
    try:
        check(records, sizes)
    except DataError as error:
        return str(error)
    return None


def test_a_frame_may_be_shorter_or_longer_than_its_content_within_the_limit(records, shards):
    records[1]["flags"] |= 1
    records[1]["raw_len"] = 64 << 20
    check(records, sizes_of(shards))
    records[1]["raw_len"] += 1
    with pytest.raises(DataError, match="block 1 is larger than a member may be"):
        check(records, sizes_of(shards))
