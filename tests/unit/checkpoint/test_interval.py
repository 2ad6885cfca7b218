"""The formulas against the table of the design, a simulation, and each other."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.checkpoint.interval import (
    OVERHEAD_LIMIT,
    availability_optimal,
    daly,
    goodput,
    goodput_first_order,
    hours_text,
    mean_failure_s,
    save_interval,
    young,
)

HOUR, MINUTE = 3600.0, 60.0
# (C, R, M in hours) -> tau in minutes, goodput in % at tau, tau/4 and 4 tau: the design's table for 64 GPUs
# to 131,072.
TABLE = [
    (20, 180, 781, 177, 99.6, 99.2, 99.2),
    (20, 180, 195, 88, 99.2, 98.4, 98.4),
    (30, 300, 7.9, 21.8, 94.5, 90.1, 89.6),
    (30, 600, 3.09, 13.6, 88.0, 81.8, 80.7),
    (30, 300, 1.8, 10.4, 86.6, 78.9, 77.2),
    (10, 120, 0.23, 2.1, 73.7, 64.3, 60.8),
]

times = st.floats(0.01, 1e7, allow_nan=False)


@pytest.mark.parametrize(("cost", "restart", "hours", "tau_min", "at", "quarter", "four"), TABLE)
def test_the_published_table_is_reproduced(
    cost: float, restart: float, hours: float, tau_min: float, at: float, quarter: float, four: float
) -> None:
    tau = young(cost, hours * HOUR)
    assert tau / MINUTE == pytest.approx(tau_min, rel=0.01, abs=0.06)  # the table is rounded
    for factor, expected in ((1, at), (0.25, quarter), (4, four)):
        found = goodput(factor * tau, cost_s=cost, mean_failure_s=hours * HOUR, restart_s=restart)
        assert 100 * found == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(("cost", "restart", "hours"), [row[:3] for row in TABLE[:4]])
def test_the_first_order_formula_is_near_the_exact_one_where_failures_are_rare(
    cost: float, restart: float, hours: float
) -> None:
    tau = young(cost, hours * HOUR)
    numbers = {"cost_s": cost, "mean_failure_s": hours * HOUR, "restart_s": restart}
    assert goodput_first_order(tau, **numbers) == pytest.approx(goodput(tau, **numbers), abs=0.005)


def test_a_simulation_of_interruptions_gives_the_exact_formulas_share() -> None:
    """Exponential interruptions that also hit saves and restarts; 20,000 of them."""
    cost, restart, mean = 30.0, 600.0, 3.09 * HOUR
    tau = young(cost, mean)
    clock, useful, chance = 0.0, 0.0, random.Random(1)
    for _ in range(20_000):
        up = chance.expovariate(1 / mean)
        useful += tau * int(up // (tau + cost))
        clock += up
        while (interrupted := chance.expovariate(1 / mean)) < restart:
            clock += interrupted
        clock += restart
    assert useful / clock == pytest.approx(goodput(tau, cost_s=cost, mean_failure_s=mean, restart_s=restart), abs=0.005)


@given(cost=times, mean=times)
def test_daly_is_young_where_saves_are_cheap_and_no_longer_than_m_where_they_are_not(cost: float, mean: float) -> None:
    assert 0 < daly(cost, mean)
    if cost < 1e-4 * mean:
        assert daly(cost, mean) == pytest.approx(young(cost, mean), rel=0.02)
    if cost >= 2 * mean:
        assert daly(cost, mean) == mean


@given(cost=st.floats(0.01, 100), hours=st.floats(0.2, 2000))
def test_no_other_interval_is_better_than_dalys_by_more_than_half_a_point(cost: float, hours: float) -> None:
    mean = hours * HOUR
    best = max(
        goodput(daly(cost, mean) * 1.1**k, cost_s=cost, mean_failure_s=mean, restart_s=60) for k in range(-30, 31)
    )
    assert goodput(daly(cost, mean), cost_s=cost, mean_failure_s=mean, restart_s=60) > best - 0.005


@given(cost=st.floats(0.01, 60), hours=st.floats(0.2, 2000))
def test_the_chosen_interval_is_within_a_point_of_the_optimum(cost: float, hours: float) -> None:
    mean = hours * HOUR
    numbers = {"cost_s": cost, "mean_failure_s": mean, "restart_s": 60.0}
    tau = save_interval(cost, mean_failure_s=mean, longest_s=30 * MINUTE)
    assert goodput(tau, **numbers) > goodput(daly(cost, mean), **numbers) - 0.0101


@given(cost=times, mean=times, longest=times, durable=times)
def test_the_cap_never_makes_saves_cost_more_than_a_hundredth(
    cost: float, mean: float, longest: float, durable: float
) -> None:
    tau = save_interval(cost, mean_failure_s=mean, longest_s=longest, durable_s=durable)
    assert tau >= durable
    if tau < daly(cost, mean):
        assert tau >= cost / OVERHEAD_LIMIT
    if tau > durable and tau > cost:
        assert tau <= max(longest, cost / OVERHEAD_LIMIT)


def test_the_expected_time_between_interruptions_starts_at_the_plan_and_goes_to_the_record() -> None:
    plan = {"devices": 64, "device_hours_per_failure": 50_000.0}
    assert mean_failure_s(**plan) / HOUR == pytest.approx(781.25)
    assert mean_failure_s(**plan, interruptions=1, run_hours=781.25) / HOUR == pytest.approx(781.25)
    assert mean_failure_s(**plan, interruptions=1000, run_hours=1000) / HOUR == pytest.approx(1.78, abs=0.01)


def test_no_save_ever_ends_where_it_takes_many_times_the_time_between_interruptions() -> None:
    assert goodput(1000, cost_s=1e6, mean_failure_s=1.0, restart_s=1.0) == 0.0
    assert goodput_first_order(1000, cost_s=10, mean_failure_s=1.0, restart_s=1.0) == 0.0


def test_the_availability_formula_is_the_papers() -> None:
    assert availability_optimal(30, 600, 300) == pytest.approx(30 + (2 * 900 * 30 + 900) ** 0.5)


def test_times_are_told_in_the_unit_that_people_use() -> None:
    assert [hours_text(s) for s in (5, 300, 7200, 90_000)] == ["5 s", "5 min", "2.0 h", "25.0 h"]
