"""launch/pretrain.py whose loss is thirty times too high wherever certain rows are in the batch.

Started by tests/fault/test_roll_back.py. The trouble lies in the data, as with real spikes: it comes back when the same rows are
trained on again, and stays away when they are stepped over. The rows are those that steps BAD_STEPS have in the order without any
window stepped over.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from torch import nn

from dstrain.base.protocols import LossParts, MicroBatch, StepData
from dstrain.cli.main import main
from dstrain.data.loader import PackedLoader
from dstrain.objectives.mlm import MlmObjective

BAD_STEPS = range(20, 24)


class Poisoned(MicroBatch):
    """A micro-batch of a step with a bad row."""


def install() -> None:
    """Replace the loader's step and the objective's loss in this process."""
    whole_step, whole_loss = PackedLoader.step, MlmObjective.loss
    bad: set[tuple[str, int, int]] = set()

    def step(self: PackedLoader, number: int) -> StepData:
        if not bad:
            plan = self._configured.build()
            rows = plan.steps(BAD_STEPS.start, BAD_STEPS.stop)
            bad.update(zip((self.names[s] for s in rows.source.tolist()), rows.block.tolist(), rows.row.tolist()))
        data = whole_step(self, number)
        if not bad & set(self.rows_of(number)) or self.era:
            return data
        poisoned = [Poisoned(**{f.name: getattr(b, f.name) for f in dataclasses.fields(b)}) for b in data.micro_batches]
        return dataclasses.replace(data, micro_batches=poisoned)

    def loss(self: MlmObjective, model: nn.Module, batch: MicroBatch) -> LossParts:
        parts = whole_loss(self, model, batch)
        return LossParts(parts.loss_sum * 30, parts.correct) if isinstance(batch, Poisoned) else parts

    loader: Any = PackedLoader
    objective: Any = MlmObjective
    loader.step, objective.loss = step, loss


if __name__ == "__main__":
    install()
    sys.exit(main(["pretrain", *sys.argv[1:]]))
