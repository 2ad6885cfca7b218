"""Rates of runs whose clock is not the step counter."""

from __future__ import annotations

import pytest

from dstrain.base.control import ControlPlane
from dstrain.base.protocols import RunState
from dstrain.base.world import World
from dstrain.health.stop_config import StopConfig
from dstrain.optim.schedule import ScheduleConfig
from dstrain.stages.learning_rate import learning_rate_of
from tests.support.simulated_ranks import run_threads


def rates(clock: str, stop: StopConfig, states: list[RunState]) -> list[float]:
    found = []
    now = RunState()
    rate = learning_rate_of(
        ScheduleConfig(clock=clock, **({} if clock == "steps" else {"warmup_share": 0.0})),  # type: ignore[arg-type]
        peak=2.0, stop=stop, max_steps=10, state=now, control=ControlPlane(World()),
    )  # fmt: skip
    for state in states:
        now.tokens, now.compute_seconds = state.tokens, state.compute_seconds
        found.append(rate(state.step))
    return found


def test_tokens_count_whatever_the_steps() -> None:
    states = [RunState(step=0), RunState(step=1, tokens=500), RunState(step=900, tokens=1000)]
    assert rates("tokens", StopConfig(max_tokens=1000), states) == [2.0, 1.0, 0.0]


def test_hours_are_those_of_the_counter_that_checkpoints_keep() -> None:
    states = [RunState(step=3), RunState(step=4, compute_seconds=1800.0), RunState(step=5, compute_seconds=9000.0)]
    assert rates("hours", StopConfig(max_training_hours=1.0), states) == [2.0, 1.0, 0.0]


def test_steps_are_steps() -> None:
    assert rates("steps", StopConfig(), [RunState(step=1), RunState(step=10)]) == pytest.approx([2.0, 0.0])


def test_all_ranks_take_rank_0s_hours() -> None:
    def rank(control: ControlPlane) -> float:
        state = RunState(compute_seconds=900.0 * (1 + control.world.rank))
        schedule = ScheduleConfig(clock="hours", warmup_share=0.0)
        stop = StopConfig(max_training_hours=1.0)
        return learning_rate_of(schedule, peak=1.0, stop=stop, max_steps=9, state=state, control=control)(0)

    assert run_threads(3, rank) == [0.75, 0.75, 0.75]
