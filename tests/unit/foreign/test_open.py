from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.base.errors import DataError
from dstrain.data.blocks import BlockDataset
from dstrain.data.reader import ShardDataset
from dstrain.data.row_index import rows_per_block
from dstrain.data.tokenizer import Tokenizer
from dstrain.foreign.dataset import ForeignDataset
from dstrain.foreign.index import IndexReport
from dstrain.foreign.open import is_foreign, open_dataset


def test_the_manifest_decides_which_kind_is_opened(foreign_index: IndexReport, shards: Path) -> None:
    assert isinstance(open_dataset(foreign_index.path / "train"), ForeignDataset)
    assert isinstance(open_dataset(shards / "train"), ShardDataset)
    assert is_foreign(foreign_index.path / "validation")
    assert not is_foreign(shards / "train")
    assert not is_foreign(shards)


def test_both_kinds_are_block_datasets(foreign_index: IndexReport, shards: Path) -> None:
    for path in (foreign_index.path / "train", shards / "train"):
        dataset: BlockDataset = open_dataset(path)
        blocks = [dataset.read(number) for number in range(dataset.manifest.num_blocks)]
        assert sum(len(block.tokens) for block in blocks) == dataset.manifest.num_tokens
        assert sum(len(block.ends) for block in blocks) == dataset.manifest.num_documents
        assert not blocks[0].tokens.flags.writeable


def test_rows_and_words_are_found_as_in_a_folder_of_shards(foreign_index: IndexReport) -> None:
    dataset = open_dataset(foreign_index.path / "train")
    facts = dataset.manifest
    rows = rows_per_block(
        dataset, num_blocks=facts.num_blocks, fingerprint=facts.fingerprint, sequence_length=64, frame_length=2,
        may_write=True,
    )  # fmt: skip
    assert rows.min() >= 1
    tokenizer = Tokenizer.load(foreign_index.path / "tokenizer")
    assert tokenizer.fingerprint == facts.tokenizer_sha256
    assert tokenizer.word_starts().shape == (facts.vocab_size,)


def test_no_dataset_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such dataset folder"):
        open_dataset(tmp_path / "none")
