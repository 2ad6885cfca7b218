"""Examples in training order: a pure function of (seed, step, rank, world), as the pretraining loader is.

Global position k = step · global batch + slot names (epoch, index) = divmod(k, N); the example is index under the
epoch's permutation. So every example trains once per epoch, any world size sees the same global batches, a step may
hold the end of one epoch and the start of the next, and a resume is one integer. Inside a rank's step examples are
ordered by length, which changes padding only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import CheckpointError, ConfigError
from dstrain.base.protocols import MicroBatch, StepData
from dstrain.base.seeds import derive
from dstrain.base.world import World
from dstrain.data.ledger import LEDGER_MODULUS
from dstrain.data.loader import state_difference
from dstrain.data.micro_batch import split_evenly
from dstrain.data.order import ORDER_VERSION, permute, subkey
from dstrain.data.plan import num_micro_batches, rank_slots
from dstrain.data.timeline import with_window
from dstrain.tasks.encoded import EncodedExamples, longest_first, make_micro_batch

FORMAT_VERSION = 1
"""Part of the loader's state: a change of the order or the ledger below must raise it."""

FILLER = -1
"""Index of a segment that is no example."""

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PlannedExamples:
    """Examples of some slots, in slot order; both arrays (n,) int64."""

    epoch: Int64
    example: Int64


def planned_examples(
    step: int, first: int, last: int, *, num_examples: int, global_batch: int, seed: int
) -> PlannedExamples:
    """Which examples stand at slots [first, last) of a step.

    Args:
        step: optimizer step, from 0.
        first: first slot.
        last: one past the last slot.
        num_examples: N, 1 or more.
        global_batch: examples of one step over all ranks.
        seed: the run's seed.
    """
    epoch, index = np.divmod(step * global_batch + np.arange(first, last, dtype=np.int64), num_examples)
    keys = {int(e): derive(seed, "finetune", int(e)) for e in np.unique(epoch)}
    key = np.array([keys[int(e)] for e in epoch], dtype=np.uint64)
    return PlannedExamples(epoch=epoch, example=permute(index, num_examples, key))


