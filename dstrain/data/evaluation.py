"""A fixed set of held-out rows as micro-batches: the same rows and masks at every call and at every world size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dstrain.base.protocols import Corrupt, MicroBatch
from dstrain.base.world import World
from dstrain.data.micro_batch import make_micro_batch, split_evenly
from dstrain.data.plan import num_micro_batches, rank_slots
from dstrain.data.rows import RowSource


def evaluation_batches(
    source: RowSource,
    rows_per_block: npt.ArrayLike,
    corrupt: Corrupt,
    *,
    world: World,
    micro_batch: int,
    max_rows: int | None,
) -> list[MicroBatch]:
    """This rank's micro-batches of a fixed evaluation set: the same rows and masks at every call and world size.

    Args:
        source: rows of the held-out split.
        rows_per_block: (B,) rows of each block.
        corrupt: the corruption with the evaluation stream's key.
        world: whose share; every rank gets the same number of micro-batches.
        micro_batch: most rows of one forward.
        max_rows: take this many rows, spread evenly over the split; None takes all.
    """
    counts = np.asarray(rows_per_block, dtype=np.int64)
    total = int(counts.sum())
    num_rows = total if max_rows is None else min(total, max_rows)
    chosen = (np.arange(num_rows) * total) // max(1, num_rows)
    ends = np.cumsum(counts)
    block = np.searchsorted(ends, chosen, side="right")
    row = chosen - (ends[block] - counts[block])
    first, last = rank_slots(num_rows, rank=world.rank, world_size=world.size)
    rows = [(0, 0, b, r) for b, r in zip(block[first:last].tolist(), row[first:last].tolist())]
    parts = split_evenly(rows, num_micro_batches(max(1, num_rows), micro_batch=micro_batch, world_size=world.size))
    return [make_micro_batch([source], part, corrupt, step=0)[0] for part in parts]
