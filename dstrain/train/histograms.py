"""Histograms of every weight and gradient, at every ZeRO stage, without gathering a tensor: ranks count what they hold and add up.

Gradients are taken where the optimizer takes them, after the reduction, unscaling and clipping; weights as the update finds
them, in fp32. Looks, and changes nothing. Where the numbers go is the monitor's matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from dstrain.base.control import ControlPlane
from dstrain.base.protocols import RunState, StepReport
from dstrain.checkpoint.manifest import MASTER, Fragment
from dstrain.monitor.histogram import EMPTY, Histogram, histogram_of, packed, unpacked

Write = Callable[[int, Mapping[str, Histogram]], None]


@dataclass(frozen=True)
class _Part:
    """Where a fragment lies in the memory behind it."""

    name: str
    begin: int
    end: int


class Histograms:
    """An observer that counts in every `every`-th step; the same calls on every rank.

    Args:
        every: optimizer steps between two histograms.
        names: of all parameters, the same on every rank.
        owned: the fragments this rank answers for; those of all ranks cover each parameter once.
        control: agreements between ranks.
        write: takes step and histograms by name, `weights/...` and `gradients/...`; called on every rank.
        start_step: optimizer steps done.
    """

    def __init__(
        self, every: int, *, names: Iterable[str], owned: Callable[[], Iterable[Fragment]], control: ControlPlane, write: Write,
        start_step: int,
    ) -> None:  # fmt: skip
        self._every, self._owned, self._control, self._write = every, owned, control, write
        self._names = [f"{kind}/{name}" for kind in ("weights", "gradients") for name in sorted(names)]
        self._found: dict[str, Histogram] = {}
        self._is_due = self._due_after(start_step)

    def look(self, parameters: list[Tensor]) -> None:
        """Count what the optimizer is about to update, where this step is one to count."""
        if not self._is_due:
            return
        by_memory = self._parts()
        for parameter in parameters:
            if parameter.grad is None or not parameter.is_contiguous():
                continue
            weight, gradient = parameter.detach().view(-1), parameter.grad.detach().reshape(-1)
            start = int(parameter.storage_offset())
            for part in by_memory.get(parameter.untyped_storage().data_ptr(), ()):
                if start <= part.begin and part.end <= start + weight.numel():
                    inside = slice(part.begin - start, part.end - start)
                    self._count(f"weights/{part.name}", weight[inside])
                    self._count(f"gradients/{part.name}", gradient[inside])

    def on_step(self, state: RunState, report: StepReport) -> None:
        """Collective in the steps to count: add up over the ranks, and write."""
        found, self._found = self._found, {}
        counted, self._is_due = self._is_due, self._due_after(report.step)
        if not counted or not report.applied:
            return
        counts, sums = packed([found.get(name, EMPTY) for name in self._names])
        whole = unpacked(self._control.sum(counts), self._control.sum_floats(sums))
        self._write(report.step, dict(zip(self._names, whole)))

    def on_end(self, state: RunState) -> None:
        """Nothing to close."""

    def _due_after(self, steps_done: int) -> bool:
        return (steps_done + 1) % self._every == 0

    def _parts(self) -> dict[int, list[_Part]]:
        """This rank's fragments of the fp32 weights by the memory they lie in."""
        parts: dict[int, list[_Part]] = {}
        for fragment in self._owned():
            if fragment.state == MASTER:
                begin = int(fragment.tensor.storage_offset())
                part = _Part(fragment.name, begin, begin + fragment.tensor.numel())
                parts.setdefault(fragment.tensor.untyped_storage().data_ptr(), []).append(part)
        return parts

    def _count(self, name: str, values: Tensor) -> None:
        self._found[name] = self._found.get(name, EMPTY) + histogram_of(values)
