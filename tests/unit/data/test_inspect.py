from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dstrain.base.errors import DataError
from dstrain.data.inspect import inspect_dataset, verify_dataset
from dstrain.data.manifest import content_fingerprint
from dstrain.data.reader import ShardDataset
from dstrain.data.tokenizer import train_tokenizer


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def problems(path: Path) -> list[str]:
    return list(verify_dataset(path, quiet=True).problems)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_inspection_counts_both_splits_and_shows_text(shards, texts):
    found = inspect_dataset(shards)
    assert list(found["splits"]) == ["train", "validation"]
    assert sum(split["documents"] for split in found["splits"].values()) == len(texts)
    train = found["splits"]["train"]
    assert train["tokenizer_matches"] is True
    assert sum(train["lengths"]["counts"].values()) == train["documents"]
    assert all(sample.startswith("story ") for sample in train["samples"])
    assert json.loads(json.dumps(found)) == found
    assert list(inspect_dataset(shards / "validation")["splits"]) == ["validation"]


def test_a_sound_folder_verifies(shards):
    report = verify_dataset(shards, quiet=True)
    assert report.is_sound
    assert [path.name for path in report.checked] == ["train", "validation"]
    assert report.num_blocks > report.num_shards > 2


def test_every_damage_is_listed_not_only_the_first(copied):
    dataset = ShardDataset(copied / "train")
    last = dataset.blocks[-1]
    flip(copied / "train" / dataset.manifest.shards[int(last["shard"])].name, int(last["off"]) + 129)
    (copied / "train" / "shard-000000.tar").unlink()
    flip(copied / "validation" / "shard-000000.tar", 514)
    found = "\n".join(problems(copied))
    assert "shard-000000.tar: this shard is missing" in found
    assert f"block {len(dataset.blocks) - 1} is damaged" in found
    assert "validation/shard-000000.tar: sha256 differs" in found.replace(str(copied) + "/", "")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("header", lambda data: data[:10] + b"x" + data[11:], "not readable as a tar"),
        (
            "member name",
            lambda data: data.replace(b"000000000.ends.npy", b"000000009.ends.npy", 1),
            "not readable as a tar",
        ),
        ("cut at the tail", lambda data: data[: len(data) - 10240], "the manifest says"),
        ("not a tar", lambda data: b"<html>" * (len(data) // 6) + b" " * (len(data) % 6), "not readable as a tar"),
        ("empty", lambda data: b"", "0 bytes, the manifest says"),
    ],
)
def test_each_kind_of_damage_is_found(copied, name, damage, message):
    path = copied / "train" / "shard-000000.tar"
    path.write_bytes(damage(path.read_bytes()))
    assert any(message in problem and "shard-000000.tar" in problem for problem in problems(copied))


def test_an_index_at_odds_with_the_shards_is_found(copied):
    flip(copied / "train" / "blocks.idx", 33)
    assert any("blocks.idx: sha256 differs" in problem for problem in problems(copied))


def test_index_and_manifest_changed_together_still_disagree_with_the_shards(copied):
    folder = copied / "train"
    records = np.array(ShardDataset(folder).blocks)
    records[0]["crc32"] ^= 1
    (folder / "blocks.idx").write_bytes(records.tobytes())
    import hashlib

    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["index_sha256"] = hashlib.sha256(records.tobytes()).hexdigest()
    manifest["fingerprint"] = content_fingerprint(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = "\n".join(problems(copied))
    assert "the shard's own index differs" in found
    assert "block 0 is damaged" in found


def test_another_tokenizer_and_unknown_shards_are_found(copied, texts):
    shutil.rmtree(copied / "tokenizer")
    train_tokenizer(texts, kind="bpe", vocab_size=300, out=copied / "tokenizer", quiet=True)
    shutil.copy(copied / "train" / "shard-000000.tar", copied / "train" / "shard-000999.tar")
    found = "\n".join(problems(copied))
    assert "not the tokenizer train was built with" in found
    assert "shard-000999.tar: a shard that the manifest does not know" in found
    assert inspect_dataset(copied)["splits"]["train"]["tokenizer_matches"] is False


def test_a_damaged_manifest_does_not_hide_the_other_split(copied):
    (copied / "train" / "manifest.json").write_text("{")
    report = verify_dataset(copied, quiet=True)
    assert [p for p in report.problems if "train/manifest.json" in p]
    assert report.num_shards == len(ShardDataset(copied / "validation").manifest.shards)


def test_no_dataset_is_an_error(tmp_path):
    with pytest.raises(DataError, match="dstrain shards build"):
        verify_dataset(tmp_path, quiet=True)
