"""Randomness as a pure function of names: every stream is keyed by (seed, purpose, ...), never by call order or rank.

`derive` hashes its arguments, so `derive(1, "plan", 0)` and `derive(0, "plan", 1)` share nothing, which `seed + epoch`
cannot promise.
"""

from __future__ import annotations

import hashlib


def derive(seed: int, *purpose: str | int) -> int:
    """Return a 64-bit key for a purpose.

    Args:
        seed: the run's seed.
        purpose: names and numbers, e.g. `("mask", epoch)`; their types and boundaries are part of the key.
    """
    text = "\x1f".join([f"i{int(seed)}", *(f"{'s' if isinstance(p, str) else 'i'}{p}" for p in purpose)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