class ExampleLoader:
    """Implements `base.protocols.Loader` for fine-tuning.

    Args:
        examples: the training examples, the same on every rank.
        seed: the run's seed.
        global_batch: examples of one optimizer step over all ranks.
        micro_batch: most examples of one forward.
        world: whose share this is.
        pads: whether the model will be fed padded rows, so that padding is counted.

    Raises:
        ConfigError: a batch size is below 1.
    """

    def __init__(
        self,
        examples: EncodedExamples,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        world: World,
        pads: bool = True,
    ) -> None:
        for name, value in (("global_batch", global_batch), ("micro_batch", micro_batch)):
            if value < 1:
                raise ConfigError(f"train.{name}: must be at least 1, got {value}")
        self._examples = examples
        self._seed = seed
        self._global_batch = global_batch
        self._pads = pads
        self._first, self._last = rank_slots(global_batch, rank=world.rank, world_size=world.size)
        self._num_micro = num_micro_batches(global_batch, micro_batch=micro_batch, world_size=world.size)
        self.steps_per_epoch = len(examples) / global_batch
        self.stepped_over: tuple[tuple[int, int], ...] = ()

    def step(self, step: int) -> StepData:
        """This rank's micro-batches of optimizer step `step` (from 0)."""
        planned = self.examples_of(step)
        ordered = longest_first(self._examples, planned.example).tolist()
        parts = split_evenly(ordered, self._num_micro)
        micro_batches = [make_micro_batch(self._examples, part) for part in parts]
        slots = sum(len(part) * int(self._examples.lengths[part[0]]) for part in parts if part)
        return StepData(
            micro_batches=micro_batches,
            num_rows=len(ordered),
            padded_tokens=slots if self._pads else sum(batch.num_tokens for batch in micro_batches),
            ledger=ledger_digest(planned, step=step),
            epoch=(self._data_step(step) + 1) / self.steps_per_epoch,
        )

    def examples_of(self, step: int) -> PlannedExamples:
        """The examples of this rank at a step, in slot order."""
        return self._planned(step, self._first, self._last)

    def rows_of(self, step: int) -> list[tuple[str, int, int]]:
        """("examples", epoch, example) of everything that all ranks together train on in a step."""
        planned = self._planned(step, 0, self._global_batch)
        return [
            ("examples", epoch, example) for epoch, example in zip(planned.epoch.tolist(), planned.example.tolist())
        ]

    def _planned(self, step: int, first: int, last: int) -> PlannedExamples:
        return planned_examples(
            self._data_step(step),
            first,
            last,
            num_examples=len(self._examples),
            global_batch=self._global_batch,
            seed=self._seed,
        )

    def _data_step(self, step: int) -> int:
        """The step whose data a step takes: further on by what was stepped over before it."""
        return step + sum(last - first for first, last in self.stepped_over if first <= step)

    def phase_of(self, step: int) -> int:
        """All of fine-tuning is one phase."""
        return 0

    def skip_window(self, first: int, last: int, *, from_step: int) -> None:
        """Step over the examples of the steps [first, last), in this epoch; see `base.protocols.Loader`.

        Raises:
            ValueError: no window, or one that would change the data of steps already done.
        """
        if not from_step <= first < last:
            raise ValueError(f"[{first}, {last}) is no window of steps after step {from_step}")
        self.stepped_over = with_window(self.stepped_over, first, last)

    def state_dict(self) -> dict[str, Any]:
        """What pins the order; compared but for the windows stepped over: the position is the step counter of the run."""
        return {
            "kind": "examples",
            "format_version": FORMAT_VERSION,
            "order_version": ORDER_VERSION,
            "seed": self._seed,
            "num_examples": len(self._examples),
            "fingerprint": self._examples.fingerprint,
            "global_batch": self._global_batch,
            "stepped_over": [list(window) for window in self.stepped_over],
        }

    def restore(self, state: Mapping[str, Any], *, step: int, accept_new_data: bool = False) -> None:
        """Refuse to go on with other examples, another order or another batch size.

        Raises:
            CheckpointError: with each differing key, its value then and now.
        """
        difference = state_difference(saved=state, now=self.state_dict(), ignore=("stepped_over",))
        if difference:
            raise CheckpointError(
                f"the data order changed since the checkpoint at step {step} ({difference}): restore these settings, "
                "or start a new run with model.init_from pointing at this one"
            )
        self.stepped_over = tuple((int(a), int(b)) for a, b in state.get("stepped_over", []))

    def num_micro_batches(self, step: int) -> int:
        """Forwards of a step, the same on every rank and at every step."""
        return self._num_micro

    def close_blocks(self, blocks: Sequence[tuple[str, int]], *, from_step: int) -> list[tuple[str, int, int]]:
        """Examples are in memory: there are no blocks to close."""
        return []


def ledger_digest(planned: PlannedExamples, *, step: int) -> int:
    """Σ mix(example, epoch, step) mod 2^63 over the planned examples: adds up over ranks, whatever their number."""
    mixed = subkey(0, planned.example, planned.epoch, step)
    return int(mixed.sum(dtype=np.uint64)) % LEDGER_MODULUS


@dataclass(frozen=True)
class EvaluationBatch:
    """A micro-batch and where its outputs belong."""

    batch: MicroBatch
    indices: Int64
    """(N,) example of each segment; FILLER for a segment that only keeps the ranks in step."""


def evaluation_batches(examples: EncodedExamples, *, world: World, micro_batch: int) -> list[EvaluationBatch]:
    """This rank's share of an evaluation: every example on one rank, the same number of micro-batches on all ranks.

    Args:
        examples: what is evaluated.
        world: whose share this is.
        micro_batch: most examples of one forward.
    """
    ordered = longest_first(examples, np.arange(len(examples), dtype=np.int64))
    mine = ordered[world.rank :: world.size]  # neighbours in length go to different ranks, so ranks finish together
    num_micro = num_micro_batches(max(1, len(examples)), micro_batch=micro_batch, world_size=world.size)
    batches = []
    for part in split_evenly(mine.tolist(), num_micro):
        indices = np.asarray(part, dtype=np.int64) if part else np.full(1, FILLER, dtype=np.int64)
        batches.append(EvaluationBatch(batch=make_micro_batch(examples, part), indices=indices))
    return batches
