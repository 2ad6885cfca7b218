"""Tells remote datasets which blocks come next: the plan is known, so the network can be busy before anybody waits.

Walks ahead of the training step by step until the blocks ahead fill a byte budget, and hands each dataset the list in order of
first use. Only a hint: what is delivered, and in which order, never depends on it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from dstrain.data.blocks import BlockDataset

_MAX_STEPS = 100_000
_STEPS_A_CALL = 64  # a seek far ahead catches up over several calls instead of stalling one
_TELLINGS = 16  # the list is told anew each time a sixteenth of the steps ahead has passed

Blocks = Sequence[tuple[int, int]]


class Lookahead:
    """A moving window over the blocks that a rank will need."""

    def __init__(
        self,
        datasets: Sequence[BlockDataset],
        *,
        blocks_of: Callable[[int], Blocks],
        block_bytes: Callable[[int, int], int],
        limit_bytes: int,
        kept_bytes: int = 0,
        last_step: int | None = None,
    ) -> None:
        """Look ahead for some datasets.

        Args:
            datasets: all sources; local ones ignore what they are told.
            blocks_of: (source, block) pairs a step needs of this rank, in any order, repeats allowed.
            block_bytes: stored size of (source, block).
            limit_bytes: look no further than blocks of this size together.
            kept_bytes: blocks of this size together stay decoded after use; they are neither told again nor counted.
            last_step: one past the last step; None for no end.
        """
        self._datasets, self._blocks_of, self._block_bytes = datasets, blocks_of, block_bytes
        self._limit, self._last = limit_bytes, last_step
        self._ahead: deque[tuple[int, tuple[tuple[int, int], ...]]] = deque()
        self._uses: dict[tuple[int, int], int] = {}
        self._kept: OrderedDict[tuple[int, int], None] = OrderedDict()  # used lately: still decoded in memory
        self._kept_bytes, self._kept_limit = 0, kept_bytes
        self._counted: set[tuple[int, int]] = set()
        self._bytes = 0  # of the counted ones
        self._next = 0
        self._told = 0
        self._lock = threading.Lock()

    def at(self, step: int) -> None:
        """Tell the datasets what comes from `step` on; safe from any thread, steps may be named out of order."""
        with self._lock:
            if self._ahead and self._ahead[0][0] > step:
                return  # a thread that is behind another one: its blocks have been named already
            if self._ahead and step - self._told < len(self._ahead) // _TELLINGS:
                return
            self._told = step
            self._drop(step)
            self._extend(max(self._next, step))
            upcoming: list[dict[int, None]] = [{} for _ in self._datasets]
            for _, blocks in self._ahead:
                for source, block in blocks:
                    if (source, block) not in self._kept:
                        upcoming[source][block] = None
            for dataset, blocks_ in zip(self._datasets, upcoming):
                dataset.will_need(list(blocks_))

    def _drop(self, step: int) -> None:
        while self._ahead and self._ahead[0][0] < step:
            for pair in self._ahead.popleft()[1]:
                self._uses[pair] -= 1
                if self._uses[pair] == 0:
                    del self._uses[pair]
                if pair in self._kept:
                    self._kept.move_to_end(pair)
                else:
                    self._keep(pair)

    def _keep(self, pair: tuple[int, int]) -> None:
        """A step has used this block: it stands in the decoded blocks now, and pushes out what was used longest ago."""
        self._count(pair, -1)
        self._kept[pair] = None
        self._kept_bytes += self._block_bytes(*pair)
        while self._kept and self._kept_bytes > self._kept_limit:
            old, _ = self._kept.popitem(last=False)
            self._kept_bytes -= self._block_bytes(*old)
            if old in self._uses:
                self._count(old, 1)

    def _count(self, pair: tuple[int, int], sign: int) -> None:
        """Let a block ahead count against the budget, or no more."""
        if (pair in self._counted) == (sign < 0):
            self._bytes += sign * self._block_bytes(*pair)
            (self._counted.add if sign > 0 else self._counted.discard)(pair)

    def _extend(self, step: int) -> None:
        end = step + _STEPS_A_CALL if self._last is None else min(step + _STEPS_A_CALL, self._last)
        while step < end and self._bytes < self._limit and len(self._ahead) < _MAX_STEPS:
            pairs = tuple(dict.fromkeys(self._blocks_of(step)))
            for pair in pairs:
                self._uses[pair] = self._uses.get(pair, 0) + 1
                if pair not in self._kept:
                    self._count(pair, 1)
            self._ahead.append((step, pairs))
            step += 1
        self._next = step
