"""AdamW with the groups an encoder needs, a gate that may leave an update out, and a guarded form where DeepSpeed has no guard.

Weight decay acts on matrices and embeddings only: biases and normalisation weights (fewer than two dimensions) are left
alone, as in BERT and RoBERTa.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dstrain.base.config import Config


class OptimizerConfig(Config):
    """AdamW and its clipping."""

    kind: Literal["adamw"] = "adamw"
    """Which optimizer."""
    learning_rate: float = Field(default=5e-4, gt=0.0)
    """Peak rate."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled decay of matrices and embeddings; biases and norms are never decayed."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the moments; RoBERTa's 0.98 keeps large batches stable."""
    eps: float = Field(default=1e-6, gt=0.0)
    """Added to the denominator."""
    clip_norm: float = Field(default=1.0, ge=0.0)
    """Largest global gradient norm; 0 switches clipping off."""


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups: decayed (two dimensions or more) and not decayed. Order follows the model's; empty groups are left out."""
    trainable = [p for _, p in named_parameters if p.requires_grad]
    decayed = [p for p in trainable if p.ndim >= 2]
    plain = [p for p in trainable if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_adamw(config: OptimizerConfig, groups: list[dict[str, Any]], *, guarded: bool) -> GatedAdamW:
    """The optimizer with a rate of 0; the engine writes the rate before each step.

    Args:
        config: hyper-parameters.
        groups: from `parameter_groups`.
        guarded: clip and refuse non-finite gradients itself (ZeRO stage 0 in fp32, where DeepSpeed does neither).
    """
    kwargs: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "eps": config.eps, "fused": True}
    if guarded:
        return GuardedAdamW(groups, clip_norm=config.clip_norm, **kwargs)
    return GatedAdamW(groups, **kwargs)


class GatedAdamW(torch.optim.AdamW):
    """AdamW that asks before it steps.

    DeepSpeed calls it once its global gradient norm is known, so a gate can still leave the whole update out: weights, moments
    and the step counter stay as they are, and DeepSpeed then copies unchanged masters.
    """

    gate: Callable[[], bool] | None = None
    """Whether the update may be done; DeepSpeed may call `step` several times for one update, once for each group."""

    before_update: Callable[[list[Tensor]], None] | None = None
    """Shown the parameters that are about to be updated, with their gradients as the update takes them; looks only."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step, unless the gate says no."""
        if self.gate is None or self.gate():
            if self.before_update is not None:
                self.before_update([p for group in self.param_groups for p in group["params"]])
            super().step(closure)


class GuardedAdamW(GatedAdamW):
    """A gated AdamW that clips by global norm and leaves everything untouched when the norm is not finite.

    `overflow` and `_global_grad_norm` are the names DeepSpeed's engine reads from an optimizer (0.19.8, runtime/engine.py).
    """

    def __init__(self, params: Any, *, clip_norm: float, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self._clip_norm = clip_norm
        self.overflow = False
        self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Check, clip, and step."""
        gradients: list[Tensor] = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._global_grad_norm = float(norm)
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            self.zero_grad(set_to_none=True)
            return
        if self._clip_norm > 0:
            scale = torch.clamp(self._clip_norm / (norm + 1e-6), max=1.0)
            for gradient in gradients:
                gradient.mul_(scale.to(gradient.device))
        super().step(closure)
