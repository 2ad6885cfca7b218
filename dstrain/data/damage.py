"""What a run does about damaged blocks: which are closed from which step on, what stands in for their rows, how many are allowed.

A rank that meets a damaged block goes on at once (policy `mask` or `substitute`) and tells the others with the step's own
agreement; from a step that no rank has prepared yet, the block is closed on all of them. So no rank is ever short of a step, and
what was trained on stays a function of the plan and this small, agreed table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from dstrain.base.errors import DataError
from dstrain.base.seeds import derive
from dstrain.data.config import DamagePolicy
from dstrain.data.order import subkey
from dstrain.data.plan import Plan
from dstrain.data.source_order import EMPTY

ClosedBlock = tuple[str, int, int]
"""(source, block, first step without it)."""

_MAX_TRIES = 64


class Quarantine:
    """Closed blocks, the same on every rank at a step boundary.

    Attributes:
        closed: block number and first step without it, by source.
    """

    def __init__(self, names: Sequence[str], *, num_blocks: int, allowance: float) -> None:
        """Start with none.

        Args:
            names: of the sources.
            num_blocks: blocks of all sources.
            allowance: share of them that may be closed; one always may.
        """
        self.names = tuple(names)
        self.limit = max(1, int(num_blocks * allowance))
        self.num_blocks = num_blocks
        self.closed: dict[str, dict[int, int]] = {name: {} for name in names}

    def close(self, blocks: Iterable[tuple[str, int]], *, from_step: int) -> list[ClosedBlock]:
        """Close blocks from a step on; the ones that were not closed yet come back.

        Raises:
            DataError: more blocks are damaged than the allowance lets pass.
        """
        new = [(source, block, from_step) for source, block in sorted(set(blocks)) if block not in self.closed[source]]
        for source, block, step in new:
            self.closed[source][block] = step
        count = sum(len(blocks_) for blocks_ in self.closed.values())
        if count > self.limit:
            source, block, _ = new[-1] if new else self.entries()[-1]
            raise DataError(
                f"{count} of {self.num_blocks} blocks are damaged, data.damage_allowance lets {self.limit} pass; "
                f"the last was block {block} of source {source!r}. `dstrain shards verify` lists all damage"
            )
        return new

    def entries(self) -> list[ClosedBlock]:
        """The table, sorted; JSON-able."""
        return sorted((source, block, step) for source, blocks in self.closed.items() for block, step in blocks.items())

    def restore(self, entries: Iterable[Sequence[object]]) -> None:
        """Take over a table from a checkpoint; sources that are gone are dropped."""
        self.closed = {name: {} for name in self.names}
        for source, block, step in entries:
            if source in self.closed:
                self.closed[str(source)][int(str(block))] = int(str(step))

    def is_closed(self, source: int, block: int, step: int) -> bool:
        """Whether a step does without a block."""
        return self.closed[self.names[source]].get(block, step + 1) <= step


def stand_in(
    policy: DamagePolicy, plan: Plan, row: tuple[int, int, int, int], *, avoid: Iterable[int]
) -> tuple[int, int, int, int] | None:
    """What is trained on instead of a row that cannot be read.

    Args:
        policy: `substitute` finds another row, anything else none.
        plan: the run's plan.
        row: (source, epoch, block, row).
        avoid: blocks of the source that cannot be read.

    Returns:
        Another row of the same source and epoch, a pure function of the arguments; or None for an empty slot.
    """
    if policy != "substitute":
        return None
    source, epoch, block, inside = row
    order, avoided = plan.orders[source], set(avoid)
    key = derive(plan.seed, "substitute", order.source)
    tries = subkey(key, np.int64(epoch), np.int64(block), np.int64(inside), np.arange(_MAX_TRIES))
    numbers = (tries % np.uint64(order.num_rows)).astype(np.int64)
    blocks = np.searchsorted(order.block_starts, numbers, side="right") - 1
    for number, candidate in zip(numbers.tolist(), blocks.tolist()):
        if candidate not in avoided and candidate != EMPTY:
            return source, epoch, candidate, number - int(order.block_starts[candidate])
    return None
