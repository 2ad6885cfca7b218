"""Fine-tuning losses: one prediction for each segment (an example), summed in fp32.

Sums are returned, not means: the engine divides by the number of examples of the whole step, over ranks and
accumulation.
N segments, C classes. Does not know where labels come from.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from dstrain.base.protocols import IGNORED_LABEL, LossParts, MicroBatch


class ClassificationObjective:
    """Cross-entropy over classes. Implements `base.protocols.Objective`."""

    def loss(self, model: nn.Module, batch: MicroBatch) -> LossParts:
        """Score the model's (N, C) logits against (N,) int64 classes; ignored labels count for nothing."""
        logits: Tensor = model(batch).float()
        loss = functional.cross_entropy(logits, batch.labels, ignore_index=IGNORED_LABEL, reduction="sum")
        # An ignored label is negative and no class is, so it is never counted as right.
        correct = (logits.detach().argmax(dim=-1) == batch.labels).sum().float()
        return LossParts(loss_sum=loss, correct=correct)


class RegressionObjective:
    """Squared error of one number. Implements `base.protocols.Objective`."""

    def loss(self, model: nn.Module, batch: MicroBatch) -> LossParts:
        """Score the model's (N, 1) predictions against (N,) float32 labels; nothing is right or wrong: `correct` is 0.

        In a batch where every target counts, -100 is a value like any other; the marker is looked for only in a batch
        that says it holds fewer counting targets than labels.
        """
        predictions: Tensor = model(batch).float().squeeze(-1)
        labels = batch.labels.float()
        errors = predictions - labels
        if batch.num_targets < len(labels):
            errors = errors.masked_fill(labels == IGNORED_LABEL, 0.0)
        return LossParts(loss_sum=errors.square().sum(), correct=errors.new_zeros(()))
