"""Unmodified tars under the loader: any world and any restart train on the same rows, every document once an epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dstrain.base.protocols import Corrupted, Pieces
from dstrain.base.world import World
from dstrain.data.config import DataConfig
from dstrain.data.ledger import LEDGER_MODULUS
from dstrain.data.loader import PackedLoader
from dstrain.data.plan_spec import plan_spec
from dstrain.data.row_index import rows_per_block
from dstrain.data.rows import RowSource
from dstrain.data.tokenizer import Tokenizer
from dstrain.foreign.dataset import ForeignDataset
from dstrain.foreign.index import IndexReport

S, BATCH = 64, 6


def corrupt(pieces: Pieces, step: int = 0) -> Corrupted:
    targets = np.flatnonzero(((pieces.uid + pieces.position) % 3 == 0) & ~pieces.frame)
    tokens = pieces.tokens.astype(np.int64)
    labels = tokens[targets]
    tokens[targets] = 4
    return Corrupted(tokens=tokens, targets=targets, labels=labels)


def loader_of(path: Path, *, rank: int = 0, size: int = 1) -> PackedLoader:
    dataset = ForeignDataset(path)
    source = RowSource(dataset, sequence_length=S, word_starts=None, cache_bytes=1 << 20)
    rows = rows_per_block(
        dataset, num_blocks=len(dataset.blocks), fingerprint="", sequence_length=S, frame_length=source.frame_length,
        may_write=False,
    )  # fmt: skip
    config = DataConfig.model_validate(
        {"path": str(path), "window_rows": 4, "sequence_length": S, "lanes": 2, "tail": "rotate"}
    )
    return PackedLoader(
        {"train": source},
        plan_spec(config, {"train": rows}, global_batch=BATCH, seed=1),
        corrupt,
        corruption="thirds",
        world=World(rank=rank, size=size),
        micro_batch=2,
    )


@pytest.mark.parametrize("size", [2, 3, 5])
def test_any_world_trains_on_the_same_rows(foreign_index: IndexReport, size: int) -> None:
    path = foreign_index.path / "train"
    alone = loader_of(path)
    ranks = [loader_of(path, rank=rank, size=size) for rank in range(size)]
    for step in (0, 3, 40):
        parts = [loader.step(step).ledger for loader in ranks]
        assert sum(parts) % LEDGER_MODULUS == alone.step(step).ledger


def test_a_restart_anywhere_goes_on_with_the_same_bytes(foreign_index: IndexReport) -> None:
    path = foreign_index.path / "train"
    loader = loader_of(path)
    before = [loader.step(step) for step in range(8)]
    again = loader_of(path).step(7)
    assert again.ledger == before[7].ledger
    for a, b in zip(again.micro_batches, before[7].micro_batches):
        assert (a.tokens == b.tokens).all()
        assert a.lengths == b.lengths


def test_an_epoch_holds_every_token_but_those_of_the_rotating_tail(foreign_index: IndexReport) -> None:
    loader = loader_of(foreign_index.path / "train")
    tokenizer = Tokenizer.load(foreign_index.path / "tokenizer")
    framing = {*tokenizer.frame_prefix, *tokenizer.frame_suffix}
    seen: Counter[int] = Counter()
    for step in range(int(loader.steps_per_epoch)):
        for batch in loader.step(step).micro_batches:
            seen.update(batch.tokens.tolist())
    tokens = sum(count for token, count in seen.items() if token not in framing)
    # Fewer than one batch of rows is left for the next epoch, and fewer than the two lanes' worth is dropped.
    assert 0 <= foreign_index.train.num_tokens - tokens <= (BATCH + 2) * S
