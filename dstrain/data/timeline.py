"""Optimizer steps to turns of the lanes: batch-size and weight phases, steps that are stepped over, a later beginning.

A step of G rows takes G/C turns of each of the C lanes. A phase keeps its batch and its weights; what came before it is a
number of turns a lane, so any step is found in O(log phases). Knows no sources and no rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from dstrain.base.errors import ConfigError


@dataclass(frozen=True)
class Phase:
    """Some steps of equal batch and weights."""

    first_step: int
    """Optimizer steps done when it begins."""
    global_batch: int
    """Rows of one step, over all ranks."""
    shares: tuple[int, ...]
    """Integer shares of the sources (data/mixture.py)."""


@dataclass(frozen=True)
class Place:
    """Where a step stands."""

    phase: int
    """Which phase."""
    turn: int
    """The step's first turn of each lane, counted from the phase's beginning."""
    per_lane: int
    """Turns of each lane that the step takes."""


@dataclass(frozen=True)
class SkippedWindow:
    """Turns [first_turn, last_turn) of every lane in a phase, stepped over when `step` begins."""

    step: int
    phase: int
    first_turn: int
    last_turn: int


class Timeline:
    """The phases of a run in order, and the windows of steps whose data is never used."""

    def __init__(
        self, phases: Sequence[Phase], *, lanes: int, skip_steps: Sequence[tuple[int, int]] = (), origin: int = 0
    ) -> None:
        """Check and order.

        Args:
            phases: at least one; the first begins at step 0.
            lanes: C; divides every phase's global batch.
            skip_steps: windows [a, b): the data that steps a to b-1 would have taken is stepped over when step a comes.
            origin: the step at which these phases' data begins (a run that went on with new data).

        Raises:
            ConfigError: phases out of order, a batch that C does not divide, a window that is none.
        """
        starts = [phase.first_step for phase in phases]
        if starts[0] != 0 or starts != sorted(set(starts)):
            raise ConfigError(f"data.phases: from_step must ascend, each above 0, got {starts[1:]}")
        for phase in phases:
            if phase.global_batch % lanes:
                raise ConfigError(
                    f"data.lanes: {lanes} does not divide the global batch {phase.global_batch} "
                    f"of the phase from step {phase.first_step}"
                )
        for first, last in skip_steps:
            if not 0 <= first < last:
                raise ConfigError(
                    f"data.skip_steps: [{first}, {last}] is no window of steps; write [first, one past the last]"
                )
        now = max(0, bisect_right(starts, origin) - 1)
        self.lanes, self.origin = lanes, origin
        self.phases = tuple(phases)
        lengths: dict[int, int] = {}
        for first, last in skip_steps:  # windows that begin at one step are stepped over one after the other
            lengths[first] = lengths.get(first, 0) + last - first
        self.skip_steps = tuple((first, first + length) for first, length in sorted(lengths.items()))
        self._first = now
        self._starts = [max(start, origin) for start in starts]

    def place(self, step: int) -> Place:
        """Where a step stands; steps before the origin have no place."""
        if step < self.origin:
            raise ValueError(f"step {step} lies before the data's beginning at step {self.origin}")
        phase = max(self._first, bisect_right(self._starts, step) - 1)
        per_lane = self.phases[phase].global_batch // self.lanes
        return Place(phase, (step - self._starts[phase] + self._skipped(phase, step)) * per_lane, per_lane)

    def turns(self, phase: int) -> int:
        """Turns a lane takes in a whole phase that is not the last, or 0 when it lies before the origin."""
        if phase < self._first or phase + 1 >= len(self._starts):
            return 0
        end = self._starts[phase + 1]
        steps = end - self._starts[phase] + self._skipped(phase, end - 1)
        return steps * (self.phases[phase].global_batch // self.lanes)

    def skipped_windows(self) -> list[SkippedWindow]:
        """The windows that are stepped over, as turns of their phase."""
        found = []
        for first, last in self.skip_steps:
            if first >= self.origin:
                place = self.place(first)
                start = place.turn - (last - first) * place.per_lane
                found.append(SkippedWindow(first, place.phase, start, place.turn))
        return found

    def _skipped(self, phase: int, step: int) -> int:
        """Steps of data stepped over in a phase up to and with a step."""
        begin = self._starts[phase]
        end = self._starts[phase + 1] if phase + 1 < len(self._starts) else None
        return sum(
            last - first for first, last in self.skip_steps
            if begin <= first <= step and (end is None or first < end)
        )  # fmt: skip


def with_window(windows: Sequence[tuple[int, int]], first: int, last: int) -> tuple[tuple[int, int], ...]:
    """Windows of steps, and one more that is named in the steps of the order which they make.

    What any of them stepped over stays out: a window inside the new one is swallowed by it, one after it is met as many steps
    earlier as the new one takes out.

    Args:
        windows: [a, b) as `Timeline` takes them.
        first: first step whose data is stepped over now.
        last: one past the last one.
    """
    swallowed = sum(b - a for a, b in windows if first < a < last)
    before = [(a, b) for a, b in windows if a <= first]
    after = [(a - (last - first), b - (last - first)) for a, b in windows if a >= last and a > first]
    return tuple(sorted([*before, (first, last + swallowed), *after]))
