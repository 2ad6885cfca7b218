"""P13: stock readers open the shards; the round trip loses, cuts and reorders nothing."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import webdataset
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.base.errors import DataError
from dstrain.data.block_index import MAX_MEMBER_BYTES, parse_records
from dstrain.data.inspect import verify_dataset
from dstrain.data.reader import ShardDataset
from dstrain.data.shard_writer import TAIL_INDEX, ShardWriter


def identity(vocab_size: int = 1000, dtype: str = "uint16") -> dict:
    return {
        "tokenizer_sha256": "0" * 64,
        "vocab_size": vocab_size,
        "dtype": dtype,
        "frame_prefix": [2],
        "frame_suffix": [3],
        "special_ids": [0, 1, 2, 3, 4],
    }


def write(
    folder: Path,
    documents: list[np.ndarray],
    *,
    block_tokens: int = 64,
    shard_bytes: int = 4096,
    compression: str = "none",
    **kind,
) -> ShardDataset:
    writer = ShardWriter(
        folder,
        identity=identity(**kind),
        block_tokens=block_tokens,
        shard_bytes=shard_bytes,
        compression=compression,
    )
    for document in documents:
        writer.add(document)
    writer.finish(provenance={})
    return ShardDataset(folder)


def documents_of(dataset: ShardDataset) -> list[list[int]]:
    found = []
    for number in range(dataset.manifest.num_blocks):
        block = dataset.read(number)
        assert np.array_equal(dataset.ends(number), block.ends)
        found += [part.tolist() for part in np.split(block.tokens, block.ends[:-1])]
    return found


def shard_paths(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("*.tar"))


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 69_999), min_size=1, max_size=150), max_size=30),
    block_tokens=st.integers(64, 200),
    shard_bytes=st.integers(4096, 20_000),
    compression=st.sampled_from(["none", "zstd"]),
)
def test_documents_come_back_whole_and_in_order(tmp_path_factory, documents, block_tokens, shard_bytes, compression):
    arrays = [np.array(document, dtype=np.uint32) for document in documents]
    kind = {"vocab_size": 70_000, "dtype": "uint32", "compression": compression}
    folder = tmp_path_factory.mktemp("round") / "d"
    dataset = write(folder, arrays, block_tokens=block_tokens, shard_bytes=shard_bytes, **kind)
    assert documents_of(dataset) == documents
    assert dataset.manifest.num_tokens == sum(map(len, documents))
    for record in dataset.blocks:
        assert record["tokens"] <= block_tokens or record["docs"] == 1


def test_webdataset_reads_every_token(shards):
    dataset = ShardDataset(shards / "train")
    samples = list(webdataset.WebDataset(shard_paths(dataset.path), shardshuffle=False).decode())
    assert len(samples) == dataset.manifest.num_blocks
    for number, sample in enumerate(samples):
        assert {key for key in sample if not key.startswith("__")} == {"ends.npy", "tokens.npy"}
        assert np.array_equal(sample["tokens.npy"], dataset.read(number).tokens)
        assert np.array_equal(sample["ends.npy"], dataset.read(number).ends)


def test_webdataset_gives_the_frame_of_a_compressed_block(compressed):
    samples = list(webdataset.WebDataset(shard_paths(compressed.path), shardshuffle=False).decode())
    assert len(samples) == compressed.manifest.num_blocks > 1
    for number, sample in enumerate(samples):
        assert {key for key in sample if not key.startswith("__")} == {"ends.npy", "tokens.npy.zst"}
        raw = zstandard.ZstdDecompressor().decompress(sample["tokens.npy.zst"])
        assert np.array_equal(np.load(io.BytesIO(raw)), compressed.read(number).tokens)


def test_compressed_shards_are_smaller_and_verify(compressed, tmp_path):
    assert (compressed.blocks["len"] < compressed.blocks["raw_len"]).all()
    assert verify_dataset(compressed.path, quiet=True).is_sound
    path = Path(shard_paths(compressed.path)[0])
    data = bytearray(path.read_bytes())
    data[int(compressed.blocks[0]["off"]) + 9] ^= 1
    path.write_bytes(data)
    problems = verify_dataset(compressed.path, quiet=True).problems
    assert any("block 0 is damaged" in problem for problem in problems)


@pytest.fixture
def compressed(tmp_path) -> ShardDataset:
    documents = [np.arange(length) % 7 for length in range(100, 400, 9)]
    return write(tmp_path / "z", documents, block_tokens=512, shard_bytes=8192, compression="zstd")


def test_hugging_face_datasets_reads_every_token(shards, tmp_path):
    dataset = ShardDataset(shards / "train")
    stream = datasets.load_dataset(
        "webdataset", data_files=shard_paths(dataset.path), split="train", streaming=True, cache_dir=str(tmp_path)
    )
    rows = list(stream)
    assert len(rows) == dataset.manifest.num_blocks
    for number, row in enumerate(rows):
        assert np.array_equal(np.asarray(row["tokens.npy"]), dataset.read(number).tokens)


def test_gnu_tar_lists_every_member_without_complaint(shards):
    for path in shard_paths(shards / "train"):
        result = subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True)
        assert result.stderr == ""
        assert result.stdout.split()[-1] == TAIL_INDEX


def test_a_lone_shard_describes_itself(shards):
    dataset = ShardDataset(shards / "train")
    for number, path in enumerate(shard_paths(dataset.path)):
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
            records = parse_records(tar.extractfile(TAIL_INDEX).read(), source=path)
            assert all((m.mtime, m.uid, m.gid, m.mode, m.uname) == (0, 0, 0, 0o644, "") for m in members)
            places = {m.offset_data: m.size for m in members if m.name.endswith(".tokens.npy")}
        assert np.array_equal(records, dataset.blocks[dataset.blocks["shard"] == number])
        assert places == {int(r["off"]): int(r["len"]) for r in records}


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_the_same_documents_give_the_same_bytes(tmp_path, compression):
    documents = [np.arange(1, length, dtype=np.uint16) for length in range(2, 90)]
    for name in ("a", "b"):
        write(tmp_path / name, documents, compression=compression)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_ids_beyond_the_vocabulary_and_vocabularies_beyond_the_dtype_are_refused(tmp_path):
    writer = ShardWriter(tmp_path / "a", identity=identity(), block_tokens=64, shard_bytes=4096)
    with pytest.raises(DataError, match="id 1000 is not below vocab_size 1000"):
        writer.add(np.array([1000]))
    with pytest.raises(DataError, match="vocab_size 65537 does not fit the dtype uint16"):
        ShardWriter(tmp_path / "b", identity=identity(65537), block_tokens=64, shard_bytes=4096)


def test_a_document_larger_than_any_block_is_refused(tmp_path):
    writer = ShardWriter(tmp_path / "a", identity=identity(), block_tokens=64, shard_bytes=4096)
    with pytest.raises(DataError, match="split the text into smaller documents"):
        writer.add(np.zeros(MAX_MEMBER_BYTES // 2, dtype=np.uint16))
