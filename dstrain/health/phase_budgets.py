"""How long a rank may stay in a phase before it counts as hung: given numbers, widened by what the run has shown. Pure.

A step gets a multiple of the median of recent ones, never less than a floor; the process's first step counts among them
until a few others are known. Which steps are first, and have the long allowance, says the rank by its phase. Any other
phase gets its allowance or a multiple of its longest stay so far. Reads no clock.
Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from dstrain.health.heartbeat import PLACE, Beat, Phase

STEPS_TO_LEARN_FROM = 3
"""Steps that must be known before their median is trusted; until then the longest of all, the first included, stands for it."""
STORAGE_PHASES = frozenset({Phase.DATA, Phase.SAVE, Phase.RESTORE})
"""Phases in which a rank waits for files rather than for other ranks."""


@dataclass(frozen=True)
class PhaseBudgets:
    """Allowances in seconds, one a phase; the fields of `WatchdogConfig` with the same names explain them."""

    start_up_s: float
    rendezvous_s: float
    restore_s: float
    evaluate_s: float
    save_s: float
    data_s: float
    first_step_s: float
    min_step_budget_s: float
    finish_s: float
    factor: float

    def allowance_s(self, beat: Beat) -> float:
        """Seconds that the phase of a heartbeat may last.

        Args:
            beat: its phase, and the durations that the run has shown so far.
        """
        if beat.phase is Phase.STEP:
            usual = (
                median(beat.recent_steps_s)
                if len(beat.recent_steps_s) >= STEPS_TO_LEARN_FROM
                else max(*beat.recent_steps_s, beat.longest_s[PLACE[Phase.FIRST_STEP]], 0.0)
            )
            return max(self.min_step_budget_s, self.factor * usual)
        given = {
            Phase.START_UP: self.start_up_s,
            Phase.RENDEZVOUS: self.rendezvous_s,
            Phase.RESTORE: self.restore_s,
            Phase.EVALUATE: self.evaluate_s,
            Phase.SAVE: self.save_s,
            Phase.DATA: self.data_s,
            Phase.FIRST_STEP: self.first_step_s,
            Phase.FINISH: self.finish_s,
        }[beat.phase]
        return max(given, self.factor * beat.longest_s[PLACE[beat.phase]])


class ObservedTime:
    """Seconds without progress that the watchdog itself has lived through.

    A suspended job (SLURM, a laptop's lid) stops rank and watchdog together; the pause must not look like a hang. So each
    look adds at most `longest_look_s`, however long ago the last one was.
    """

    def __init__(self, *, longest_look_s: float) -> None:
        self._longest_look_s = longest_look_s
        self._counter = -1
        self._looked_at = 0.0
        self.seconds = 0.0

    def look(self, *, counter: int, stamp_s: float, now_s: float, forgive: bool = False) -> float:
        """Take in one reading.

        Args:
            counter: the heartbeat's; a change is progress.
            stamp_s: when the progress was made, on the clock of `now_s`.
            now_s: the monotonic clock.
            forgive: do not count the time since the last look (a person has paused the rank).

        Returns:
            Seconds without progress.
        """
        passed = now_s - self._looked_at
        if counter != self._counter:
            self._counter = counter
            passed = now_s - stamp_s
            self.seconds = 0.0
        if not forgive:
            self.seconds += min(max(passed, 0.0), self._longest_look_s)
        self._looked_at = now_s
        return self.seconds
