"""From an optimizer section to an optimizer: which class serves which kind."""

from __future__ import annotations

from typing import Any

from dstrain.optim.adamw import GatedAdamW, GuardedAdamW
from dstrain.optim.config import OptimizerConfig
from dstrain.optim.fragment_optimizer import FragmentOptimizer, GuardedFragmentOptimizer
from dstrain.optim.gates import Gated

OPTIMIZERS: tuple[type[Gated], ...] = (GatedAdamW, GuardedAdamW, FragmentOptimizer, GuardedFragmentOptimizer)
"""All that `build_optimizer` may give: right on a rank's partition of flattened parameters."""


def build_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]], *, guarded: bool) -> Gated:
    """The optimizer with a rate of 0; the engine writes the rate before each step.

    Args:
        config: hyper-parameters.
        groups: from `parameter_groups`.
        guarded: clip and refuse non-finite gradients itself (ZeRO stage 0 in fp32, where DeepSpeed does neither).
    """
    clip: dict[str, Any] = {"clip_norm": config.clip_norm} if guarded else {}
    if config.kind == "adamw":
        settings: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "eps": config.eps, "fused": True}
        return GuardedAdamW(groups, **clip, **settings) if guarded else GatedAdamW(groups, **settings)
    return GuardedFragmentOptimizer(groups, **clip) if guarded else FragmentOptimizer(groups)
