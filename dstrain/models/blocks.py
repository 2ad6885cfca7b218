"""The repeated blocks of an encoder, found in any model without touching its code, and compiled one by one.

Blocks of one class share their graphs: the first one pays for all. Does not decide whether compiling is worth it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_SHAPES = 64  # of micro-batches: those of a schedule of token dropping, of a warm-up of segments, of evaluations


def encoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The items of the longest ModuleList whose items are all of one class; empty where there is none.

    Args:
        model: a transformers model, or dstrain's encoder.
    """
    base = getattr(model, "base_model", model)
    lists = [list(part) for part in base.modules() if isinstance(part, nn.ModuleList)]
    return max((items for items in lists if len({type(item) for item in items}) == 1), key=len, default=[])


def compile_blocks(model: nn.Module, *, backend: str = "inductor") -> int:
    """Let torch.compile fuse each block, for static shapes; in place, so that no parameter changes its name.

    Args:
        model: as for `encoder_blocks`.
        backend: of torch.compile; others than inductor are for tests.

    Returns:
        How many blocks there are.
    """
    allow_graphs(_SHAPES)
    blocks = encoder_blocks(model)
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    return len(blocks)


def allow_graphs(number: int) -> None:
    """Let this process compile so many graphs of one function; torch stops at 8, and runs further shapes uncompiled."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, number)


def num_graphs() -> int:
    """Graphs compiled by this process so far; one that still grows after the first steps is compiling for new shapes."""
    counters: Any = torch._dynamo.utils.counters
    return int(counters["stats"]["unique_graphs"])
