"""When to ask for a stop so that one more save fits: arithmetic on instants, without clocks, files or processes.

Instants are seconds of `time.monotonic()` of this process. A step is in flight when the request comes, then the save
begins: so the request has to come a step, a save and a margin before the end.
"""

from __future__ import annotations

from dataclasses import dataclass

HURRY_MARGIN_S = 5.0
"""Left over after step and save when only they still fit."""


@dataclass(frozen=True)
class Needs:
    """What stopping takes, in seconds, as measured."""

    step_s: float = 0.0
    """The longest of the last steps."""
    save_s: float = 0.0
    """From the start of a save until it is on disk."""

    @property
    def total_s(self) -> float:
        """A step and a save."""
        return self.step_s + self.save_s

    def is_short(self, left_s: float) -> bool:
        """Whether the time left is hardly enough."""
        return left_s < self.total_s + HURRY_MARGIN_S


@dataclass(frozen=True)
class Limit:
    """An instant that the run should not, or can not, go beyond."""

    at: float
    """The instant."""
    reason: str
    """What it is, for people."""
    margin_s: float = 0.0
    """Kept free before it, besides step and save."""
    kills: bool = False
    """Whether the process is killed then, so that a save that takes longer cannot finish."""
    requeue: bool = True
    """Whether the run may then be started again by itself."""


def latest_request(limit: Limit, needs: Needs) -> float:
    """The instant at which to ask for the stop."""
    return limit.at - needs.total_s - limit.margin_s
