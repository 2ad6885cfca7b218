"""The plan: (step, slot) → (source, epoch, block, row), a pure function that any rank can evaluate for any step.

Joins the timeline (which turns of the C lanes a step takes), the mixture (which source a turn belongs to) and each source's
own order. World size, workers and prefetch never enter, so any number of ranks sees the same global batches, and a resume is
one integer (docs/data-format.md). Reads no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import gcd

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import ConfigError
from dstrain.data.mixture import Mixture
from dstrain.data.order import largest_divisor
from dstrain.data.source_order import EMPTY, SourceOrder
from dstrain.data.timeline import Phase, Timeline

PLAN_VERSION = 2
"""Part of every loader state: a change of the arithmetic below, or of what it joins, must raise it."""

Int64 = npt.NDArray[np.int64]

_AUTO_LANES = 64
_ROWS_PER_LANE = 16  # automatic lanes keep at least this many rows each, so that the dropped tail stays below 1/16


@dataclass(frozen=True)
class PlannedRows:
    """Rows of some slots, in slot order; all arrays (n,) int64."""

    source: Int64
    """Number of the source in the plan's order."""
    epoch: Int64
    """The source's own epoch."""
    block: Int64
    """`EMPTY` (-1) where the slot has no row: an epoch's exact tail, or a row that is never to be trained on again."""
    row: Int64


@dataclass(frozen=True)
class SkippedRows:
    """Rows of a source that are never to be trained on again."""

    source: int
    from_step: int
    """Optimizer steps done when this begins to hold; what came before is not rewritten."""
    numbers: Int64
    """(n,) `SourceOrder.row_number` of the rows."""


class Plan:
    """Which row trains at which slot of which step. Immutable.

    Epochs run on without a barrier: a step may hold the end of one and the start of the next.
    """

    def __init__(
        self,
        orders: Sequence[SourceOrder],
        timeline: Timeline,
        *,
        seed: int,
        skip_rows: Sequence[SkippedRows] = (),
    ) -> None:
        """Join the parts.

        Args:
            orders: of each source, in the order of the phases' shares; all with the timeline's lanes.
            timeline: steps to turns.
            seed: the run's seed.
            skip_rows: rows that are not trained on from some step on.
        """
        self.orders = tuple(orders)
        self.timeline = timeline
        self.lanes = timeline.lanes
        self.seed = seed
        self._mixtures = [Mixture(phase.shares, lanes=self.lanes, seed=seed) for phase in timeline.phases]
        lanes = np.arange(self.lanes, dtype=np.int64)
        used = [m.counts(lanes, timeline.turns(p)) for p, m in enumerate(self._mixtures)]
        # (phases, lanes, sources) turns that each source has had when the phase begins
        self._base = np.cumsum(np.stack(used), axis=0) - np.stack(used)
        self._skipped = [_Skipped() for _ in orders]
        for skipped in [*skip_rows, *self._skipped_windows()]:
            self._skipped[skipped.source].add(skipped)

    @classmethod
    def single(
        cls,
        rows_per_block: npt.ArrayLike,
        *,
        seed: int,
        source: str,
        global_batch: int,
        lanes: int | None = None,
        window_rows: int = 8192,
    ) -> Plan:
        """The plan of one source and one batch size."""
        rows = np.asarray(rows_per_block, dtype=np.int64)
        lanes = choose_lanes([global_batch], [int(rows.sum())], lanes=lanes)
        order = SourceOrder(rows, seed=seed, source=source, lanes=lanes, window_rows=window_rows)
        return cls([order], Timeline([Phase(0, global_batch, (1,))], lanes=lanes), seed=seed)

    @property
    def num_rows(self) -> int:
        """Rows of all sources."""
        return sum(order.num_rows for order in self.orders)

    def global_batch(self, step: int) -> int:
        """Rows of a step, over all ranks."""
        return self.timeline.phases[self.timeline.place(step).phase].global_batch

    def slots(self, step: int, first: int, last: int) -> PlannedRows:
        """Rows of the slots [first, last) of a step's global batch; O(log blocks) each, for any step."""
        place = self.timeline.place(step)
        slot = np.arange(first, last, dtype=np.int64)
        lane, inside = np.divmod(slot, place.per_lane)
        return self._turns(place.phase, lane, place.turn + inside, step=np.full_like(slot, step))

    def steps(self, first: int, last: int) -> PlannedRows:
        """All rows of the steps [first, last), in order of step and slot."""
        parts = self.shares(first, last, rank=0, world_size=1)
        none = [np.zeros(0, dtype=np.int64)]
        columns = ("source", "epoch", "block", "row")
        return PlannedRows(*(np.concatenate(none + [getattr(part, name) for part in parts]) for name in columns))

    def shares(self, first: int, last: int, *, rank: int, world_size: int) -> list[PlannedRows]:
        """One rank's rows of each of the steps [first, last): what `slots` gives, with the fixed costs paid once a phase."""
        found: list[PlannedRows] = []
        steps = range(first, last)
        for phase, group in groupby(steps, key=lambda step: self.timeline.place(step).phase):
            numbers = list(group)
            places = [self.timeline.place(step) for step in numbers]
            begin, end = rank_slots(self.timeline.phases[phase].global_batch, rank=rank, world_size=world_size)
            lane, inside = np.divmod(np.arange(begin, end, dtype=np.int64), places[0].per_lane)
            turn = np.repeat(np.array([place.turn for place in places], dtype=np.int64), len(lane))
            step = np.repeat(np.array(numbers, dtype=np.int64), len(lane))
            rows = self._turns(phase, np.tile(lane, len(places)), turn + np.tile(inside, len(places)), step=step)
            columns = [np.split(column, len(places)) for column in (rows.source, rows.epoch, rows.block, rows.row)]
            found += [PlannedRows(*parts) for parts in zip(*columns)]
        return found

    def source_turns(self, step: int) -> Int64:
        """(lanes, sources) turns that each lane of each source has had when `step` steps are done."""
        place = self.timeline.place(step)
        lanes = np.arange(self.lanes, dtype=np.int64)
        now: Int64 = self._base[place.phase] + self._mixtures[place.phase].counts(lanes, place.turn)
        return now

    def epochs(self, step: int) -> list[float]:
        """Epochs of each source that `step` steps have taken."""
        turns = self.source_turns(step).mean(axis=0)
        return [float(t) / order.turns_per_epoch for t, order in zip(turns, self.orders)]

    def _turns(self, phase: int, lane: Int64, turn: Int64, *, step: Int64 | None) -> PlannedRows:
        """Rows of turns of a phase; `step` leaves out what is skipped by then, None leaves out nothing."""
        source, before = self._mixtures[phase].split(lane, turn)
        turns = self._base[phase][lane, source] + before
        epoch, block, row = np.zeros_like(turn), np.full_like(turn, EMPTY), np.full_like(turn, EMPTY)
        for number in np.unique(source).tolist():
            chosen = np.flatnonzero(source == number)
            found = self.orders[number].locate(lane[chosen], turns[chosen])
            epoch[chosen], block[chosen], row[chosen] = found
            if step is not None and len(self._skipped[number].numbers):
                filled = chosen[block[chosen] != EMPTY]
                numbers = self.orders[number].row_number(block[filled], row[filled])
                out = filled[self._skipped[number].holds(numbers, step[filled])]
                block[out] = row[out] = EMPTY
        return PlannedRows(source=source, epoch=epoch, block=block, row=row)

    def _skipped_windows(self) -> list[SkippedRows]:
        """What the windows of steps stepped over would have trained on: it stays out of later epochs too."""
        found = []
        for window in self.timeline.skipped_windows():
            turns = np.arange(window.first_turn, window.last_turn, dtype=np.int64)
            lane = np.repeat(np.arange(self.lanes, dtype=np.int64), len(turns))
            rows = self._turns(window.phase, lane, np.tile(turns, self.lanes), step=None)
            for number, order in enumerate(self.orders):
                mine = (rows.source == number) & (rows.block != EMPTY)
                numbers = order.row_number(rows.block[mine], rows.row[mine])
                found.append(SkippedRows(number, window.step, numbers))
        return found


