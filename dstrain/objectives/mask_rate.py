"""The masking rate as a pure function of the optimizer step."""

from __future__ import annotations

import math
from typing import Literal

RateShape = Literal["linear", "cosine"]


def rate_at(step: int, *, first: float, last: float | None, steps: int | None, shape: RateShape) -> float:
    """The rate of a step.

    Args:
        step: optimizer steps done before it, from 0.
        first: the rate of step 0.
        last: the rate from step `steps` on; None keeps `first`.
        steps: length of the way from one to the other.
        shape: of that way: a straight line, or half a cosine (slow at both ends).

    Returns:
        A rate between the two. The cosine is rounded to nine digits, so that the last bits of a platform decide nothing.
    """
    if last is None or steps is None:
        return first
    way = min(1.0, max(0.0, step / steps))
    if shape == "cosine":
        way = round((1.0 - math.cos(math.pi * way)) / 2.0, 9)
    return first + (last - first) * way
