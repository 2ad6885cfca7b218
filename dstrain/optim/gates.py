"""What every optimizer of dstrain can do: ask before it steps, create its state at zero, guard where DeepSpeed has no guard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Gated(torch.optim.Optimizer):
    """Asks before it steps.

    DeepSpeed calls it once its global gradient norm is known, so a gate can still leave the whole update out: weights, moments
    and the step counter stay as they are, and DeepSpeed then copies unchanged masters.
    """

    gate: Callable[[], bool] | None = None
    """Whether the update may be done; DeepSpeed may call `step` several times for one update, once for each group."""

    before_update: Callable[[list[Tensor]], None] | None = None
    """Shown the parameters that are about to be updated, with their gradients as the update takes them; looks only."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update, unless the gate says no."""
        if self.gate is None or self.gate():
            if self.before_update is not None:
                self.before_update([p for group in self.param_groups for p in group["params"]])
            self.update()

    def update(self) -> None:
        """The optimizer's own step; every kind brings its own."""
        raise NotImplementedError(f"{type(self).__name__} has no update")

    def create_state(self, tensor: Tensor, moments: tuple[str, ...]) -> dict[str, Any]:
        """The state of one tensor, made at zero where torch would make it at the first step.

        Args:
            tensor: of the optimizer, whole or a rank's partition.
            moments: names of its state tensors.
        """
        state: dict[str, Any] = self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=self._step_device(tensor))
            state |= {name: torch.zeros_like(tensor, memory_format=torch.preserve_format) for name in moments}
            self.state[tensor] = state
        return state

    def _step_device(self, tensor: Tensor) -> torch.device:
        return torch.device("cpu")


class Guarded(Gated):
    """Clips by global norm and leaves everything untouched when the norm is not finite.

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
