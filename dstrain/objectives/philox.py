"""Philox4x32-10, vectorised: a counter-based random function, the normative source of every mask.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); the constants and the known answers in
the tests are theirs. Pure: 128 bits of counter and 64 bits of key in, 128 bits out, no state anywhere.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt32 = npt.NDArray[np.uint32]
UInt64 = npt.NDArray[np.uint64]

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_CHUNK = 8192
"""Counters computed at once: the uint64 arrays of this size stay in a core's second-level cache."""
_MULTIPLIER_0, _MULTIPLIER_1 = (np.array(constant, dtype=np.uint64) for constant in MULTIPLIERS)
_LOW, _HALF = np.array(0xFFFFFFFF, dtype=np.uint64), np.array(32, dtype=np.uint64)


def philox4x32(
    counter: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike, npt.ArrayLike], key: int
) -> tuple[UInt32, ...]:
    """Four random words for each counter.

    Args:
        counter: four arrays (or scalars) of 32-bit words that broadcast together.
        key: 64-bit key.

    Returns:
        Four uint32 arrays of the broadcast shape.
    """
    words = np.broadcast_arrays(*counter)
    shape, flat = words[0].shape, [word.ravel() for word in words]
    size = flat[0].size
    result = tuple(np.empty(size, dtype=np.uint32) for _ in range(4))
    keys = [np.array(word, dtype=np.uint64) for pair in round_keys(key) for word in pair]
    for first in range(0, size, _CHUNK):
        part = slice(first, first + _CHUNK)
        state = [word[part].astype(np.uint64) for word in flat]
        _scramble(state, keys)
        for out, word in zip(result, state):
            out[part] = word
    return tuple(word.reshape(shape) for word in result)


def round_keys(key: int) -> list[tuple[int, int]]:
    """The two 32-bit key words of each round."""
    low, high = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    return [((low + i * _WEYL_0) & 0xFFFFFFFF, (high + i * _WEYL_1) & 0xFFFFFFFF) for i in range(_ROUNDS)]


def _scramble(state: list[UInt64], keys: list[UInt64]) -> None:
    """Ten rounds in place.

    Every temporary is reused, because page faults on fresh ones cost more than the arithmetic; constants are arrays, because
    on a small state turning a scalar into one costs as much as the arithmetic.
    """
    for word in state:
        np.bitwise_and(word, _LOW, out=word)
    c0, c1, c2, c3 = state
    product_0, product_1 = np.empty_like(c0), np.empty_like(c0)
    for key_0, key_1 in zip(keys[::2], keys[1::2]):
        np.multiply(c0, _MULTIPLIER_0, out=product_0)
        np.multiply(c2, _MULTIPLIER_1, out=product_1)
        np.right_shift(product_1, _HALF, out=c0)
        np.bitwise_xor(c0, c1, out=c0)
        np.bitwise_xor(c0, key_0, out=c0)
        np.bitwise_and(product_1, _LOW, out=c1)
        np.right_shift(product_0, _HALF, out=c2)
        np.bitwise_xor(c2, c3, out=c2)
        np.bitwise_xor(c2, key_1, out=c2)
        np.bitwise_and(product_0, _LOW, out=c3)
