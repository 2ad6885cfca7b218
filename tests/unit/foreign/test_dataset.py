from __future__ import annotations

import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest

from dstrain.base.errors import DamagedBlockError, DataError
from dstrain.data.tokenizer import Tokenizer
from dstrain.foreign.dataset import ForeignDataset
from dstrain.foreign.index import IndexConfig, IndexReport, index_tars
from tests.support.foreign_tars import npy, npy_set, text_set, write_tar


def documents(dataset: ForeignDataset) -> list[tuple[int, ...]]:
    found = []
    for number in range(len(dataset.blocks)):
        block = dataset.read(number)
        assert (block.ends == dataset.ends(number)).all()
        found += [tuple(part.tolist()) for part in np.split(block.tokens, block.ends[:-1])]
    return found


def test_both_splits_together_hold_every_document_once(
    foreign_index: IndexReport, texts: list[str], tokenizer_folder: Path
) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder)
    expected = sorted(tuple(ids.tolist()) for ids in tokenizer.encode_documents(texts))
    found = [documents(ForeignDataset(foreign_index.path / split)) for split in ("train", "validation")]
    assert sorted(found[0] + found[1]) == expected
    assert 0 < len(found[1]) < 30
    assert foreign_index.train.num_documents == len(found[0])


def test_worker_processes_give_the_same_blocks_and_the_same_errors_and_leave(
    tmp_path: Path, texts: list[str], tokenizer_folder: Path, foreign_config: IndexConfig
) -> None:
    shards = text_set(tmp_path / "set", texts)
    path = index_tars([tmp_path / "set"], tokenizer=tokenizer_folder, config=foreign_config, quiet=True).path / "train"
    alone, helped = ForeignDataset(path), ForeignDataset(path, workers=1)
    order = random.Random(0).sample(range(len(alone.blocks)), len(alone.blocks))
    try:
        assert (helped.read(order[0]).tokens == alone.read(order[0]).tokens).all()
        assert not worker_processes()  # nobody has said yet what comes
        for at, block in enumerate(order):
            helped.will_need(order[at : at + 9])
            assert (helped.read(block).tokens == alone.read(block).tokens).all()
        assert worker_processes()
        bad = change_a_byte(shards[1], alone)
        helped.will_need([])
        helped.will_need([bad])
        with pytest.raises(DamagedBlockError, match="crc32") as caught:
            helped.read(bad)
        assert caught.value.block == bad
    finally:
        helped.close()
    assert not worker_processes()
    assert (helped.read(0).tokens == alone.read(0).tokens).all()


def worker_processes() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def change_a_byte(shard: Path, dataset: ForeignDataset) -> int:
    """Damage the second shard in place; returns its first block."""
    data = bytearray(shard.read_bytes())
    data[data.index(b"fox")] ^= 1
    with shard.open("r+b") as file:
        file.write(data)
    return int(np.flatnonzero(dataset.blocks["shard"] == 1)[0])


def test_a_dataset_travels_to_other_processes(foreign_index: IndexReport) -> None:
    dataset = ForeignDataset(foreign_index.path / "train")
    copied = pickle.loads(pickle.dumps(dataset))
    assert (copied.read(1).tokens == dataset.read(1).tokens).all()


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i4", "<i8"])
def test_npy_members_are_read_as_they_are(tmp_path: Path, tokenizer_folder: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 130, size=size) for size in rng.integers(1, 90, size=60)]
    npy_set(tmp_path / "set", ids, dtype=dtype)
    config = IndexConfig(block_tokens=256, validation_fraction=0)
    report = index_tars([tmp_path / "set"], tokenizer=tokenizer_folder, config=config, quiet=True)
    dataset = ForeignDataset(report.path / "train")
    assert documents(dataset) == [tuple(part.tolist()) for part in ids]
    assert dataset.read(0).tokens.dtype == np.uint16
    assert report.validation is None


