"""The vocabulary's matrix and its cross-entropy in one, a chunk of targets at a time: no (M, V) tensor is ever kept.

Logits of a chunk are made, turned in place into their own gradient, and used up at once for the gradients of hidden states
and matrix, so the backward pass only multiplies by a scalar (the scheme of Liger's fused linear cross-entropy, arXiv
2410.10989). On a CPU the chunk lives in one buffer for the whole run: fresh pages for (M, V) cost more than the softmax.

Shapes: M targets, H width of the hidden states, V vocabulary. Exact: no gradient is filtered or rounded beyond the dtype of
the inputs; sums are in fp32. Does not decide what is scored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dstrain.base.protocols import IGNORED_LABEL

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}
"""fp32 logits at a time, by device."""
_MULTIPLE = 64
"""Rows of a chunk are a multiple of this, so that matrix kernels see whole tiles."""


class LinearCrossEntropy:
    """Implements `base.protocols.HeadLoss` for micro-batch after micro-batch; keeps the buffer between them."""

    def __init__(self, *, compiled: bool = False, chunk_bytes: int | None = None) -> None:
        """Prepare; allocates nothing.

        Args:
            compiled: fuse the passes over a chunk with torch.compile, which pays on a GPU.
            chunk_bytes: of fp32 logits at a time; default 32 MB on a CPU, 1 GB on a GPU.
        """
        self._chunk: Callable[..., Any] = torch.compile(_score_chunk, dynamic=False) if compiled else _score_chunk
        self._compiled, self._chunk_bytes = compiled, chunk_bytes
        self._buffer: Tensor | None = None

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Score hidden states.

        Args:
            hidden: (M, H).
            weight: (V, H).
            bias: (V,) or None.
            labels: (M,) int64 true ids; IGNORED_LABEL counts for nothing.

        Returns:
            () float32 sum of the cross-entropies, differentiable, and () float32 number of right guesses.
        """
        if torch.is_autocast_enabled(hidden.device.type):
            hidden, weight, bias = _as_a_layer_would(hidden, weight, bias)
            with torch.autocast(hidden.device.type, enabled=False):
                return self(hidden, weight, bias, labels)
        if hidden.dtype == torch.float16:
            # Gradients of single logits are below fp16's smallest number until the loss scale is in them.
            return score_logits(functional.linear(hidden, weight, bias), labels)
        return _Scored.apply(hidden, weight, bias, labels, self)  # type: ignore[no-any-return,no-untyped-call]

    def rows_at_once(self, num_rows: int, vocab_size: int, device: torch.device) -> int:
        """Targets of one chunk: as even as possible within the limit."""
        limit = self._chunk_bytes or CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])
        return rows_at_once(num_rows, vocab_size, limit_bytes=limit)

    def score(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, hits, gradient of the logits in the dtype of `hidden`) of one chunk; the gradient lives until the next."""
        buffer = None
        if not self._compiled and hidden.device.type == "cpu" and hidden.dtype == torch.float32:
            rows, vocab = hidden.shape[0], weight.shape[0]
            if self._buffer is None or self._buffer.shape[0] < rows or self._buffer.shape[1] != vocab:
                self._buffer = torch.empty(rows, vocab)
            buffer = self._buffer[:rows]
        return self._chunk(hidden, weight, bias, labels, buffer)  # type: ignore[no-any-return]


def _as_a_layer_would(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """In the type that autocast takes for a linear layer; it does not reach products into a given place."""
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def rows_at_once(num_rows: int, vocab_size: int, *, limit_bytes: int) -> int:
    """Targets of one chunk: as even as possible within a limit of fp32 logits."""
    chunks = -(-num_rows * vocab_size * 4 // limit_bytes)
    even = -(-num_rows // max(1, chunks))
    return min(num_rows, -(-even // _MULTIPLE) * _MULTIPLE)


def score_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same two numbers from (M, V) logits that are there already."""
    logits = logits.float()
    loss = functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    return loss, (logits.detach().argmax(dim=-1) == labels).sum().float()


def _score_chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, buffer: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    logits = _logits(hidden, weight, bias, buffer)
    counts = (labels != IGNORED_LABEL)[:, None]
    label = labels.clamp(min=0)[:, None]
    best, guess = logits.max(dim=-1, keepdim=True)
    wanted = logits.gather(1, label)
    # Softmax in place; its largest entry is at least 1/V, so its logarithm gives the log-sum-exp without a second pass.
    chances = torch.softmax(logits, dim=-1, out=logits) if buffer is not None else logits.softmax(dim=-1)
    log_sum = best - chances.gather(1, guess).log()
    loss = ((log_sum - wanted) * counts).sum()
    hits = ((guess == label) & counts).sum().float()
    gradient = chances.scatter_add_(1, label, chances.new_full((1, 1), -1.0).expand_as(wanted))
    gradient = gradient.mul_(counts)
    return loss, hits, gradient.to(hidden.dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor | None) -> Tensor:
    if buffer is None:
        return functional.linear(hidden, weight, bias).float()
    if bias is None:
        return torch.mm(hidden, weight.t(), out=buffer)
    return torch.addmm(bias, hidden, weight.t(), out=buffer)


class _Scored(torch.autograd.Function):
    """Gradients of a unit loss are made in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scorer: LinearCrossEntropy
    ) -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hits = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs = any(ctx.needs_input_grad[:3])
        gradients = _Gradients(hidden, weight, bias) if needs else None
        rows = scorer.rows_at_once(hidden.shape[0], weight.shape[0], hidden.device)
        for begin in range(0, hidden.shape[0], rows):
            part = slice(begin, begin + rows)
            part_loss, part_hits, gradient = scorer.score(hidden[part], weight, bias, labels[part])
            loss += part_loss
            hits += part_hits
            if gradients is not None:
                gradients.add(part, gradient)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of this loss were used up by an earlier backward pass")
        return (*gradients.scaled(upstream), None, None)


class _Gradients:
    """Gradients of hidden states, matrix and bias, summed over chunks."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self._hidden_in, self._weight_in, self._bias_in = hidden, weight, bias
        self._hidden = torch.empty_like(hidden)
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None

    def add(self, part: slice, gradient: Tensor) -> None:
        hidden = self._hidden_in[part]
        torch.mm(gradient, self._weight_in, out=self._hidden[part])
        if self._weight is None:
            self._weight = gradient.t() @ hidden
        elif self._weight.dtype == torch.float32:
            self._weight = self._weight.addmm_(gradient.t(), hidden) if hidden.dtype == torch.float32 else (
                self._weight.add_(gradient.t() @ hidden)
            )  # fmt: skip
        else:
            self._weight = self._weight.float().add_(gradient.t() @ hidden)
        if self._bias_in is not None:
            # A product with ones, not a sum over rows, which a CPU takes column by column.
            ones = gradient.new_ones(gradient.shape[0])
            column = torch.mv(gradient.t(), ones).float()
            self._bias = column if self._bias is None else self._bias.add_(column)

    def scaled(self, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        assert self._weight is not None
        bias = None if self._bias is None or self._bias_in is None else (
            self._bias.mul_(upstream).to(self._bias_in.dtype)
        )  # fmt: skip
        return (
            self._hidden.mul_(upstream.to(self._hidden.dtype)),
            self._weight.mul_(upstream.to(self._weight.dtype)).to(self._weight_in.dtype),
            bias,
        )
