"""How far a number lies above those before it: a robust score over a window of good steps.

The middle is the median and the spread the scaled median absolute deviation, so that the outliers which are looked for do not
hide themselves, as they do in a mean and a standard deviation. Decides nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median

MAD_TO_SIGMA = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""


class History:
    """The last numbers of good steps, and the score of a new one against them. A pure function of what was added."""

    def __init__(self, *, length: int, at_least: int) -> None:
        """Begin empty.

        Args:
            length: numbers kept.
            at_least: numbers needed before anything is scored.
        """
        self._values: deque[float] = deque(maxlen=length)
        self._at_least = at_least

    def score(self, value: float, *, floor: float) -> float | None:
        """Deviations that a number lies above the middle (negative below); None while too little is known.

        Args:
            value: finite.
            floor: smallest deviation, so that a run of nearly equal numbers does not make noise an outlier; above 0.
        """
        if len(self._values) < self._at_least:
            return None
        middle = self.middle()
        spread = median(abs(known - middle) for known in self._values)
        return (value - middle) / max(MAD_TO_SIGMA * spread, floor)

    def middle(self) -> float:
        """The median of what is known; 0 when nothing is."""
        return median(self._values) if self._values else 0.0

    def add(self, value: float) -> None:
        """A good step's number."""
        self._values.append(value)

    def clear(self) -> None:
        """Forget everything: what comes is not comparable."""
        self._values.clear()

    def values(self) -> list[float]:
        """What is known, oldest first."""
        return list(self._values)

    def restore(self, values: Iterable[float]) -> None:
        """What `values` gave."""
        self._values.clear()
        self._values.extend(float(value) for value in values)
