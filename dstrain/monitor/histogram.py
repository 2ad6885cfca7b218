"""Histograms of tensors that are spread over ranks: counts in fixed buckets, which add up over ranks to those of the whole.

Buckets are half octaves from 2^-40 (1e-12) to 2^12, in both directions, and one for zero with all that is smaller: fine enough to
see a layer die or explode, and the same for every tensor, step and rank. Gathers nothing and writes nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_PIECE = 1 << 22
_LOWEST_OCTAVE, _HIGHEST_OCTAVE, _PER_OCTAVE = -40, 12, 2


@functools.cache
def bucket_edges() -> tuple[float, ...]:
    """Ascending upper edges of all buckets but the last, which has none: an edge belongs to the bucket below it."""
    steps = range(_LOWEST_OCTAVE * _PER_OCTAVE, _HIGHEST_OCTAVE * _PER_OCTAVE + 1)
    positive = [2.0 ** (step / _PER_OCTAVE) for step in steps]
    return tuple([-edge for edge in reversed(positive)] + positive)


def num_buckets() -> int:
    """How many counts a histogram has."""
    return len(bucket_edges()) + 1


@dataclass(frozen=True)
class Histogram:
    """Of one tensor, or of a part of it."""

    counts: tuple[int, ...]
    """Elements in each bucket."""
    total: float
    """Sum of the elements."""
    squares: float
    """Sum of their squares."""

    def __add__(self, other: Histogram) -> Histogram:
        """The histogram of both parts together."""
        counts = tuple(a + b for a, b in zip(self.counts, other.counts))
        return Histogram(counts, self.total + other.total, self.squares + other.squares)

    @property
    def size(self) -> int:
        """Number of elements."""
        return sum(self.counts)

    def occupied(self) -> tuple[list[float], list[int]]:
        """Upper edges and counts of the buckets from the first to the last that holds something, one empty one before them.

        TensorBoard draws a bucket from the edge before it, so the first needs a neighbour below.
        """
        filled = [number for number, count in enumerate(self.counts) if count]
        if not filled:
            return [], []
        first, last = max(0, filled[0] - 1), filled[-1]
        edges = [*bucket_edges(), 2 * bucket_edges()[-1]]
        return edges[first : last + 1], list(self.counts[first : last + 1])


EMPTY = Histogram((0,) * num_buckets(), 0.0, 0.0)


def histogram_of(tensor: Tensor) -> Histogram:
    """Count a tensor's elements on its own device, a few million at a time: room for more may not be left there.

    Args:
        tensor: floating point, any shape; what is not a number counts as the largest.
    """
    edges = torch.tensor(bucket_edges(), dtype=torch.float32, device=tensor.device)
    counts = torch.zeros(num_buckets(), dtype=torch.int64, device=tensor.device)
    sums = torch.zeros(2, dtype=torch.float64, device=tensor.device)
    for piece in torch.split(tensor.detach().reshape(-1), _PIECE):
        values = piece.float()
        counts += torch.bincount(torch.bucketize(values, edges, out_int32=True), minlength=num_buckets())
        sums += torch.stack([values.sum(dtype=torch.float64), values.square().sum(dtype=torch.float64)])
    total, squares = sums.tolist()
    return Histogram(tuple(counts.tolist()), total, squares)


def packed(histograms: Sequence[Histogram]) -> tuple[list[int], list[float]]:
    """All counts, and all sums, one histogram after the other: what ranks add up."""
    counts = [count for histogram in histograms for count in histogram.counts]
    sums = [number for histogram in histograms for number in (histogram.total, histogram.squares)]
    return counts, sums


def unpacked(counts: Sequence[int], sums: Sequence[float]) -> list[Histogram]:
    """The inverse of `packed`."""
    width = num_buckets()
    return [
        Histogram(tuple(counts[n * width : (n + 1) * width]), sums[2 * n], sums[2 * n + 1])
        for n in range(math.ceil(len(counts) / width))
    ]
