"""Decides when a save is due: every n steps, every n minutes, or when the measured cost and failure rate say so.

Steps are counted alike by all ranks. Clocks are not: with minutes and auto only rank 0 decides, and its decision travels as a flag
on the step's own agreement. Reads no clock itself and saves nothing.
"""

from __future__ import annotations

import math
from typing import Any

from dstrain.checkpoint.config import CheckpointConfig
from dstrain.checkpoint.interval import hours_text, mean_failure_s, save_interval

_FIRST_S = 300.0
"""The first save comes soon: it measures the cost, and shows early that saving works at all."""
_SMOOTHING = 0.3


class SaveSchedule:
    """When the next checkpoint is due."""

    def __init__(
        self, config: CheckpointConfig, *, devices: int, now_s: float, interruptions: int = 0, run_hours: float = 0.0
    ) -> None:
        """Begin to count.

        Args:
            config: the checkpoint section.
            devices: accelerators of the job; processes on CPUs.
            now_s: a clock that only goes forward, in seconds; every later `now_s` is of the same one.
            interruptions: that the run has had, over all restarts.
            run_hours: it has been up, over all restarts.
        """
        self._config = config
        self._devices, self._interruptions = devices, interruptions
        self._last_s = self._begin_s = self._now_s = now_s
        self._hours_before = run_hours
        self._cost_s: float | None = None
        self._durable_s = 0.0
        self._step_s = 0.0

    def wants_save(self, step: int, now_s: float) -> bool:
        """Whether to save at this step; with minutes and auto ask on rank 0 only, and tell the others.

        Args:
            step: optimizer steps done.
            now_s: the clock.
        """
        self._now_s = now_s
        match self._config.interval:
            case "steps":
                return isinstance(self._config.every_steps, int) and step % self._config.every_steps == 0
            case "end":
                return False
        # The nearer of two step boundaries: half a step early rather than almost a step late.
        return now_s - self._last_s >= self.interval_s() - self._step_s / 2

    def note_save(self, cost_s: float, *, durable_s: float = 0.0, now_s: float | None = None) -> None:
        """A save was begun, for whatever reason: count from here.

        Args:
            cost_s: for which training stood still.
            durable_s: until it was in its place, where that is known; may be told later by `note_durable`.
            now_s: the clock; the last one told if None.
        """
        self._last_s = self._now_s = self._now_s if now_s is None else now_s
        self._cost_s = cost_s if self._cost_s is None else self._cost_s + _SMOOTHING * (cost_s - self._cost_s)
        self.note_durable(durable_s)

    def note_durable(self, durable_s: float) -> None:
        """How long the last save took until it was in its place."""
        self._durable_s = max(durable_s, (1 - _SMOOTHING) * self._durable_s)

    def note_step(self, seconds: float) -> None:
        """How long a step took, saves left out."""
        self._step_s = seconds if not self._step_s else self._step_s + _SMOOTHING * (seconds - self._step_s)

    def interval_s(self) -> float:
        """Seconds between saves as things stand; infinite where steps or the end decide."""
        config = self._config
        if config.interval in ("steps", "end"):
            return math.inf
        if config.every_minutes is not None:
            return 60 * config.every_minutes
        longest = 60 * config.longest_minutes
        if self._cost_s is None:
            return min(_FIRST_S, longest)
        return save_interval(
            self._cost_s, mean_failure_s=self.mean_failure_s(), longest_s=longest, durable_s=self._durable_s
        )

    def mean_failure_s(self) -> float:
        """Expected seconds between interruptions, from the planning value and the run's record."""
        return mean_failure_s(
            devices=self._devices, device_hours_per_failure=self._config.gpu_hours_per_failure,
            interruptions=self._interruptions, run_hours=self._hours_before + (self._now_s - self._begin_s) / 3600,
        )  # fmt: skip

    def describe(self) -> str:
        """One line for people about what an interruption may cost."""
        config = self._config
        match config.interval:
            case "steps":
                return f"a checkpoint every {config.every_steps} steps"
            case "end":
                return "no checkpoint before the end, except on a stop request: an interruption costs the whole run"
            case "minutes":
                return f"a checkpoint every {hours_text(self.interval_s())}"
        return (
            f"a checkpoint every {hours_text(self.interval_s())} for now: chosen from its cost and one interruption in "
            f"{hours_text(self.mean_failure_s())}, at most {hours_text(60 * config.longest_minutes)}"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a restart should know, JSON-able: goes into the manifest's `health`."""
        return {"cost_s": self._cost_s, "durable_s": self._durable_s, "step_s": self._step_s}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the measured costs of an earlier life; values that are no times are ignored."""
        cost, durable, step = (state.get(key) for key in ("cost_s", "durable_s", "step_s"))
        if isinstance(cost, (int, float)) and cost >= 0:
            self._cost_s = float(cost)
        if isinstance(durable, (int, float)) and durable >= 0:
            self._durable_s = float(durable)
        if isinstance(step, (int, float)) and step >= 0:
            self._step_s = float(step)
