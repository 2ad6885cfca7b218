"""Philox4x32-10 on tensors, bit-equal to `objectives.philox`, for any device.

32-bit words live in int64 tensors, because torch multiplies no unsigned integers on most devices. A product of two 32-bit words
needs 64 bits and would touch the sign, so each is put together from products with the two 16-bit halves of the constant: no
intermediate value leaves [0, 2^49), nothing overflows, and compiled code may assume so.
"""

from __future__ import annotations

from torch import Tensor

from dstrain.objectives.philox import MULTIPLIERS, round_keys

LOW = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter.

    Args:
        counter: four int64 tensors that broadcast together; only their low 32 bits count.
        key: 64-bit key.

    Returns:
        Four int64 tensors with values in [0, 2^32).
    """
    c0, c1, c2, c3 = (word & LOW for word in counter)
    for key_0, key_1 in round_keys(key):
        high_0, low_0 = _product(c0, MULTIPLIERS[0])
        high_1, low_1 = _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high_1 ^ c1 ^ key_0, low_1, high_0 ^ c3 ^ key_1, low_0
    return c0, c1, c2, c3


def _product(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 64-bit product."""
    low = word * (constant & 0xFFFF)  # below 2^48
    high = word * (constant >> 16) + (low >> 16)  # below 2^48 + 2^32
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
