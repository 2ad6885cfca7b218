"""Keyed bijections on [0, n): the order of everything, in integer arithmetic owned by the project.

An additive Feistel network over a mixed-radix pair (left, right) with left < a, right < b, a·b just above n; values that
fall outside are walked on (cycle walking), so the map is a permutation for every n. Nothing here depends on a library's
random stream, so an order survives every upgrade (docs/data-format.md). Does not know blocks, rows or ranks.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import DataError

ORDER_VERSION = 1
"""Part of every loader state: a change of the arithmetic below must raise it."""

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

UInt64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]


def mix64(value: UInt64) -> UInt64:
    """The splitmix64 finaliser (Steele, Lea, Flood 2014): a 64-bit bijection whose output bits all depend on all input."""
    with np.errstate(over="ignore"):
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def subkey(key: npt.ArrayLike, *parts: npt.ArrayLike) -> UInt64:
    """Derive keys elementwise from a key and integers (lane, window, ...); broadcasts."""
    result = np.asarray(key, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            result = mix64((result + _GOLDEN) ^ (np.asarray(part).astype(np.uint64) * np.uint64(0xD1342543DE82EF95)))
    return result


def permute(index: npt.ArrayLike, n: npt.ArrayLike, key: npt.ArrayLike) -> Int64:
    """Where each index goes under the permutation of [0, n) named by key.

    Args:
        index: int64 array with 0 <= index < n.
        n: sizes, >= 1, below 2^52; a scalar or an array that broadcasts against `index`.
        key: 64-bit keys; a scalar or an array that broadcasts against `index`.

    Returns:
        int64 array of the broadcast shape.

    Raises:
        DataError: an index is outside [0, n).
    """
    index_, n_, key_ = np.broadcast_arrays(
        np.asarray(index, dtype=np.int64), np.asarray(n, dtype=np.int64), np.asarray(key, dtype=np.uint64)
    )
    if index_.size and (bool((index_ < 0).any()) or bool((index_ >= n_).any())):
        raise DataError(f"order: an index is outside [0, {int(n_.max())})")
    shape = index_.shape
    value = index_.astype(np.uint64).ravel()
    sizes = n_.astype(np.uint64).ravel()
    keys = key_.ravel()
    left = np.maximum(np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.uint64), np.uint64(1))
    right = (sizes + left - np.uint64(1)) // left
    value = _network(value, left, right, keys)
    outside = np.flatnonzero(value >= sizes)
    while outside.size:
        value[outside] = _network(value[outside], left[outside], right[outside], keys[outside])
        outside = outside[value[outside] >= sizes[outside]]
    return value.astype(np.int64).reshape(shape)


def _network(value: UInt64, left: UInt64, right: UInt64, keys: UInt64) -> UInt64:
    high, low = value // right, value % right
    with np.errstate(over="ignore"):
        for round_ in range(_ROUNDS):
            round_key = mix64(keys + np.uint64(round_ + 1) * _GOLDEN)
            if round_ % 2 == 0:
                high = (high + mix64(low ^ round_key) % left) % left
            else:
                low = (low + mix64(high ^ round_key) % right) % right
    return high * right + low


def largest_divisor(n: int, *, at_most: int) -> int:
    """The largest divisor of n that is not above `at_most` (at least 1)."""
    best = 1
    for candidate in range(1, math.isqrt(n) + 1):
        if n % candidate == 0:
            for divisor in (candidate, n // candidate):
                if best < divisor <= at_most:
                    best = divisor
    return best
