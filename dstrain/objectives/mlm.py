"""Masked-language modelling: cross-entropy in fp32 at the masked positions only.

The sum is returned, not the mean: the engine divides by the number of masked tokens of the whole step, over ranks and
accumulation, so that a mean of means never arises.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from dstrain.base.protocols import IGNORED_LABEL, LossParts, MicroBatch
from dstrain.objectives.masking_config import MaskingConfig


class MlmConfig(MaskingConfig):
    """Masked-language modelling."""

    kind: Literal["mlm"] = "mlm"
    """Which objective."""


class MlmObjective:
    """Implements `base.protocols.Objective`."""

    def loss(self, model: nn.Module, batch: MicroBatch) -> LossParts:
        """Score the model's (M, vocab) logits at the masked positions."""
        logits: Tensor = model(batch).float()
        loss = functional.cross_entropy(logits, batch.labels, ignore_index=IGNORED_LABEL, reduction="sum")
        correct = (logits.detach().argmax(dim=-1) == batch.labels).sum().float()
        return LossParts(loss_sum=loss, correct=correct)
