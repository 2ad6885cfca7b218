"""A save is due by steps, by minutes, or by what it costs; any save starts the count anew."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest

from dstrain.checkpoint.config import CheckpointConfig
from dstrain.checkpoint.interval import daly
from dstrain.checkpoint.schedule import SaveSchedule


def schedule(devices: int = 1, **fields: Any) -> SaveSchedule:
    return SaveSchedule(CheckpointConfig(**fields), devices=devices, now_s=1000.0)


def due_at(chosen: SaveSchedule, *, step_s: float, until_s: float, cost_s: float = 0.1) -> list[float]:
    """Simulate a run whose steps take `step_s`; the times at which it saved, from its start."""
    now, step, saves = 1000.0, 0, []
    while now < 1000.0 + until_s:
        now, step = now + step_s, step + 1
        chosen.note_step(step_s)
        if chosen.wants_save(step, now):
            saves.append(now - 1000.0)
            now += cost_s
            chosen.note_save(cost_s, now_s=now)
    return saves


def test_steps_ask_no_clock() -> None:
    chosen = schedule(every_steps=4)
    assert [step for step in range(1, 13) if chosen.wants_save(step, now_s=step * 1e6)] == [4, 8, 12]
    assert chosen.interval_s() == math.inf


def test_null_saves_only_at_the_end() -> None:
    chosen = schedule(every_steps=None)
    assert not any(chosen.wants_save(step, now_s=step * 1e6) for step in range(1, 100))
    assert "whole run" in chosen.describe()


def test_minutes_are_kept_to_the_nearest_step() -> None:
    saves = due_at(schedule(every_steps=None, every_minutes=10), step_s=7.0, until_s=7200)
    assert len(saves) == pytest.approx(12, abs=1)
    assert all(abs((b - a) - 600) <= 4 for a, b in itertools.pairwise(saves))


def test_auto_saves_soon_for_the_first_time_and_at_the_cap_where_failures_are_rare() -> None:
    saves = due_at(schedule(devices=8), step_s=1.0, until_s=4 * 3600)
    assert saves[0] == pytest.approx(300, abs=1)
    assert all(b - a == pytest.approx(1800, abs=2) for a, b in itertools.pairwise(saves))


def test_auto_follows_daly_where_failures_are_frequent() -> None:
    chosen = SaveSchedule(CheckpointConfig(), devices=8, now_s=1000.0, interruptions=100_000, run_hours=23_000.0)
    saves = due_at(chosen, step_s=0.5, until_s=3600, cost_s=10.0)
    gaps = [b - a - 10.0 for a, b in itertools.pairwise(saves)]
    assert all(gap == pytest.approx(daly(10.0, (23_000 + 6250) / 100_001 * 3600), abs=1.0) for gap in gaps)
    assert len(saves) > 10


def test_an_expensive_save_is_taken_less_often_than_the_cap_says() -> None:
    saves = due_at(schedule(devices=8), step_s=10.0, until_s=12 * 3600, cost_s=60.0)
    assert all(b - a >= 60 / 0.01 - 20 for a, b in itertools.pairwise(saves[1:]))


def test_the_runs_own_record_shortens_the_interval() -> None:
    quiet = SaveSchedule(CheckpointConfig(), devices=8, now_s=0.0, run_hours=100.0)
    shaken = SaveSchedule(CheckpointConfig(), devices=8, now_s=0.0, run_hours=100.0, interruptions=2000)
    for chosen in (quiet, shaken):
        chosen.note_save(1.0)
    assert shaken.interval_s() < quiet.interval_s() == 1800.0


def test_a_save_for_another_reason_starts_the_count_anew() -> None:
    chosen = schedule(every_steps=None, every_minutes=10)
    assert not chosen.wants_save(1, now_s=1500.0)
    chosen.note_save(0.1, now_s=1500.0)
    assert not chosen.wants_save(2, now_s=1700.0)
    assert chosen.wants_save(3, now_s=2100.0)


def test_a_save_is_durable_before_the_next_begins() -> None:
    chosen = schedule(longest_minutes=1.0)
    chosen.note_save(0.1)
    chosen.note_durable(500.0)
    assert chosen.interval_s() == 500.0


def test_measured_costs_outlive_a_restart_and_nonsense_does_not() -> None:
    chosen = schedule(devices=8)
    chosen.note_save(60.0, durable_s=90.0)
    again = schedule(devices=8)
    again.restore(json.loads(json.dumps(chosen.state_dict())))
    assert again.interval_s() == chosen.interval_s() == 6000.0
    fresh = schedule(devices=8)
    fresh.restore({"cost_s": "much", "durable_s": -1, "step_s": None})
    assert fresh.interval_s() == 300.0


def test_the_interval_is_told_in_one_line() -> None:
    assert schedule(every_steps=7).describe() == "a checkpoint every 7 steps"
    assert schedule(every_steps=None, every_minutes=90).describe() == "a checkpoint every 90 min"
    assert "at most 30 min" in schedule(devices=64).describe()
