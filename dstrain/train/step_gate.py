"""The moment between backward and update: loss and gradient norm are known, and a judge may still leave the update out.

DeepSpeed computes its global norm inside its own step and then calls the client optimizer, once or once for each group; the
optimizer asks this gate, which asks the judge once a step. Where DeepSpeed leaves the update out itself (gradients that are
not finite), the judge is told afterwards. Does not judge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Judge(Protocol):
    """Whether a step's update may be done; called once a step on every rank, with the same numbers."""

    def __call__(self, *, loss: float, gradient_norm: float, overflowed: bool) -> bool:
        """Judge.

        Args:
            loss: global mean.
            gradient_norm: global, before clipping; 0 where it is not known.
            overflowed: gradients are not finite, and the update is left out whatever the answer.
        """
        ...


class StepGate:
    """Holds one step's loss until the optimizer asks."""

    def __init__(self, gradient_norm: Callable[[], float]) -> None:
        """Begin open: what DeepSpeed does while it builds its optimizer is no step of the run.

        Args:
            gradient_norm: of the step that DeepSpeed is in.
        """
        self._read_norm = gradient_norm
        self._norm: float | None = None
        self._judge: Judge | None = None
        self._loss = 0.0
        self._admitted: bool | None = None

    def prepare(self, judge: Judge | None, *, loss: float) -> None:
        """A step's gradients are complete."""
        self._judge, self._loss, self._admitted, self._norm = judge, loss, None, None

    def __call__(self) -> bool:
        """Whether the update may be done; the first call of a step asks the judge."""
        if self._judge is None:
            return True
        if self._admitted is None:
            self._admitted = self._judge(loss=self._loss, gradient_norm=self.gradient_norm(), overflowed=False)
        return self._admitted

    def gradient_norm(self) -> float:
        """Of the step, read once: a GPU asked again after the update would be waited for until that is done."""
        if self._norm is None:
            self._norm = self._read_norm()
        return self._norm

    def finish(self) -> bool:
        """Whether the update was admitted; tells the judge when the optimizer was never asked."""
        judge, self._judge = self._judge, None
        if judge is not None and self._admitted is None:
            judge(loss=self._loss, gradient_norm=self.gradient_norm(), overflowed=True)
        return self._admitted is not False
