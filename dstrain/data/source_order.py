"""The order of one source: (lane, turn) → (epoch, block, row), a pure function that any rank can evaluate anywhere.

C canonical lanes split the epoch's order of rows; inside a lane, windows of V rows are permuted, so a shuffle needs only
C·V rows within reach while batches still mix the whole corpus (docs/data-format.md). Another source, another weight or
another world changes nothing here. Reads no files.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import ConfigError
from dstrain.base.seeds import derive
from dstrain.data.order import permute, subkey

Int64 = npt.NDArray[np.int64]
Tail = Literal["rotate", "exact"]

EMPTY = -1
"""Block and row of a turn that has no row: it trains nothing."""


class SourceOrder:
    """The turns of a source's lanes, epoch after epoch. Immutable.

    With tail `rotate` an epoch has floor(R/C) turns a lane, and the fewer than C rows left over differ each epoch; with
    `exact` it has ceil(R/C), every row comes once, and some lanes' last turn is empty.
    """

    def __init__(
        self, rows_per_block: npt.ArrayLike, *, seed: int, source: str, lanes: int, window_rows: int, tail: Tail = "rotate"
    ) -> None:  # fmt: skip
        """Prepare the order.

        Args:
            rows_per_block: (B,) rows of each block of the source.
            seed: the run's seed.
            source: its name; keys its order, so that adding another source changes nothing here.
            lanes: C.
            window_rows: V, rows of one shuffle window of a lane.
            tail: what becomes of the R mod C rows at an epoch's end.

        Raises:
            ConfigError: the source is empty or has fewer rows than lanes.
        """
        self.rows_per_block: Int64 = np.asarray(rows_per_block, dtype=np.int64)
        self.num_rows = int(self.rows_per_block.sum())
        self.seed, self.source, self.lanes, self.window_rows, self.tail = seed, source, lanes, window_rows, tail
        if self.num_rows == 0:
            raise ConfigError(f"source {source!r} has no rows: leave it out, or build its shards from text")
        if lanes > self.num_rows:
            raise ConfigError(
                f"data.lanes: {lanes} lanes are more than the {self.num_rows} rows of source {source!r}; "
                f"set data.lanes to at most {self.num_rows}, or add data"
            )
        full, rest = divmod(self.num_rows, lanes)
        self.turns_per_epoch = full + (1 if tail == "exact" and rest else 0)
        self._lane_rows = full + (np.arange(lanes) < rest if tail == "exact" else np.zeros(lanes, dtype=np.int64))
        self._lane_start = np.cumsum(self._lane_rows) - self._lane_rows
        self._order = lru_cache(maxsize=2)(self._epoch_order)
        self.block_starts: Int64 = np.cumsum(self.rows_per_block) - self.rows_per_block

    @property
    def rows_per_epoch(self) -> int:
        """Rows trained on in one epoch."""
        return int(self._lane_rows.sum())

    def locate(self, lane: Int64, turn: Int64) -> tuple[Int64, Int64, Int64]:
        """Epoch, block and row of the turns of some lanes, counted from the start of training; O(log blocks) each.

        Args:
            lane: (n,) lanes.
            turn: (n,) turns of these lanes, from 0.

        Returns:
            (n,) epochs, blocks and rows; block and row are `EMPTY` where the turn has no row.
        """
        epoch, inside = np.divmod(turn, self.turns_per_epoch)
        block, row = np.full_like(turn, EMPTY), np.full_like(turn, EMPTY)
        for number in np.unique(epoch).tolist():
            chosen = np.flatnonzero((epoch == number) & (inside < self._lane_rows[lane]))
            if len(chosen):
                block[chosen], row[chosen] = self._locate(number, lane[chosen], inside[chosen])
        return epoch, block, row

    def _locate(self, epoch: int, lane: Int64, inside: Int64) -> tuple[Int64, Int64]:
        window, offset = np.divmod(inside, self.window_rows)
        size = np.minimum(self.window_rows, self._lane_rows[lane] - window * self.window_rows)
        keys = subkey(derive(self.seed, "plan.window", self.source, epoch), lane, window)
        position = self._lane_start[lane] + window * self.window_rows + permute(offset, size, keys)
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

    def row_number(self, block: Int64, row: Int64) -> Int64:
        """(n,) number of a row among all rows of the source, in stored order."""
        return self.block_starts[block] + row
