"""What of each source and epoch a run has seen, missed and repeated, counted row by row from the plan.

Exact at any length: rows are ticked off one by one; documents and tokens come from the index where a block was seen whole
or not at all, and from packing its document ends where it was seen in part. Reads no tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dstrain.data.loader import ERA_EPOCHS, PackedLoader
from dstrain.data.packing import pack
from dstrain.data.rows import RowSource
from dstrain.data.source_order import EMPTY, SourceOrder

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

_CHUNK_ROWS = 1 << 20


@dataclass(frozen=True)
class EpochCoverage:
    """One epoch of one source."""

    source: str
    epoch: int
    complete: bool
    """Whether every lane has gone through it."""
    rows: int
    """Rows of the source."""
    seen: int
    """Different rows trained on."""
    tail: int
    """Rows that this epoch leaves out (fewer than the lanes; other ones each epoch); known when it is complete."""
    left_out: int
    """Rows that were due and not trained on: skip lists, skipped steps, closed blocks."""
    to_come: int
    """Rows still to come in this epoch."""
    repeated: int
    """Rows trained on more than once; must be 0."""
    substituted: int
    """Rows trained on in place of rows of closed blocks (policy `substitute`)."""
    documents: int
    """Documents of which anything was seen."""
    all_documents: int
    tokens: int
    """Tokens seen, frames not counted."""
    all_tokens: int


@dataclass(frozen=True)
class Coverage:
    """All epochs of all sources, and the rows of each step."""

    epochs: tuple[EpochCoverage, ...]
    rows_of_step: Int64
    """(steps,) rows trained on in each step from the data's beginning on."""


class _Tally:
    """The rows of one epoch of one source, ticked off."""

    def __init__(self, num_rows: int) -> None:
        self.seen: Bool = np.zeros(num_rows, dtype=np.bool_)
        self.repeated = self.substituted = 0

    def tick(self, numbers: Int64) -> None:
        fresh = np.unique(numbers[~self.seen[numbers]])
        self.repeated += len(numbers) - len(fresh)
        self.seen[fresh] = True


def measure_coverage(loader: PackedLoader, *, until: int, advance: Callable[[int], None]) -> Coverage:
    """Tick off every row of the steps from the data's beginning to `until`.

    Args:
        loader: restored from the run's checkpoint.
        until: optimizer steps done.
        advance: called with the steps done since the last call.
    """
    tallies: dict[tuple[int, int], _Tally] = {}
    rows_of_step = [np.zeros(0, dtype=np.int64)]
    first = loader.origin
    while first < until:
        last = min(until, first + max(1, _CHUNK_ROWS // loader.plan.global_batch(first)))
        rows_of_step.append(_tick_steps(loader, tallies, first, last))
        advance(last - first)
        first = last
    turns = loader.plan.source_turns(max(until, loader.origin))
    found = [
        _epoch(loader, source, epoch, tally, turns[:, source]) for (source, epoch), tally in sorted(tallies.items())
    ]
    return Coverage(tuple(found), np.concatenate(rows_of_step))


def _tick_steps(loader: PackedLoader, tallies: dict[tuple[int, int], _Tally], first: int, last: int) -> Int64:
    """Tick off the rows of some steps; (last - first,) rows of each step come back."""
    planned = loader.planned(first, last)
    as_planned = np.ones(len(planned.block), dtype=np.bool_)
    if loader.quarantine.entries():
        plan = loader.plan.steps(first, last)
        as_planned = (plan.block == planned.block) & (plan.row == planned.row)
    filled = planned.block != EMPTY
    epochs = planned.epoch - loader.era * ERA_EPOCHS
    # One number for a (source, epoch) pair; np.unique of columns would sort records.
    pair = planned.source * ERA_EPOCHS + epochs
    for value in np.unique(pair[filled]).tolist():
        source, epoch = divmod(value, ERA_EPOCHS)
        chosen = filled & (pair == value)
        tally = tallies.setdefault((source, epoch), _Tally(loader.plan.orders[source].num_rows))
        mine = chosen & as_planned
        tally.tick(loader.plan.orders[source].row_number(planned.block[mine], planned.row[mine]))
        tally.substituted += int((chosen & ~as_planned).sum())
    return np.bincount(planned.step[filled] - first, minlength=last - first).astype(np.int64)


def _epoch(loader: PackedLoader, source: int, epoch: int, tally: _Tally, turns: Int64) -> EpochCoverage:
    order = loader.plan.orders[source]
    inside = np.clip(turns - epoch * order.turns_per_epoch, 0, order.turns_per_epoch)
    complete = bool((inside == order.turns_per_epoch).all())
    due = int(np.minimum(inside, lane_rows(order)).sum())
    seen = int(tally.seen.sum())
    documents, tokens = _contents(loader.sources[source], order, tally.seen)
    manifest = loader.sources[source].dataset.manifest
    return EpochCoverage(
        source=loader.names[source],
        epoch=epoch,
        complete=complete,
        rows=order.num_rows,
        seen=seen,
        tail=order.num_rows - order.rows_per_epoch,
        left_out=due - seen,
        to_come=order.rows_per_epoch - due,
        repeated=tally.repeated,
        substituted=tally.substituted,
        documents=documents,
        all_documents=manifest.num_documents,
        tokens=tokens,
        all_tokens=manifest.num_tokens,
    )


def lane_rows(order: SourceOrder) -> Int64:
    """(C,) rows of each lane in one epoch."""
    full, rest = divmod(order.num_rows, order.lanes)
    lanes = np.arange(order.lanes, dtype=np.int64)
    return full + (lanes < rest) if order.tail == "exact" else np.full(order.lanes, full, dtype=np.int64)


def _contents(source: RowSource, order: SourceOrder, seen: Bool) -> tuple[int, int]:
    """Documents and tokens of the rows seen; a document counts when any part of it was seen."""
    used = np.flatnonzero(order.rows_per_block)
    counts = np.add.reduceat(seen.astype(np.int64), order.block_starts[used])
    whole = used[counts == order.rows_per_block[used]]
    part = used[(counts > 0) & (counts < order.rows_per_block[used])]
    documents, tokens = _whole_blocks(source, whole)
    for block in part.tolist():
        packing = pack(
            source.dataset.ends(block), sequence_length=source.sequence_length, frame_length=source.frame_length
        )
        start = order.block_starts[block]
        pieces = np.repeat(seen[start : start + order.rows_per_block[block]], np.diff(packing.row_starts))
        documents += len(np.unique(packing.document[pieces]))
        tokens += int(packing.length[pieces].sum())
    return documents, tokens


def _whole_blocks(source: RowSource, blocks: Int64) -> tuple[int, int]:
    """Documents and tokens of whole blocks, from the index where the dataset has one in memory."""
    records = getattr(source.dataset, "blocks", None)
    if isinstance(records, np.ndarray) and records.dtype.names and {"docs", "tokens"} <= set(records.dtype.names):
        chosen = records[blocks]
        return int(chosen["docs"].sum(dtype=np.int64)), int(chosen["tokens"].sum(dtype=np.int64))
    ends = [source.dataset.ends(block) for block in blocks.tolist()]
    return sum(len(e) for e in ends), sum(int(e[-1]) for e in ends)
