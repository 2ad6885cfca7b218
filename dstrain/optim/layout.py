"""Which part of which parameter lies where in an optimizer's tensors, on this rank and on the others.

Under ZeRO an optimizer sees flat 1-D partitions. With the layout it can still do what needs whole parameters: their norms
are sums over the ranks that hold parts of them, and a matrix is put together on one rank from its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed

from dstrain.base.device import sent


@dataclass(frozen=True)
class Piece:
    """A contiguous part of a flattened parameter inside one of the optimizer's tensors."""

    parameter: int
    """Number of the parameter in the model's order."""
    offset: int
    """First element inside the flattened parameter."""
    start: int
    """First element inside the flattened tensor."""
    numel: int


@dataclass(frozen=True)
class Layout:
    """Where everything lies."""

    names: tuple[str, ...]
    """Of the parameters, by number."""
    shapes: tuple[tuple[int, ...], ...]
    pieces: Mapping[Tensor, tuple[Piece, ...]]
    """Of each tensor of this rank's optimizer, by start."""
    members: Mapping[Tensor, tuple[int, ...]]
    """Of each tensor, all parameters that its counterparts on all ranks hold parts of; the same on every rank."""
    held: tuple[tuple[tuple[int, int, int], ...], ...]
    """(parameter, offset, numel) of the pieces of each rank."""
    rank: int
    replicated: bool
    """Every rank holds every parameter whole (ZeRO stage 0)."""
    _known: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def world_size(self) -> int:
        """Ranks."""
        return len(self.held)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What follows from the layout alone, worked out at its first use."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


def sums_of_squares(values: Sequence[Tensor], tensors: Sequence[Tensor], layout: Layout) -> Tensor:
    """Collective, unless the layout is replicated. Sums of squares over whole parameters.

    Args:
        values: one for each tensor, of its shape; 0 where a tensor is padded.
        tensors: of the optimizer.
        layout: where they lie.

    Returns:
        (parameters,) float64; 0 for parameters that no rank holds in these tensors.
    """
    device = tensors[0].device
    views = [
        value.view(-1)[piece.start : piece.start + piece.numel]
        for value, tensor in zip(values, tensors)
        for piece in layout.pieces[tensor]
    ]
    numbers = layout.once(("numbers", *tensors), lambda: _numbers(tensors, layout))
    sums = torch.zeros(len(layout.names), dtype=torch.float64, device=device)
    if views:
        norms = torch.stack(list(torch._foreach_norm(views))).double()
        sums[numbers] = norms.square()  # a rank holds no parameter in two pieces
    if not layout.replicated and layout.world_size > 1:
        distributed.all_reduce(sums)
    return sums


def multiply(values: Sequence[Tensor], tensors: Sequence[Tensor], factors: Tensor, layout: Layout) -> None:
    """Multiply values in place by a factor of the parameter that each element belongs to.

    Args:
        values: as in `sums_of_squares`.
        tensors: of the optimizer.
        factors: (parameters,).
        layout: where they lie.
    """
    for value, tensor in zip(values, tensors):
        pieces = layout.pieces[tensor]
        if len(pieces) == 1 and pieces[0].numel == value.numel():
            value.mul_(factors[pieces[0].parameter].to(value.dtype))
        elif pieces:
            numbers, lengths = layout.once(("runs", tensor), lambda t=tensor: _runs(t, layout))  # type: ignore[misc]
            chosen = factors[numbers].to(value.dtype)
            value.view(-1).mul_(torch.repeat_interleave(chosen, lengths, output_size=value.numel()))


def parameters_in(tensors: Sequence[Tensor], layout: Layout) -> tuple[int, ...]:
    """All parameters that the tensors, or their counterparts on other ranks, hold parts of."""
    return tuple(sorted({number for tensor in tensors for number in layout.members[tensor]}))


def _numbers(tensors: Sequence[Tensor], layout: Layout) -> Tensor:
    numbers = [piece.parameter for tensor in tensors for piece in layout.pieces[tensor]]
    return sent(torch.tensor(numbers, dtype=torch.int64), tensors[0].device)


def _runs(tensor: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Parameter number and length of all stretches of a tensor; padding goes with the piece before or after it."""
    numbers, lengths, at = [], [], 0
    for piece in layout.pieces[tensor]:
        numbers.append(piece.parameter)
        lengths.append(piece.start + piece.numel - at)
        at = piece.start + piece.numel
    lengths[-1] += tensor.numel() - at
    return sent(torch.tensor(numbers), tensor.device), sent(torch.tensor(lengths), tensor.device)
