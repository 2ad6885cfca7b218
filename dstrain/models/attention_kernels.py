"""Which kernel attends inside segments, chosen once for a device and dtype, with the reason in words.

    varlen      torch.nn.attention.varlen (flash attention inside torch): Ampere or newer, half precision, no dropout
    flash-attn  the package of that name where it is installed: Ampere or newer, half precision, dropout as well
    flex        FlexAttention with a block mask made for each micro-batch: Ampere or newer, no dropout
    sdpa        scaled_dot_product_attention, equal lengths batched: everywhere, and on a CPU the only one

None of them computes blocks that lie between two segments. Shapes as in `models.attention`.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from dstrain.base.device import sent
from dstrain.base.errors import ConfigError

KernelChoice = Literal["auto", "varlen", "flash-attn", "flex", "sdpa"]
_IN_ORDER = ("varlen", "flash-attn", "flex", "sdpa")
_WIDEST_HEAD = 256
_LEAST_CAPABILITY = (8, 0)  # of flash attention's kernels, and what Triton supports
_BLOCK = 128  # of a block mask; FlexAttention's default
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """A kernel and why it is that one."""

    name: str
    reason: str


@dataclass(frozen=True)
class Circumstances:
    """What decides which kernels can serve."""

    device: str
    """cpu or cuda."""
    dtype: torch.dtype
    """Of queries."""
    head_width: int
    dropout: float
    """On attention weights, in training."""
    capability: tuple[int, int] | None = None
    """Of the GPU; None where there is none to ask."""


def choose_kernel(wanted: KernelChoice, at: Circumstances) -> Choice:
    """The kernel for these circumstances.

    Args:
        wanted: auto takes the first that can serve, in the order of this module's docstring.
        at: device, dtype, head width and dropout.

    Raises:
        ConfigError: the one asked for cannot serve here.
    """
    if wanted != "auto":
        if (obstacle := why_not(wanted, at)) is not None:
            raise ConfigError(f"model.attention_kernel: {wanted} is not possible here: {obstacle}; use auto")
        return Choice(wanted, "asked for")
    if at.device != "cuda":
        return Choice("sdpa", "the only one without a GPU")
    obstacles = {name: why_not(name, at) for name in _IN_ORDER}
    chosen = next(name for name in _IN_ORDER if obstacles[name] is None)  # sdpa, the last, always can
    before = [f"no {name}: {obstacles[name]}" for name in _IN_ORDER[: _IN_ORDER.index(chosen)]]
    return Choice(chosen, "; ".join(before) or "the first choice on a GPU")


def why_not(name: str, at: Circumstances) -> str | None:
    """Why a kernel cannot serve, or None when it can."""
    if name == "sdpa":
        return None
    if at.device != "cuda":
        return "it runs on CUDA devices only"
    if at.capability is not None and at.capability < _LEAST_CAPABILITY:
        own, least = (".".join(map(str, version)) for version in (at.capability, _LEAST_CAPABILITY))
        return f"it needs compute capability {least}, and this GPU has {own}"
    if name != "flex" and at.dtype not in _HALF:
        return f"it computes in bf16 and fp16, not in {str(at.dtype).removeprefix('torch.')}"
    if at.head_width > _WIDEST_HEAD or at.head_width % 8:
        return f"heads of {at.head_width} are not a multiple of 8 up to {_WIDEST_HEAD}"
    if at.dropout and name != "flash-attn":
        return (
            f"it has no dropout on attention weights ({at.dropout:g} here; 0 is faster and does not hurt a pretraining)"
        )
    return _missing(name)


def _missing(name: str) -> str | None:
    if name == "varlen":
        return (
            None
            if _varlen_function() is not None
            else f"torch {torch.__version__} does not have it with scale and window"
        )
    if name == "flash-attn":
        return None if importlib.util.find_spec("flash_attn") is not None else "the package flash-attn is not installed"
    return None


def attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """(T, h, d) each to (T, h, d), by torch's kernel; `window` tokens to each side, None sees the whole segment."""
    function = _varlen_function()
    assert function is not None
    side = -1 if window is None else window
    out = function(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=(side, side))
    return cast(Tensor, out[0] if isinstance(out, tuple) else out)


