"""Lengths of masked spans and how often spans begin, so that a wanted share of all units is covered.

SpanBERT (arXiv 1907.10529) draws lengths from a geometric law cut at a largest length and scaled to add up to 1 (p = 0.2,
at most 10: mean 3.8), one span after another until the budget of the text is full. Here every unit i of a document (and the
64 before its beginning) begins a span on its own, with chance q, whatever happens around it, so a mask stays a pure
function of the place. Unit j is then covered unless none of the units j, j-1, ..., j-m+1 began a span that reaches it:

    share = 1 - Π_{k=0}^{m-1} (1 - q · P(length > k))

which is exact for every unit, also at the beginning of a document (spans that began before it reach into it) and at its
end (spans are cut there). Spans may touch or overlap, so runs of covered units are somewhat longer than single spans.
Integers and IEEE products only: the same thresholds on every platform.
"""

from __future__ import annotations

SCALE = 1 << 32
"""Random words are below this."""


def length_tail(p: float, longest: int) -> list[float]:
    """P(length > k) for k = 0 .. longest-1 under P(length = n) ∝ p · (1-p)^(n-1), n = 1 .. longest."""
    weights = [p]
    for _ in range(longest - 1):
        weights.append(weights[-1] * (1.0 - p))
    total = 0.0
    tails = []
    for weight in reversed(weights):
        total += weight
        tails.append(total)
    return [tail / total for tail in reversed(tails)]


def reach_thresholds(share: float, *, p: float, longest: int) -> tuple[int, ...]:
    """Thresholds T[k], descending: a random word below T[k] begins a span that is longer than k units.

    Args:
        share: of units to cover, in (0, 1).
        p: of the geometric law.
        longest: m, the longest span; 1 makes every span one unit, T[0] = share · 2^32.
    """
    tails = length_tail(p, longest)
    low, high = 0, SCALE  # q · 2^32: the largest that does not cover more than the share
    while high - low > 1:
        middle = (low + high) // 2
        if _covered(_thresholds(middle, tails)) > share:
            high = middle
        else:
            low = middle
    return _thresholds(low, tails)


def _thresholds(begin: int, tails: list[float]) -> tuple[int, ...]:
    return tuple(int(begin * tail) for tail in tails)


def _covered(thresholds: tuple[int, ...]) -> float:
    free = 1.0
    for threshold in thresholds:
        free *= 1.0 - threshold / SCALE
    return 1.0 - free
