"""Rows, documents and tokens seen, held against counting them one by one in what the loader delivers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dstrain.base.config import merge, validate
from dstrain.base.world import World
from dstrain.data.packing import pack
from dstrain.stages.config import PretrainConfig
from dstrain.stages.coverage import EpochCoverage, measure_coverage
from dstrain.stages.training_data import TrainingData, open_training_data


def opened(shards: Path, **sections: Any) -> TrainingData:
    settings = {
        "run_folder": "unused",
        "model": {"config": {"model_type": "bert"}},
        "data": {"path": str(shards), "sequence_length": 24},
        "train": {"global_batch": 16, "micro_batch": 4, "max_steps": 1000},
    }
    return open_training_data(validate(PretrainConfig, merge(settings, sections), source="test"), World())


def cover(data: TrainingData, until: int) -> list[EpochCoverage]:
    return list(measure_coverage(data.loader, until=until, advance=lambda _: None).epochs)


def counted(data: TrainingData, until: int, epoch: int) -> tuple[int, int, int]:
    """Rows, documents and tokens of the first source in one epoch, the slow way."""
    planned = data.loader.planned(0, until)
    source = data.loader.sources[0]
    chosen = (planned.epoch == epoch) & (planned.block >= 0) & (planned.source == 0)
    rows = set(zip(planned.block[chosen].tolist(), planned.row[chosen].tolist()))
    documents, tokens = set(), 0
    for block, row in rows:
        packing = pack(source.dataset.ends(block), sequence_length=24, frame_length=source.frame_length)
        pieces = slice(*packing.row_starts[row : row + 2].tolist())
        documents |= {(block, int(d)) for d in packing.document[pieces]}
        tokens += int(packing.length[pieces].sum())
    return len(rows), len(documents), tokens


@pytest.mark.parametrize("tail", ["rotate", "exact"])
@pytest.mark.parametrize("steps", [1, 7, 15, 16, 40])
def test_rows_documents_and_tokens_are_those_of_the_rows_delivered(shards: Path, tail: str, steps: int) -> None:
    data = opened(shards, data={"tail": tail, "lanes": 16})
    for found in cover(data, steps):
        assert (found.seen, found.documents, found.tokens) == counted(data, steps, found.epoch)
        assert found.repeated == found.left_out == found.substituted == 0
        assert found.seen + found.tail + found.to_come == found.rows
        assert found.complete == (found.to_come == 0)


def test_a_complete_exact_epoch_has_seen_every_document_and_token(shards: Path) -> None:
    data = opened(shards, data={"tail": "exact", "lanes": 16})
    steps = int(2 * data.loader.steps_per_epoch) + 2
    first = cover(data, steps)[0]
    assert first.complete
    assert (first.seen, first.documents, first.tokens) == (first.rows, first.all_documents, first.all_tokens)


def test_skipped_rows_and_steps_are_counted_as_left_out(shards: Path) -> None:
    plain = opened(shards, data={"lanes": 16})
    steps = int(plain.loader.steps_per_epoch) + 1
    some = plain.loader.planned(2, 3)
    pairs = list(zip(some.block[:5].tolist(), some.row[:5].tolist()))
    data = opened(shards, data={"lanes": 16, "skip_rows": [{"rows": pairs}], "skip_steps": [[5, 7]]})
    first = cover(data, steps)[0]
    assert first.left_out == 5 + 2 * 16
    assert first.repeated == 0


def test_a_closed_block_is_left_out_from_its_step_on(shards: Path) -> None:
    data = opened(shards, data={"damage": "mask", "damage_allowance": 1.0})
    block = int(data.loader.planned(3, 4).block[0])
    data.loader.close_blocks([("train", block)], from_step=2)
    planned = data.loader.plan.steps(2, 10)
    (found, *_) = cover(data, 10)
    assert found.left_out == int(((planned.block == block) & (planned.epoch == 0)).sum()) > 0


def test_substitutes_are_no_repeats(shards: Path) -> None:
    data = opened(shards, data={"damage": "substitute", "damage_allowance": 1.0})
    block = int(data.loader.planned(3, 4).block[0])
    data.loader.close_blocks([("train", block)], from_step=0)
    (found, *_) = cover(data, 8)
    assert found.repeated == 0
    assert found.substituted == found.left_out > 0


def test_every_source_has_epochs_of_its_own(shards: Path) -> None:
    both = {
        "sources": [
            {"name": "a", "path": str(shards), "weight": 3.0},
            {"name": "b", "path": str(shards), "weight": 1.0},
        ]
    }
    data = opened(shards, data={"path": None, **both})
    coverage = measure_coverage(data.loader, until=24, advance=lambda _: None)
    seen = {name: sum(e.seen for e in coverage.epochs if e.source == name) for name in ("a", "b")}
    assert seen == {"a": 288, "b": 96}
    assert np.array_equal(coverage.rows_of_step, np.full(24, 16))


def test_a_row_delivered_twice_is_counted(shards: Path) -> None:
    data = opened(shards)
    once = data.loader.planned

    def twice(first: int, last: int) -> Any:
        """The plan of a loader that forgets where it was at step 4."""
        found = once(first, last)
        repeated = once(3, 4)
        at = np.flatnonzero(found.step == 4)
        for name in ("source", "epoch", "block", "row"):
            getattr(found, name)[at] = getattr(repeated, name)
        return found

    data.loader.planned = twice  # type: ignore[method-assign]
    (found, *_) = cover(data, 6)
    assert found.repeated == found.left_out == 16