def attend_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
    window: int | None,
    *,
    dropout: float,
) -> Tensor:
    """The same by the flash-attn package, with dropout."""
    package: Any = importlib.import_module("flash_attn")
    side = -1 if window is None else window
    out: Tensor = package.flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, dropout_p=dropout, softmax_scale=scale, causal=False,
        window_size=(side, side),
    )  # fmt: skip
    return out


def segment_block_mask(lengths: Sequence[int], cu_seqlens: Tensor, window: int | None) -> Any:
    """FlexAttention's block mask: same segment, and within the window.

    Which blocks hold anything follows from the lengths, on the host; asking every pair of tokens on the device, as torch's
    `create_block_mask` does, would take gigabytes for a micro-batch of some ten thousand.

    Args:
        lengths: (N,) of the segments.
        cu_seqlens: (N+1,) their boundaries, on the tokens' device.
        window: tokens to each side; None sees the whole segment.
    """
    from torch.nn.attention.flex_attention import BlockMask  # noqa: PLC0415  (imports inductor)

    device, total = cu_seqlens.device, sum(lengths)
    index = torch.arange(total, device=device, dtype=torch.int32)
    segment = torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)

    def allowed(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = segment[query] == segment[key]
        return same if window is None else same & ((query - key).abs() <= window)

    some, all_ = blocks_seen(lengths, window, block=_BLOCK)
    partial, full = ([sent(part, device) for part in _ordered(blocks)] for blocks in (some & ~all_, all_))
    return BlockMask.from_kv_blocks(
        partial[0], partial[1], full[0], full[1], BLOCK_SIZE=_BLOCK, mask_mod=allowed, seq_lengths=(total, total)
    )


def blocks_seen(lengths: Sequence[int], window: int | None, *, block: int) -> tuple[Tensor, Tensor]:
    """(blocks, blocks) whether any token of a row's block sees any of a column's, and whether each sees each."""
    ends = np.cumsum(np.asarray(lengths))
    total = int(ends[-1])
    first = np.arange(0, total, block)
    last = np.minimum(first + block, total) - 1
    of_first, of_last = (np.searchsorted(ends, at, side="right") for at in (first, last))
    begin, end = (ends - np.asarray(lengths))[of_first], ends[of_last] - 1
    if window is not None:
        begin, end = np.maximum(begin, first - window), np.minimum(end, last + window)
    some = (first <= end[:, None]) & (last >= begin[:, None])
    one = (of_first == of_last) & (last - first + 1 == block)
    all_ = one[:, None] & one & (of_first[:, None] == of_first)
    if window is not None:
        all_ &= (last[:, None] - first <= window) & (last - first[:, None] <= window)
    return torch.from_numpy(some), torch.from_numpy(all_)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns of each row, and which come first: as FlexAttention wants them."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return blocks.sum(-1, dtype=torch.int32)[None, None], order[None, None]


def attend_flex(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, scale: float) -> Tensor:
    """(1, h, T, d) each to (1, h, T, d), by FlexAttention; compiled on CUDA, as it must be to skip blocks."""
    out: Tensor = _flex_function(query.device.type)(query, key, value, block_mask=block_mask, scale=scale)
    return out


@lru_cache(maxsize=2)
def _flex_function(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415

    plain = cast("Callable[..., Any]", flex_attention)
    # Shapes are left to the compiler: of static ones it gives up after eight, and then computes every pair of tokens.
    return torch.compile(plain) if device == "cuda" else plain


@lru_cache(maxsize=1)
def _varlen_function() -> Callable[..., Any] | None:
    """Torch's varlen attention, or None where this version lacks what is needed (scale, window)."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  (absent before torch 2.10)
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return cast("Callable[..., Any]", varlen_attn) if "scale" in known and "window_size" in known else None
