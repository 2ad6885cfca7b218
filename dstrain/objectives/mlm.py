"""Masked-language modelling: cross-entropy in fp32 at the masked positions only.

The sum is returned, not the mean: the engine divides by the number of masked tokens of the whole step, over ranks and
accumulation, so that a mean of means never arises.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import nn

from dstrain.base.protocols import LossParts, MicroBatch
from dstrain.objectives.linear_cross_entropy import LinearCrossEntropy, score_logits
from dstrain.objectives.masking_config import MaskingConfig


class MlmConfig(MaskingConfig):
    """Masked-language modelling."""

    kind: Literal["mlm"] = "mlm"
    """Which objective."""


class MlmObjective:
    """Implements `base.protocols.Objective`."""

    def __init__(self, *, compiled: bool = False) -> None:
        """Prepare.

        Args:
            compiled: compile the passes over the logits; see `LinearCrossEntropy`.
        """
        self._head = LinearCrossEntropy(compiled=compiled)

    def loss(self, model: nn.Module, batch: MicroBatch) -> LossParts:
        """Score the masked positions: inside the model's vocabulary head where it lets us, else on its (M, vocab) logits."""
        if getattr(model, "scores_at_head", False):
            loss, correct = model(batch, head_loss=partial(self._head, labels=batch.labels))
        else:
            loss, correct = score_logits(model(batch), batch.labels)
        return LossParts(loss_sum=loss, correct=correct)
