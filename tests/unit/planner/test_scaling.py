"""A simulated scale-out: its table, its seed, its limits."""

from __future__ import annotations

import pytest

from dstrain.planner.plan import make_plan
from dstrain.planner.scaling import gpu_counts, simulate_scaling
from dstrain.planner.simulate import Noise
from tests.support.planned import site, workload

COUNTS = gpu_counts(8, 16384)


def test_sixteen_thousand_gpus_are_one_row_of_a_doubling() -> None:
    assert COUNTS[0] == 8
    assert COUNTS[-1] == 16384
    assert gpu_counts(24, 100) == [24, 48, 96]


def test_efficiency_and_goodput_fall_with_size_and_the_seed_repeats() -> None:
    rows = simulate_scaling(workload(), site(), COUNTS, noise=Noise(), seed=3, replications=20)
    efficiency, goodput = [row.efficiency for row in rows], [row.goodput for row in rows]
    assert efficiency[0] == 1.0
    assert efficiency == sorted(efficiency, reverse=True)
    assert goodput[-1] < goodput[0]
    assert all(row.goodput_low <= row.goodput_high for row in rows)
    assert rows == simulate_scaling(workload(), site(), COUNTS, noise=Noise(), seed=3, replications=20)
    assert rows != simulate_scaling(workload(), site(), COUNTS, noise=Noise(), seed=4, replications=20)


def test_without_noise_and_failures_it_is_the_plan() -> None:
    quiet = Noise(sigma=0.0, stall_share=0.0)
    safe = site()
    row = simulate_scaling(workload(), safe, [8], noise=quiet, replications=5)[0]
    plan = make_plan(workload(), safe)
    assert row.step_s == plan.step.total
    assert row.factors.mean == 1.0
    assert row.tokens_per_second == pytest.approx(plan.tokens_per_second * plan.reliability.goodput, rel=1e-3)


def test_simulated_goodput_is_the_planned_one() -> None:
    big = simulate_scaling(workload(), site(), [16384], noise=Noise(), replications=100)[0]
    grown = workload(global_batch=128 * 16384)
    plan = make_plan(grown, site(gpus=16384), compare_stages=False)
    assert big.goodput == pytest.approx(plan.reliability.goodput, abs=0.002)
