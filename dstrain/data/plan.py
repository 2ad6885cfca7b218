"""The plan: (seed, step, slot) → (epoch, block, row), a pure function that any rank can evaluate for any step.

C canonical lanes split the epoch's order of rows; inside a lane, windows of V rows are permuted, so a shuffle needs only
C·V rows within reach while batches still mix the whole corpus. World size, workers and prefetch never enter, so any
number of ranks sees the same global batches, and a resume is one integer (docs/data-format.md). Reads no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import ConfigError
from dstrain.base.seeds import derive
from dstrain.data.order import largest_divisor, permute, subkey

PLAN_VERSION = 1
"""Part of every loader state: a change of the arithmetic below must raise it."""

Int64 = npt.NDArray[np.int64]

_AUTO_LANES = 64
_ROWS_PER_LANE = 16  # automatic lanes keep at least this many rows each, so that the dropped tail stays below 1/16


@dataclass(frozen=True)
class PlannedRows:
    """Rows of some slots, in slot order; all arrays (n,) int64."""

    epoch: Int64
    block: Int64
    row: Int64


class Plan:
    """Which row trains at which slot of which step. Immutable; the only state is the step asked for.

    An epoch uses floor(R/C)·C rows; the fewer than C rows left over differ each epoch.
    Epochs run on without a barrier: a step may hold the end of one and the start of the next.
    """

    def __init__(
        self,
        rows_per_block: npt.ArrayLike,
        *,
        seed: int,
        source: str,
        global_batch: int,
        lanes: int | None,
        window_rows: int,
    ) -> None:
        """Prepare the plan.

        Args:
            rows_per_block: (B,) rows of each block of the source.
            seed: the run's seed.
            source: name of the source; keys its order, so that adding another source changes nothing here.
            global_batch: rows of one optimizer step, over all ranks.
            lanes: C; must divide `global_batch`. None picks the largest divisor up to 64 that leaves 16 rows a lane.
            window_rows: V, rows of one shuffle window of a lane.

        Raises:
            ConfigError: the batch is larger than the source, or lanes do not divide it.
        """
        self.rows_per_block: Int64 = np.asarray(rows_per_block, dtype=np.int64)
        self.num_rows = int(self.rows_per_block.sum())
        self.seed, self.source, self.global_batch, self.window_rows = seed, source, global_batch, window_rows
        if global_batch < 1:
            raise ConfigError(f"train.global_batch: must be at least 1, got {global_batch}")
        if self.num_rows < global_batch:
            raise ConfigError(
                f"train.global_batch: {global_batch} rows are asked for, the training data has only {self.num_rows}: "
                "lower train.global_batch or data.sequence_length, or add data"
            )
        self.lanes = lanes or largest_divisor(
            global_batch, at_most=max(1, min(_AUTO_LANES, self.num_rows // _ROWS_PER_LANE))
        )
        if global_batch % self.lanes or self.lanes > self.num_rows:
            near = largest_divisor(global_batch, at_most=self.lanes)
            raise ConfigError(
                f"data.lanes: {self.lanes} does not divide train.global_batch={global_batch}; nearest: {near}"
            )
        self.rows_per_lane = self.num_rows // self.lanes
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    @property
    def rows_per_epoch(self) -> int:
        """Rows trained on in one epoch: all but fewer than C."""
        return self.rows_per_lane * self.lanes

    def slots(self, step: int, first: int, last: int) -> PlannedRows:
        """Rows of the slots [first, last) of a step's global batch; O(log blocks) each, for any step."""
        slot = np.arange(first, last, dtype=np.int64)
        per_lane = self.global_batch // self.lanes
        lane = slot // per_lane
        cursor = np.int64(step) * per_lane + slot % per_lane
        epoch, inside = np.divmod(cursor, self.rows_per_lane)
        block = np.empty_like(slot)
        row = np.empty_like(slot)
        for number in np.unique(epoch).tolist():
            chosen = epoch == number
            block[chosen], row[chosen] = self._locate(number, lane[chosen], inside[chosen])
        return PlannedRows(epoch=epoch, block=block, row=row)

    def _locate(self, epoch: int, lane: Int64, inside: Int64) -> tuple[Int64, Int64]:
        window, offset = np.divmod(inside, self.window_rows)
        size = np.minimum(self.window_rows, self.rows_per_lane - window * self.window_rows)
        keys = subkey(derive(self.seed, "plan.window", self.source, epoch), lane, window)
        position = lane * self.rows_per_lane + window * self.window_rows + permute(offset, size, keys)
        # Each epoch begins elsewhere on the ring of rows: else a source of few blocks would always drop the same ones.
        position = (position + derive(self.seed, "plan.shift", self.source, epoch) % self.num_rows) % self.num_rows
        blocks, ends = self._order(epoch)
        at = np.searchsorted(ends, position, side="right")
        block = blocks[at]
        return block, position - (ends[at] - self.rows_per_block[block])

    def _epoch_order(self, epoch: int) -> tuple[Int64, Int64]:
        """Permuted block numbers of an epoch and the cumulative rows over them."""
        num_blocks = len(self.rows_per_block)
        key = derive(self.seed, "plan.blocks", self.source, epoch)
        blocks = permute(np.arange(num_blocks), num_blocks, key)
        return blocks, np.cumsum(self.rows_per_block[blocks])


def rank_slots(global_batch: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """The slots [first, last) of one rank; sizes differ by at most one, for any world size."""
    return rank * global_batch // world_size, (rank + 1) * global_batch // world_size


def num_micro_batches(global_batch: int, *, micro_batch: int, world_size: int) -> int:
    """Accumulation steps, the same on every rank: what the fullest rank needs."""
    fullest = -(-global_batch // world_size)
    return -(-fullest // micro_batch)
