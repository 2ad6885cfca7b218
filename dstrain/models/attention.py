"""Attention inside segments of one flat, unpadded row of tokens: no padding, and no token sees another document.

Shapes: h heads, T tokens of all segments back to back, d head width. The kernel is chosen by `models.attention_kernels`.
Without one for packed segments, those of equal length are one batched `scaled_dot_product_attention` on views (a micro-batch
holds its segments longest first, so equal lengths lie side by side), which never computes a masked-out block.
Does not know Hugging Face; `models.huggingface` plugs it in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dstrain.base.device import sent
from dstrain.models.attention_kernels import attend_flash, attend_flex, attend_varlen, segment_block_mask


@dataclass(frozen=True)
class SegmentLayout:
    """Where the segments of a micro-batch lie; made once per forward, used by every layer."""

    groups: tuple[tuple[int, int], ...]
    """Runs of equal length: (length, how many), in token order."""
    cu_seqlens: Tensor
    """(N+1,) int32 segment boundaries on the tokens' device."""
    max_length: int
    kernel: str = "sdpa"
    """A name of `attention_kernels`."""
    block_masks: dict[int | None, Any] = field(default_factory=dict, compare=False)
    """FlexAttention's, by window; made when first needed."""

    def block_mask(self, window: int | None) -> Any:
        """FlexAttention's mask for these segments."""
        if window not in self.block_masks:
            lengths = [length for length, count in self.groups for _ in range(count)]
            self.block_masks[window] = segment_block_mask(lengths, self.cu_seqlens, window)
        return self.block_masks[window]


def segment_layout(lengths: Sequence[int], *, device: torch.device, kernel: str = "sdpa") -> SegmentLayout:
    """Describe the segments of a micro-batch.

    Args:
        lengths: (N,) token counts in order; equal ones should be neighbours.
        device: of the tokens.
        kernel: a name of `attention_kernels`, able to serve there.
    """
    groups = tuple((length, len(list(run))) for length, run in groupby(lengths))
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return SegmentLayout(groups=groups, cu_seqlens=sent(ends, device), max_length=max(lengths), kernel=kernel)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SegmentLayout,
    *,
    scale: float,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Bidirectional attention within each segment.

    Compiled blocks leave their graph here: segments differ from batch to batch, and a graph for each set of lengths would
    be compiled for ever. What lies on both sides has one shape.

    Args:
        query: (1, h, T, d).
        key: (1, h, T, d).
        value: (1, h, T, d).
        layout: the segments.
        scale: factor on the scores.
        dropout: probability on the attention weights; 0 in evaluation.
        window: a token sees others at a distance of at most `window`; None sees the whole segment.

    Returns:
        (1, T, h, d).
    """
    if layout.kernel == "flex":
        return attend_flex(query, key, value, layout.block_mask(window), scale).transpose(1, 2)
    if layout.kernel in ("varlen", "flash-attn"):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, h, d)
        where = (layout.cu_seqlens, layout.max_length)
        if layout.kernel == "varlen":
            return attend_varlen(q, k, v, *where, scale, window)[None]
        return attend_flash(q, k, v, *where, scale, window, dropout=dropout)[None]
    return _by_length(query, key, value, layout, scale=scale, dropout=dropout, window=window)


def _by_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SegmentLayout,
    *,
    scale: float,
    dropout: float,
    window: int | None,
) -> Tensor:
    outputs = []
    # One split, not slices: its backward is one concatenation, where each slice would fill a whole gradient with zeros.
    sizes = [length * count for length, count in layout.groups]
    parts = zip(*(torch.split(x[0], sizes, dim=1) for x in (query, key, value)))
    for (length, count), (q, k, v) in zip(layout.groups, parts):
        q, k, v = (_batched(x, count, length) for x in (q, k, v))
        band = _band(length, window, query.device) if window is not None and window < length - 1 else None
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=band, dropout_p=dropout, scale=scale)
        outputs.append(out.transpose(1, 2).reshape(count * length, *out.shape[1::2]))
    return torch.cat(outputs).unsqueeze(0) if len(outputs) > 1 else outputs[0].unsqueeze(0)


def _batched(x: Tensor, count: int, length: int) -> Tensor:
    """(h, count·length, d) as (count, h, length, d), a view."""
    return x.view(x.shape[0], count, length, x.shape[2]).transpose(0, 1)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    index = torch.arange(length, device=device)
    return (index[:, None] - index[None, :]).abs() <= window