class _Skipped:
    """Sorted row numbers with the step from which each is out."""

    def __init__(self) -> None:
        self.numbers = np.zeros(0, dtype=np.int64)
        self.from_step = np.zeros(0, dtype=np.int64)

    def add(self, rows: SkippedRows) -> None:
        numbers = np.concatenate([self.numbers, rows.numbers])
        steps = np.concatenate([self.from_step, np.full(len(rows.numbers), rows.from_step, dtype=np.int64)])
        order = np.lexsort((steps, numbers))  # of a row named twice, the earlier step counts
        self.numbers, first = np.unique(numbers[order], return_index=True)
        self.from_step = steps[order][first]

    def holds(self, numbers: Int64, step: Int64) -> npt.NDArray[np.bool_]:
        at = np.minimum(np.searchsorted(self.numbers, numbers), len(self.numbers) - 1)
        out: npt.NDArray[np.bool_] = (self.numbers[at] == numbers) & (self.from_step[at] <= step)
        return out


def choose_lanes(global_batches: Sequence[int], num_rows: Sequence[int], *, lanes: int | None) -> int:
    """C: the given one, checked, or the largest divisor of all batches up to 64 that leaves each source 16 rows a lane.

    Raises:
        ConfigError: a batch is below 1 or larger than all data, or the lanes divide not every batch.
    """
    common = gcd(*global_batches)
    for batch in global_batches:
        if batch < 1:
            raise ConfigError(f"train.global_batch: must be at least 1, got {batch}")
        if sum(num_rows) < batch:
            raise ConfigError(
                f"train.global_batch: {batch} rows are asked for, the training data has only {sum(num_rows)}: "
                "lower train.global_batch or data.sequence_length, or add data"
            )
    if lanes is None:
        return largest_divisor(common, at_most=max(1, min(_AUTO_LANES, min(num_rows) // _ROWS_PER_LANE)))
    if common % lanes or lanes > sum(num_rows):
        near = largest_divisor(common, at_most=lanes)
        asked = ", ".join(map(str, sorted(set(global_batches))))
        raise ConfigError(f"data.lanes: {lanes} does not divide train.global_batch={asked}; nearest: {near}")
    return lanes


def rank_slots(global_batch: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """The slots [first, last) of one rank; sizes differ by at most one, for any world size."""
    return rank * global_batch // world_size, (rank + 1) * global_batch // world_size


def num_micro_batches(global_batch: int, *, micro_batch: int, world_size: int) -> int:
    """Accumulation steps, the same on every rank: what the fullest rank needs."""
    fullest = -(-global_batch // world_size)
    return -(-fullest // micro_batch)
