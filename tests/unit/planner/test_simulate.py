"""The simulator against closed forms, brute force and itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from dstrain.base.errors import ConfigError
from dstrain.checkpoint.interval import daly, goodput
from dstrain.planner.simulate import Failures, Noise, run_with_failures, slowest, step_factors

QUIET = Noise(sigma=0.02, stall_share=0.0)


def expected_largest_normal(n: int) -> float:
    """E[max of n standard normals], by integrating its density."""
    density = lambda x: x * n * stats.norm.pdf(x) * stats.norm.cdf(x) ** (n - 1)  # noqa: E731
    return float(integrate.quad(density, -10, 12, limit=200)[0])


@pytest.mark.parametrize("nodes", [1, 2, 64, 2048])
def test_largest_of_many_noises_has_the_expectation_of_order_statistics(nodes: int) -> None:
    drawn = slowest(Noise(sigma=0.05, stall_share=0.0), nodes=nodes, steps=200_000, rng=np.random.default_rng(1))
    assert np.log(drawn).mean() / 0.05 == pytest.approx(expected_largest_normal(nodes), abs=0.01)


def test_drawing_the_largest_at_once_equals_drawing_every_node() -> None:
    rng = np.random.default_rng(3)
    noise = Noise(sigma=0.1, stall_share=0.01, stall_factor=2.0, stall_tail=3.0, slow_nodes=2, slow_factor=1.1)
    nodes, steps = 16, 60_000
    factors = np.exp(noise.sigma * rng.standard_normal((steps, nodes)))
    factors[:, :2] *= noise.slow_factor
    stalls = noise.stall_factor * rng.random((steps, nodes)) ** (-1 / noise.stall_tail)
    every = np.where(rng.random((steps, nodes)) < noise.stall_share, np.maximum(stalls, factors), factors).max(axis=1)
    drawn = slowest(noise, nodes=nodes, steps=steps, rng=np.random.default_rng(4))
    for quantile in (0.05, 0.5, 0.8):
        assert np.quantile(drawn, quantile) == pytest.approx(np.quantile(every, quantile), rel=0.02)


def test_one_slow_node_makes_every_step_slow() -> None:
    slow = step_factors(Noise(sigma=0.0, stall_share=0.0, slow_nodes=1, slow_factor=1.3), nodes=100)
    assert slow.mean == slow.median == pytest.approx(1.3)


def test_steps_grow_with_nodes_and_no_noise_changes_nothing() -> None:
    means = [step_factors(Noise(), nodes=n).mean for n in (1, 8, 64, 512, 2048)]
    assert means == sorted(means)
    assert step_factors(Noise(sigma=0.0, stall_share=0.0), nodes=2048).largest == 1.0


def test_stalls_follow_their_power_law() -> None:
    noise = Noise(sigma=0.0, stall_share=1.0, stall_factor=1.5, stall_tail=2.5)
    drawn = slowest(noise, nodes=1, steps=200_000, rng=np.random.default_rng(5))
    assert drawn.mean() == pytest.approx(1.5 * 2.5 / 1.5, rel=0.02)  # mean of a Pareto: scale · a / (a - 1)
    assert (drawn > 3.0).mean() == pytest.approx(0.5**2.5, rel=0.03)


@pytest.mark.parametrize(("mtbf_h", "save_s", "restart_s"), [(3.0, 5.0, 300.0), (0.5, 20.0, 120.0), (24.0, 1.0, 600.0)])
def test_goodput_is_the_exact_formula(mtbf_h: float, save_s: float, restart_s: float) -> None:
    mean = 3600 * mtbf_h
    interval = daly(save_s, mean)
    failures = Failures(mean, restart_s, interval, save_s)
    outcome = run_with_failures(400 * mean, failures, replications=100, seed=7)
    exact = goodput(interval, cost_s=save_s, mean_failure_s=mean, restart_s=restart_s)
    assert outcome.useful_s / outcome.wall_s.mean() == pytest.approx(exact, rel=0.005)
    assert outcome.failures.mean() == pytest.approx(outcome.wall_s.mean() / mean, rel=0.02)


def test_young_daly_interval_is_the_best_one() -> None:
    mean, save = 3600.0, 10.0
    best = daly(save, mean)
    found = {
        scale: run_with_failures(
            300 * mean, Failures(mean, 60, best * scale, save), replications=200, seed=2
        ).wall_s.mean()
        for scale in (0.25, 1.0, 4.0)
    }
    assert found[1.0] < found[0.25]
    assert found[1.0] < found[4.0]


def test_a_run_without_failures_takes_its_work_and_its_saves() -> None:
    outcome = run_with_failures(1000.0, Failures(1e15, 50.0, 100.0, 2.0), replications=3)
    assert outcome.wall_s == pytest.approx([1018.0] * 3)  # ten pieces, nine saves in between
    assert not outcome.failures.any()


@given(st.integers(0, 2**31), st.floats(600, 1e5), st.floats(1, 60), st.floats(0, 1000))
def test_no_run_is_shorter_than_its_work_and_seeds_repeat(seed: int, mean: float, save: float, restart: float) -> None:
    failures = Failures(mean, restart, min(daly(save, mean), mean), save)
    one = run_with_failures(20 * mean, failures, replications=20, seed=seed)
    assert (one.wall_s >= one.useful_s).all()
    assert (one.wall_s == run_with_failures(20 * mean, failures, replications=20, seed=seed).wall_s).all()


def test_a_run_that_would_never_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="no run would end"):
        run_with_failures(1e6, Failures(10.0, 5.0, 1000.0, 1.0))


def test_impossible_noise_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stall_tail=0\.5 above 1"):
        Noise(stall_tail=0.5)
