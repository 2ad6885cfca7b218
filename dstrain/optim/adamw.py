"""AdamW with a gate that may leave an update out, and a guarded form where DeepSpeed has no guard."""

from __future__ import annotations

import torch
from torch import Tensor

from dstrain.optim.gates import Gated, Guarded


class GatedAdamW(Gated, torch.optim.AdamW):
    """torch's AdamW behind a gate. Element-wise, so that a rank's partition of flattened parameters is all it needs."""

    def update(self) -> None:
        """Torch's step."""
        torch.optim.AdamW.step(self)

    def _step_device(self, tensor: Tensor) -> torch.device:
        return tensor.device  # where torch's fused form wants its counter


class GuardedAdamW(Guarded, GatedAdamW):
    """A gated AdamW that clips and guards itself."""
