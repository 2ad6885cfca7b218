"""From planned rows to what one forward sees: pieces of all sources, corrupted, as tensors, with their part of the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dstrain.base.protocols import IGNORED_LABEL, Corrupt, Corrupted, MicroBatch
from dstrain.data.ledger import ledger_digest
from dstrain.data.rows import PlannedRow, RowSource, gather_groups

Int64 = npt.NDArray[np.int64]


def split_evenly(rows: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """Cut a sequence into `parts` runs whose sizes differ by at most one (some may be empty)."""
    bounds = [i * len(rows) // parts for i in range(parts + 1)]
    return [rows[a:b] for a, b in pairwise(bounds)]


def make_micro_batch(
    sources: Sequence[RowSource], rows: Sequence[PlannedRow], corrupt: Corrupt, *, step: int
) -> tuple[MicroBatch, int]:
    """Pieces of some rows as one micro-batch, and their part of the step's ledger; see `make_micro_batches`."""
    [batch], digest = make_micro_batches(sources, [rows], corrupt, step=step)
    return batch, digest


def make_micro_batches(
    sources: Sequence[RowSource], parts: Sequence[Sequence[PlannedRow]], corrupt: Corrupt, *, step: int
) -> tuple[list[MicroBatch], int]:
    """Pieces of some rows as micro-batches, and their part of the step's ledger.

    They are gathered and corrupted in one go: NumPy's fixed costs are paid once, not once a micro-batch.

    Args:
        sources: where rows are read.
        parts: (source, epoch, block, row) of each micro-batch; none makes a filler with zero weight.
        corrupt: the objective's corruption.
        step: enters the ledger, so that a row trained at another step shows.

    Raises:
        DamagedBlockError: a block's bytes are not those that were written.
    """
    if not any(parts):
        return [_filler(sources[0]) for _ in parts], 0
    pieces, sizes = gather_groups(sources, parts)
    corrupted = corrupt(pieces, step=step)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    ends = np.concatenate([[0], np.cumsum(pieces.lengths)])[bounds]
    scored = np.searchsorted(corrupted.targets, ends)
    batches = []
    for number in range(len(parts)):
        if bounds[number] == bounds[number + 1]:
            batches.append(_filler(sources[0]))
            continue
        lengths = tuple(pieces.lengths[bounds[number] : bounds[number + 1]].tolist())
        own, hits = slice(ends[number], ends[number + 1]), slice(scored[number], scored[number + 1])
        batches.append(_cut(corrupted, pieces.offsets[own], lengths, own, hits))
    return batches, ledger_digest(pieces, corrupted, step=step)


def _cut(corrupted: Corrupted, offsets: Int64, lengths: tuple[int, ...], own: slice, hits: slice) -> MicroBatch:
    targets, labels = corrupted.targets[hits] - own.start, corrupted.labels[hits]
    count = len(targets)
    if count == 0:  # a head that sees no row at all breaks some models; one ignored row costs nothing
        targets, labels = np.zeros(1, dtype=np.int64), np.full(1, IGNORED_LABEL, dtype=np.int64)
    return MicroBatch(
        tokens=torch.from_numpy(corrupted.tokens[own]),
        positions=torch.from_numpy(offsets),
        lengths=lengths,
        targets=torch.from_numpy(targets),
        labels=torch.from_numpy(labels),
        num_targets=count,
        num_tokens=sum(lengths),
    )


def _filler(source: RowSource) -> MicroBatch:
    tokens = np.concatenate([source.prefix, source.suffix])
    tokens = tokens if len(tokens) else np.zeros(1, dtype=np.int64)
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.arange(len(tokens)),
        lengths=(len(tokens),),
        targets=torch.zeros(1, dtype=torch.int64),
        labels=torch.full((1,), IGNORED_LABEL, dtype=torch.int64),
    )