def test_npy_members_of_several_types_meet_in_one_block(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = tmp_path / "set"
    write_tar(folder / "m.tar", [("a.npy", npy(np.array([5, 6], "<u2"))), ("b.npy", npy(np.array([7], "<i8")))])
    config = IndexConfig(validation_fraction=0)
    report = index_tars([folder], tokenizer=tokenizer_folder, config=config, quiet=True)
    assert documents(ForeignDataset(report.path / "train")) == [(5, 6), (7,)]


def test_a_changed_byte_is_damage_that_names_shard_and_samples(
    tmp_path: Path, texts: list[str], tokenizer_folder: Path, foreign_config: IndexConfig
) -> None:
    shards = text_set(tmp_path / "set", texts)
    report = index_tars([tmp_path / "set"], tokenizer=tokenizer_folder, config=foreign_config, quiet=True)
    dataset = ForeignDataset(report.path / "train")
    block = change_a_byte(shards[1], dataset)
    with pytest.raises(
        DamagedBlockError, match=r"set-001\.tar: block \d+ \(samples 0 to \d+ of this split\)"
    ) as caught:
        dataset.read(block)
    assert caught.value.block == block


def test_lengths_that_another_tokenizers_version_changed_are_noticed(
    tmp_path: Path,
    texts: list[str],
    tokenizer_folder: Path,
    foreign_config: IndexConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text_set(tmp_path / "set", texts)
    report = index_tars([tmp_path / "set"], tokenizer=tokenizer_folder, config=foreign_config, quiet=True)
    encode = Tokenizer.encode_documents
    monkeypatch.setattr(Tokenizer, "encode_documents", lambda self, t: [ids[:-1] for ids in encode(self, t)])
    with pytest.raises(DamagedBlockError, match=r"sample 0 at byte \d+ .*the index says"):
        ForeignDataset(report.path / "train").read(0)


def test_another_tokenizer_in_the_index_is_refused(
    tmp_path: Path, texts: list[str], tokenizer_folder: Path, foreign_config: IndexConfig
) -> None:
    text_set(tmp_path / "set", texts)
    report = index_tars([tmp_path / "set"], tokenizer=tokenizer_folder, config=foreign_config, quiet=True)
    file = report.path / "tokenizer/tokenizer.json"
    file.write_text(
        file.read_text()
        .replace('"lowercase":true', '"lowercase":false')
        .replace('"lowercase": true', '"lowercase": false')
    )
    with pytest.raises(DataError, match="not the tokenizer the index was made with"):
        ForeignDataset(report.path / "train").read(0)


def test_set_and_index_move_together(
    tmp_path: Path, texts: list[str], tokenizer_folder: Path, foreign_config: IndexConfig
) -> None:
    text_set(tmp_path / "set", texts)
    report = index_tars([tmp_path / "set"], tokenizer=tokenizer_folder, config=foreign_config, quiet=True)
    fingerprint = report.train.fingerprint
    shutil.move(tmp_path / "set", tmp_path / "elsewhere")
    moved = ForeignDataset(tmp_path / "elsewhere/dstrain-index/train")
    assert len(documents(moved)) == moved.manifest.num_documents
    assert moved.manifest.fingerprint == fingerprint


def test_a_missing_or_cut_shard_is_named_when_the_dataset_opens(
    tmp_path: Path, texts: list[str], tokenizer_folder: Path, foreign_config: IndexConfig
) -> None:
    shards = text_set(tmp_path / "set", texts)
    report = index_tars([tmp_path / "set"], tokenizer=tokenizer_folder, config=foreign_config, quiet=True)
    shards[2].write_bytes(shards[2].read_bytes()[:-512])
    with pytest.raises(DataError, match=r"set-002\.tar: \d+ bytes, the index says"):
        ForeignDataset(report.path / "train")
    shards[2].unlink()
    with pytest.raises(DataError, match=r"set-002\.tar: this shard is missing"):
        ForeignDataset(report.path / "train")
