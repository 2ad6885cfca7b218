"""Attention inside segments of one flat, unpadded row of tokens: no padding, and no token sees another document.

Shapes: h heads, T tokens of all segments back to back, d head width. On CUDA in half precision the varlen flash kernel of
torch does it in one call; elsewhere, segments of equal length are one batched `scaled_dot_product_attention` on views (a
micro-batch holds its segments longest first, so equal lengths lie side by side), which never computes a masked-out block.
Does not know Hugging Face; `models.huggingface` plugs it in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class SegmentLayout:
    """Where the segments of a micro-batch lie; made once per forward, used by every layer."""

    groups: tuple[tuple[int, int], ...]
    """Runs of equal length: (length, how many), in token order."""
    cu_seqlens: Tensor
    """(N+1,) int32 segment boundaries on the tokens' device."""
    max_length: int
    varlen: bool
    """Whether the varlen kernel may serve this forward."""


def segment_layout(lengths: Sequence[int], *, device: torch.device, dtype: torch.dtype) -> SegmentLayout:
    """Describe the segments of a micro-batch.

    Args:
        lengths: (N,) token counts in order; equal ones should be neighbours.
        device: of the tokens.
        dtype: of the hidden states; only half precision on CUDA has a varlen kernel.
    """
    groups = tuple((length, len(list(run))) for length, run in groupby(lengths))
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    half = dtype in (torch.float16, torch.bfloat16)
    varlen = device.type == "cuda" and half and _varlen_kernel() is not None
    if device.type == "cuda":
        ends = ends.pin_memory().to(device, non_blocking=True)
    return SegmentLayout(groups=groups, cu_seqlens=ends, max_length=max(lengths), varlen=varlen)


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
    kernel = _varlen_kernel() if layout.varlen and dropout == 0.0 else None
    if kernel is not None:
        return kernel(query, key, value, layout, scale, window)
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


Kernel = Callable[[Tensor, Tensor, Tensor, SegmentLayout, float, "int | None"], Tensor]


@lru_cache(maxsize=1)
def _varlen_kernel() -> Kernel | None:
    """The varlen attention of torch behind one signature, or None where this version lacks what is needed (scale, window)."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  (absent before torch 2.10)
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if "scale" not in known or "window_size" not in known:
        return None

    def kernel(
        query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, scale: float, window: int | None
    ) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, h, d)
        side = -1 if window is None else window
        out = varlen_attn(
            q, k, v, layout.cu_seqlens, layout.cu_seqlens, layout.max_length, layout.max_length,
            scale=scale, window_size=(side, side),
        )  # fmt: skip
        if isinstance(out, tuple):
            out = out[0]
        return out.unsqueeze(0)

    return kernel
