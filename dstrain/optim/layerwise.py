"""Updates whose size is set for each parameter as a whole: StableAdamW and LAMB; and AdamW in the same words.

All three keep Adam's moments as torch's AdamW does (biased, corrected when used), so their checkpoints can be exchanged. Norms
are those of whole parameters, whatever part of them a rank holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dstrain.base.device import sent
from dstrain.optim.layout import Layout, multiply, sums_of_squares

States = Sequence[Mapping[str, Tensor]]


def adamw(tensors: list[Tensor], states: States, group: Mapping[str, Any], layout: Layout) -> None:
    """Decoupled Adam (arXiv 1711.05101), as torch's AdamW. `layout` is not needed: it is element-wise."""
    update, _ = _adam_direction(tensors, states, group)
    _add(update, tensors, group["weight_decay"])
    _add(tensors, update, -group["lr"])


def stable_adamw(tensors: list[Tensor], states: States, group: Mapping[str, Any], layout: Layout) -> None:
    """Collective. AdamW whose rate is divided by max(1, RMS) for each parameter (arXiv 2304.13013, algorithm 2).

    RMS = √mean(g² / max(v̂, ε²)) is large where the second moment lags behind the gradient. The decay is scaled with the rate.
    """
    gradients = _gradients(tensors)
    update, roots = _adam_direction(tensors, states, group)
    ratios = list(torch._foreach_div(gradients, list(torch._foreach_clamp_min(roots, group["eps"]))))
    sizes = layout.once("sizes", lambda: _sizes(layout, tensors[0].device))
    rms = (sums_of_squares(ratios, tensors, layout) / sizes).sqrt()
    _add(update, tensors, group["weight_decay"])
    multiply(update, tensors, 1.0 / rms.clamp(min=1.0), layout)
    _add(tensors, update, -group["lr"])


def lamb(tensors: list[Tensor], states: States, group: Mapping[str, Any], layout: Layout) -> None:
    """Collective. Updates in proportion to each parameter's norm (arXiv 1904.00962, algorithm 2, φ the identity).

    As in the authors' code, parameters that are not decayed (biases, norms) keep Adam's update, and so does a parameter
    whose norm, or whose update's, is 0.
    """
    update, _ = _adam_direction(tensors, states, group)
    _add(update, tensors, group["weight_decay"])
    if group["adapted"]:
        weight, step = sums_of_squares(tensors, tensors, layout), sums_of_squares(update, tensors, layout)
        usable = (weight > 0) & (step > 0)
        multiply(update, tensors, torch.where(usable, (weight / step.clamp(min=1e-300)).sqrt(), 1.0), layout)
    _add(tensors, update, -group["lr"])


def _adam_direction(
    tensors: list[Tensor], states: States, group: Mapping[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Move the moments; m̂ / (√v̂ + ε), and √v̂."""
    beta1, beta2 = group["betas"]
    gradients, firsts, seconds = _gradients(tensors), [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
    for state in states:
        state["step"] += 1
    step = float(states[0]["step"])
    torch._foreach_lerp_(firsts, gradients, 1 - beta1)
    torch._foreach_mul_(seconds, beta2)
    torch._foreach_addcmul_(seconds, gradients, gradients, 1 - beta2)
    roots = list(torch._foreach_sqrt(seconds))
    torch._foreach_div_(roots, (1 - beta2**step) ** 0.5)
    update = list(torch._foreach_div(firsts, 1 - beta1**step))
    torch._foreach_div_(update, list(torch._foreach_add(roots, group["eps"])))
    return update, roots


def _add(targets: list[Tensor], values: list[Tensor], factor: float) -> None:
    if factor:
        torch._foreach_add_(targets, values, alpha=factor)


def _gradients(tensors: list[Tensor]) -> list[Tensor]:
    return [t.grad for t in tensors if t.grad is not None]


def _sizes(layout: Layout, device: torch.device) -> Tensor:
    """(parameters,) elements of each."""
    return sent(torch.tensor([torch.Size(shape).numel() for shape in layout.shapes], dtype=torch.float64), device)
