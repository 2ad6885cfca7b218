from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dstrain.data.tokenizer import Tokenizer
from dstrain.foreign.payloads import parse_choice
from dstrain.foreign.ranges import find_ranges
from dstrain.foreign.shard_index import SPLITS, ShardIndexConfig, index_shard, split_hash
from tests.support.foreign_tars import npy_set, text_set


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


def index(path: Path, tokenizer: Tokenizer, member: str, **changes: Any) -> Any:
    return index_shard(path, tokenizer, ShardIndexConfig(member=parse_choice(member), block_tokens=256, **changes))


def test_records_point_at_the_payloads_and_count_their_tokens(
    tmp_path: Path, texts: list[str], tokenizer: Tokenizer
) -> None:
    path = text_set(tmp_path, texts, shards=1)[0]
    found, data = index(path, tokenizer, "txt"), path.read_bytes()
    records = found.samples["train"]
    assert [data[r["off"] : r["off"] + r["len"]].decode() for r in records] == texts
    assert records["tokens"].tolist() == [len(ids) for ids in tokenizer.encode_documents(texts)]
    assert (found.sha256, found.bytes) == (hashlib.sha256(data).hexdigest(), len(data))


def test_blocks_hold_at_most_their_tokens_and_cover_the_tar(
    tmp_path: Path, texts: list[str], tokenizer: Tokenizer
) -> None:
    path = text_set(tmp_path, texts, shards=1)[0]
    found, data = index(path, tokenizer, "txt"), path.read_bytes()
    samples, blocks = found.samples["train"], found.blocks["train"]
    at = 0
    for block in blocks:
        part = samples[block["first"] : block["first"] + block["samples"]]
        ranges = find_ranges(part["off"].astype(np.int64), part["len"].astype(np.int64), begin=int(block["begin"]))
        assert part["tokens"].sum() == block["tokens"] <= 256
        assert ranges.tolist() == [[at, ranges[0, 1]]]
        assert zlib.crc32(data[at : ranges[0, 1]]) == block["crc32"]
        at = int(ranges[0, 1])
    assert data[at:].strip(b"\0") == b""


def test_a_document_longer_than_a_block_is_a_block_of_its_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = npy_set(tmp_path, [[5] * 10, [6] * 700, [7] * 10], shards=1)[0]
    assert index(path, tokenizer, "tokens.npy").blocks["train"]["tokens"].tolist() == [10, 700, 10]


def test_held_out_samples_are_those_with_small_hashes(tmp_path: Path, texts: list[str], tokenizer: Tokenizer) -> None:
    path = text_set(tmp_path, texts, shards=1)[0]
    found = index(path, tokenizer, "txt", held_out_below=1 << 62)
    expected = [split_hash(path.name, f"part/{i:06d}") < 1 << 62 for i in range(len(texts))]
    assert [len(found.samples[split]) for split in SPLITS] == [expected.count(False), expected.count(True)]
    assert 10 < expected.count(True) < 60
    assert found.least_hash == min(split_hash(path.name, f"part/{i:06d}") for i in range(len(texts)))


def test_progress_reports_every_byte_once(tmp_path: Path, texts: list[str], tokenizer: Tokenizer) -> None:
    path = text_set(tmp_path, texts, shards=1)[0]
    reported: list[int] = []
    index_shard(path, tokenizer, ShardIndexConfig(member=parse_choice("txt")), on_bytes=reported.append)
    assert sum(reported) == path.stat().st_size
    assert min(reported) >= 0
