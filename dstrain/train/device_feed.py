"""Micro-batches on their way to the device: few shapes where blocks are compiled, few bytes, and one batch ahead.

About 3 bytes a token travel instead of 22: ids in two bytes where they fit, positions made again from the lengths, targets in
four. On CUDA the next micro-batch is copied on a stream of its own while the present one is computed on, from pinned memory, and
nothing waits for the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dstrain.base.device import sent
from dstrain.base.protocols import MicroBatch

Shape = Callable[[MicroBatch], MicroBatch]
_TWO_BYTES = 1 << 16


class _OnItsWay(NamedTuple):
    """A micro-batch whose copy is queued."""

    batch: MicroBatch
    arrived: Any
    """An event behind the copy."""


class DeviceFeed:
    """Hands the micro-batches of a step to the device, in order."""

    def __init__(self, device: str, *, shape: Shape | None = None) -> None:
        """Prepare.

        Args:
            device: cpu or cuda.
            shape: applied to each micro-batch first, on the CPU.
        """
        self._device, self._shape = device, shape
        self._stream: Any = torch.cuda.Stream() if device == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        """The micro-batches on the device; each may be used until the next one but one is asked for."""
        if self._stream is None:
            yield from (self._shaped(batch) for batch in batches)
            return
        ahead = self._send(batches[0])
        for number in range(len(batches)):
            present = ahead
            if number + 1 < len(batches):
                ahead = self._send(batches[number + 1])
            yield self._receive(present)

    def _shaped(self, batch: MicroBatch) -> MicroBatch:
        return batch if self._shape is None else self._shape(batch)

    def _send(self, batch: MicroBatch) -> _OnItsWay:
        """Start copying."""
        small = compact(self._shaped(batch))
        with torch.cuda.stream(self._stream):
            copied = _each_tensor(small, lambda t: sent(t, self._device))
            arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._stream)
        return _OnItsWay(copied, arrived)

    def _receive(self, coming: _OnItsWay) -> MicroBatch:
        """Let the computing stream wait for this copy, not for the one behind it; the host waits for none."""
        computing = torch.cuda.current_stream()
        computing.wait_event(coming.arrived)
        for tensor in _tensors(coming.batch):
            tensor.record_stream(computing)
        return spelled_out(coming.batch)


def compact(batch: MicroBatch) -> MicroBatch:
    """The same micro-batch in few bytes: narrow ids, no positions. Undone by `spelled_out`."""
    tokens = batch.tokens
    narrow = torch.int16 if len(tokens) and int(tokens.max()) < _TWO_BYTES else torch.int32
    types = batch.token_types
    integer_labels = not batch.labels.is_floating_point()
    return dataclasses.replace(
        batch,
        tokens=tokens.to(torch.int32).to(narrow),  # ids above 32,767 wrap around, and back again
        positions=torch.tensor(batch.lengths, dtype=torch.int32),
        targets=batch.targets.to(torch.int32),
        labels=batch.labels.to(torch.int32) if integer_labels else batch.labels,
        token_types=None if types is None else types.to(torch.uint8),
    )


def spelled_out(batch: MicroBatch) -> MicroBatch:
    """A compact micro-batch as models take it, made on its own device."""
    tokens = batch.tokens.long()
    if batch.tokens.dtype == torch.int16:
        tokens = tokens & (_TWO_BYTES - 1)
    lengths = batch.positions.long()
    total = len(tokens)
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths, output_size=total)
    labels = batch.labels if batch.labels.is_floating_point() else batch.labels.long()
    return dataclasses.replace(
        batch,
        tokens=tokens,
        positions=torch.arange(total, device=tokens.device) - starts,
        targets=batch.targets.long(),
        labels=labels,
        token_types=None if batch.token_types is None else batch.token_types.long(),
    )


def _tensors(batch: MicroBatch) -> list[Tensor]:
    parts = (batch.tokens, batch.positions, batch.targets, batch.labels, batch.token_types)
    return [part for part in parts if part is not None]


def _each_tensor(batch: MicroBatch, change: Callable[[Tensor], Tensor]) -> MicroBatch:
    types = batch.token_types
    return dataclasses.replace(
        batch, tokens=change(batch.tokens), positions=change(batch.positions), targets=change(batch.targets),
        labels=change(batch.labels), token_types=None if types is None else change(types),
    )  # fmt: skip
