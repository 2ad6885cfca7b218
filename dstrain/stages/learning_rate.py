"""The learning rate of the next step, from the run's counters: what the schedule's clock has measured so far.

Hours are rank 0's, told to all ranks, so that none takes a step of another size; they are a counter of the run and in every
checkpoint. Shapes are `optim.schedule`'s.
"""

from __future__ import annotations

from collections.abc import Callable

from dstrain.base.control import ControlPlane
from dstrain.base.protocols import RunState
from dstrain.health.stop_config import StopConfig
from dstrain.optim.schedule import ScheduleConfig, budget_factor, learning_rate_factor


def learning_rate_of(
    schedule: ScheduleConfig, *, peak: float, stop: StopConfig, max_steps: int, state: RunState, control: ControlPlane
) -> Callable[[int], float]:
    """The rate of a step, from steps done; collective with clock: hours, so every rank calls it once a step.

    Args:
        schedule: of the run.
        peak: rate.
        stop: holds the budgets that clocks other than steps run against.
        max_steps: length of the run.
        state: the run's counters as they are when the rate is asked for.
        control: agreements between ranks.
    """

    def rate(step: int) -> float:
        if schedule.clock == "steps":
            return peak * learning_rate_factor(schedule, step=step, max_steps=max_steps)
        return peak * budget_factor(schedule, share=budget_share(schedule, stop, state, control))

    return rate


def budget_share(schedule: ScheduleConfig, stop: StopConfig, state: RunState, control: ControlPlane) -> float:
    """How much of the budget is used up; collective with clock: hours."""
    if schedule.clock == "tokens":
        assert stop.max_tokens is not None, "the configuration was checked"
        return state.tokens / stop.max_tokens
    assert stop.max_training_hours is not None, "the configuration was checked"
    return float(control.from_first(state.compute_seconds)) / (stop.max_training_hours * 3600)
