"""Random layerwise token dropping: middle layers see a random part of each segment, all of it by the end (arXiv 2211.11586).

Who stays is a function of seed, step, layer and what stands in the segment, so that it does not matter which rank has it and
beside what. Every layer draws anew; the first and last layers see everything. Only chooses: `layer_routes` routes.

Shapes: T tokens of N segments back to back, longest first; K of them stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from dstrain.base.config import Config
from dstrain.base.device import sent

_MASK_63 = (1 << 63) - 1


class TokenDroppingConfig(Config):
    """How many tokens the middle layers see; without this section, all of them."""

    first_share: float = Field(default=0.5, gt=0.0, le=1.0)
    """Share of each segment that stays in the first step."""
    steps: int = Field(ge=1)
    """Optimizer steps until all stays; the paper's runs take about 70 % of the training."""
    increments: int = Field(default=16, ge=1, le=1024)
    """Equal jumps on the way: shapes change only there, which compiled models need."""
    full_first: int = Field(default=1, ge=0)
    """Layers at the beginning that see everything."""
    full_last: int = Field(default=1, ge=0)
    """Layers at the end that see everything."""


def share_at(config: TokenDroppingConfig, step: int) -> float:
    """Share of each segment that stays at a step."""
    if step >= config.steps:
        return 1.0
    jumps = step * config.increments // config.steps
    return config.first_share + (1.0 - config.first_share) * jumps / config.increments


def kept_lengths(lengths: Sequence[int], share: float) -> tuple[int, ...]:
    """(N,) tokens of each segment that stay: at least one, and a longer segment never keeps fewer."""
    return tuple(max(1, math.ceil(round(share * length, 9))) for length in lengths)


def filling(kept: Sequence[int], *, of: int) -> tuple[int, ...]:
    """Segments that fill up what stays to the next of 32 even sizes, none longer than the longest that stays.

    Args:
        kept: (N,) tokens of each segment that stay.
        of: T.
    """
    step = max(1, of // 32)
    extra, longest = -sum(kept) % step, max(kept)
    return (*[longest] * (extra // longest), *([extra % longest] if extra % longest else []))


def segment_keys(tokens: Tensor, positions: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """(N,) int64 hashes of what stands in each segment.

    Args:
        tokens: (T,) ids as the model sees them.
        positions: (T,) inside the segment.
        segments: (T,) number of the segment.
        num_segments: N.
    """
    each = _mix(tokens * 0x2545F4914F6CDD1D + _mix(positions))
    return torch.zeros(num_segments, dtype=torch.int64, device=tokens.device).index_add_(0, segments, each)


def kept_tokens(
    keys: Tensor, positions: Tensor, segments: Tensor, *, places: Tensor, salt: int
) -> Tensor:  # fmt: skip
    """(K,) indices of the tokens that stay, ascending.

    Args:
        keys: (N,) of the segments.
        positions: (T,) inside the segment.
        segments: (T,) number of the segment, ascending.
        places: (K,) indices of the first k of each segment's n tokens, as `first_places` gives them.
        salt: 64 bits of seed, step and layer.
    """
    scores = _mix(_mix(keys[segments] + _signed(salt)) ^ _mix(positions + 1)) & _MASK_63
    by_score = scores.argsort(stable=True)
    order = by_score[segments[by_score].argsort(stable=True)]  # of each segment in turn, by score
    return order[places].sort().values


def first_places(lengths: Sequence[int], kept: Sequence[int], *, device: torch.device) -> Tensor:
    """(K,) indices of the first `kept` tokens of each segment."""
    starts, at = [], 0
    for length in lengths:
        starts.append(at)
        at += length
    begin = torch.tensor(starts, dtype=torch.int64)
    count = torch.tensor(list(kept), dtype=torch.int64)
    shift = torch.repeat_interleave(begin - (count.cumsum(0) - count), count)
    return sent(torch.arange(int(count.sum())) + shift, device)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, whose products wrap (Steele et al. 2014)."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
