from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dstrain.base.errors import DataError
from dstrain.corpus.foreign_convert import ConvertConfig, convert_foreign
from dstrain.data.inspect import verify_dataset
from dstrain.data.reader import ShardDataset
from dstrain.data.tokenizer import Tokenizer
from dstrain.foreign.index import IndexConfig
from tests.support.foreign_tars import npy_set, text_set

INDEX = IndexConfig(block_tokens=256, validation_fraction=0.1)


def documents(path: Path) -> list[tuple[int, ...]]:
    dataset = ShardDataset(path)
    found = []
    for number in range(len(dataset.blocks)):
        block = dataset.read(number)
        found += [tuple(part.tolist()) for part in np.split(block.tokens, block.ends[:-1])]
    return found


@pytest.fixture
def some_ids() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [[5, 6, 7]] * 3 + [rng.integers(5, 130, size=size).tolist() for size in rng.integers(1, 60, size=80)]


@pytest.mark.parametrize("deduplicate", [True, False])
def test_shuffled_shards_hold_every_document(
    tmp_path: Path, some_ids: list[list[int]], tokenizer_folder: Path, deduplicate: bool
) -> None:
    npy_set(tmp_path / "s", some_ids)
    config = ConvertConfig(index=INDEX, deduplicate=deduplicate, shard_bytes=8192)
    report = convert_foreign(
        [tmp_path / "s"], tokenizer=tokenizer_folder, out=tmp_path / "o", config=config, quiet=True
    )
    found = Counter(documents(tmp_path / "o/train") + documents(tmp_path / "o/validation"))
    expected = Counter(map(tuple, some_ids))
    # A document and its copy may be held out apart: copies are dropped within a split.
    assert set(found) == set(expected)
    assert sum(found.values()) + report.duplicates == len(some_ids)
    assert (report.duplicates > 0) == deduplicate
    assert verify_dataset(tmp_path / "o", quiet=True).is_sound
    assert not list(tmp_path.glob(".converting*"))


def test_the_order_of_the_shuffle_is_that_of_the_tokens(
    tmp_path: Path, some_ids: list[list[int]], tokenizer_folder: Path
) -> None:
    npy_set(tmp_path / "s", some_ids[2:], shards=1)
    npy_set(tmp_path / "t", some_ids[:1:-1], shards=4, dtype="<i8")
    config = ConvertConfig(index=INDEX.model_copy(update={"validation_fraction": 0.0}))
    orders = []
    for name in ("s", "t"):
        out = tmp_path / f"out-{name}"
        convert_foreign([tmp_path / name], tokenizer=tokenizer_folder, out=out, config=config, quiet=True)
        orders.append(documents(out / "train"))
    assert orders[0] == orders[1] != [tuple(ids) for ids in some_ids[2:]]
    other = config.model_copy(update={"seed": 1})
    convert_foreign([tmp_path / "s"], tokenizer=tokenizer_folder, out=tmp_path / "x", config=other, quiet=True)
    assert documents(tmp_path / "x/train") != orders[0]


def test_the_order_of_the_set_can_be_kept(tmp_path: Path, texts: list[str], tokenizer_folder: Path) -> None:
    text_set(tmp_path / "s", texts, extension="json")
    index = IndexConfig(text_field="json:text", block_tokens=256, validation_fraction=0)
    config = ConvertConfig(index=index, shuffle=False)
    report = convert_foreign(
        [tmp_path / "s"], tokenizer=tokenizer_folder, out=tmp_path / "o", config=config, quiet=True
    )
    expected = Tokenizer.load(tokenizer_folder).encode_documents(texts)
    assert documents(tmp_path / "o/train") == [tuple(ids.tolist()) for ids in expected]
    assert report.validation is None
    assert (tmp_path / "o/tokenizer/tokenizer.json").exists()


def test_an_existing_output_is_replaced_only_on_request(
    tmp_path: Path, some_ids: list[list[int]], tokenizer_folder: Path
) -> None:
    npy_set(tmp_path / "s", some_ids)
    config = ConvertConfig(index=INDEX)

    def convert(out: Path, overwrite: bool = False) -> None:
        convert_foreign(
            [tmp_path / "s"], tokenizer=tokenizer_folder, out=out, config=config, overwrite=overwrite, quiet=True
        )

    convert(tmp_path / "o")
    with pytest.raises(DataError, match="exists already"):
        convert(tmp_path / "o")
    convert(tmp_path / "o", overwrite=True)
    with pytest.raises(DataError, match="exists and is no dataset"):
        convert(tmp_path / "s", overwrite=True)
