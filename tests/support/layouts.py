"""Layouts without DeepSpeed: parameters as they are, or packed into flat partitions of a world that lives in one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dstrain.optim.layout import Layout, Piece


def layout_of_model(model: nn.Module) -> Layout:
    """Every parameter a tensor of its own, as at ZeRO stage 0 in a world of one."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return Layout(
        names=tuple(name for name, _ in named),
        shapes=tuple(tuple(p.shape) for _, p in named),
        pieces={p: (Piece(n, 0, 0, p.numel()),) for n, (_, p) in enumerate(named)},
        members={p: (n,) for n, (_, p) in enumerate(named)},
        held=(tuple((n, 0, p.numel()) for n, (_, p) in enumerate(named)),),
        rank=0,
        replicated=True,
    )


def flattened(parameters: Sequence[Tensor], *, padding: int, names: Sequence[str] = ()) -> tuple[Tensor, Layout]:
    """Parameters back to back in one flat tensor with padding at its end, as at ZeRO stage 1 in a world of one."""
    flat = torch.cat([*(p.detach().reshape(-1) for p in parameters), torch.zeros(padding)]).requires_grad_()
    pieces, at = [], 0
    for number, parameter in enumerate(parameters):
        pieces.append(Piece(number, 0, at, parameter.numel()))
        at += parameter.numel()
    layout = Layout(
        names=tuple(names) or tuple(f"p{n}" for n in range(len(parameters))),
        shapes=tuple(tuple(p.shape) for p in parameters),
        pieces={flat: tuple(pieces)},
        members={flat: tuple(range(len(parameters)))},
        held=(tuple((p.parameter, 0, p.numel) for p in pieces),),
        rank=0,
        replicated=False,
    )
    return flat, layout
