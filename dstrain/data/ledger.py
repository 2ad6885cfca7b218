"""The ledger: a commutative digest of what a step trained on, the same at every world size.

For each segment, a multilinear hash (Carter, Wegman 1979: a sum of values times random 64-bit keys, one for each place) of
the input ids as the model gets them, of the scored places and of the true ids there. It is mixed with the document, the
segment's place in it, the epoch and the step, and the segments are added up. One row that is exchanged, repeated or left
out, one token, or one mask that differs changes the sum, also a mask that shows the true token.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dstrain.base.protocols import Corrupted, Pieces
from dstrain.data.order import UInt64, mix64

LEDGER_VERSION = 2
"""Part of every loader state: a change of the arithmetic below must raise it."""

LEDGER_MODULUS = 1 << 63

Int64 = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_INPUT, _LABEL = np.uint64(0x243F6A8885A308D3), np.uint64(0x13198A2E03707344)
"""Digits of pi; they only have to differ."""


def ledger_digest(pieces: Pieces, corrupted: Corrupted, *, step: int) -> int:
    """Proof of what was trained on, modulo 2^63; add the digests of micro-batches and ranks modulo 2^63.

    Args:
        pieces: the rows before corruption.
        corrupted: what the model gets of them.
        step: optimizer step, from 0.
    """
    if not len(pieces.lengths):
        return 0
    inputs, labels = _keys(int(pieces.lengths.max() - 1).bit_length())
    with np.errstate(over="ignore"):
        value = inputs.take(pieces.offsets)
        value *= corrupted.tokens.astype(np.int64, copy=False).view(np.uint64)
        scored = labels.take(pieces.offsets.take(corrupted.targets))
        scored *= corrupted.labels.astype(np.uint64) + np.uint64(1)
        value[corrupted.targets] += scored
        content = np.add.reduceat(value, np.cumsum(pieces.lengths) - pieces.lengths)
        place = (pieces.starts.astype(np.uint64) << np.uint64(32)) + pieces.epochs.astype(np.uint64)
        identity = mix64(pieces.documents.astype(np.uint64) + np.uint64(step + 1) * _GOLDEN)
        digest = mix64(mix64(identity ^ mix64(place + _GOLDEN)) + content)
        return int(digest.sum(dtype=np.uint64)) % LEDGER_MODULUS


@lru_cache(maxsize=4)
def _keys(bits: int) -> tuple[UInt64, UInt64]:
    """Keys of the first 2^bits places of a segment, for input ids and for true ids."""
    place = np.arange(1 << bits, dtype=np.uint64)
    with np.errstate(over="ignore"):
        return mix64(place * _GOLDEN + _INPUT) | np.uint64(1), mix64(place * _GOLDEN + _LABEL) | np.uint64(1)
