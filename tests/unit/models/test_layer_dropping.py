"""The paper's chances, and draws that any rank can repeat."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dstrain.models.layer_dropping import LayerDroppingConfig, keep_probabilities, kept_layers


def test_everything_is_kept_at_first_and_the_last_layer_half_the_time_in_the_end() -> None:
    config = LayerDroppingConfig(last_keep=0.5, gamma=0.01)
    assert keep_probabilities(config, step=0, num_layers=4) == [1.0] * 4
    assert keep_probabilities(config, step=10**6, num_layers=4) == pytest.approx([0.875, 0.75, 0.625, 0.5])
    theta = 0.5 * math.exp(-1.0) + 0.5
    assert keep_probabilities(config, step=100, num_layers=2) == pytest.approx([1 - (1 - theta) / 2, theta])


@given(st.floats(0.01, 1), st.floats(1e-5, 1), st.integers(0, 10**5), st.integers(1, 48))
def test_chances_fall_with_depth_and_time(last: float, gamma: float, step: int, layers: int) -> None:
    config = LayerDroppingConfig(last_keep=last, gamma=gamma)
    now, later = (keep_probabilities(config, step=s, num_layers=layers) for s in (step, step + 1))
    assert now == sorted(now, reverse=True)
    assert all(last - 1e-9 <= b <= a <= 1.0 for a, b in zip(now, later))


def test_draws_follow_the_chances_and_are_a_function_of_seed_step_and_layer() -> None:
    config = LayerDroppingConfig(last_keep=0.5, gamma=1.0)
    draws = [kept_layers(config, seed=1, step=step, num_layers=4) for step in range(1000, 3000)]
    assert draws == [kept_layers(config, seed=1, step=step, num_layers=4) for step in range(1000, 3000)]
    assert draws != [kept_layers(config, seed=2, step=step, num_layers=4) for step in range(1000, 3000)]
    for layer, chance in enumerate([0.875, 0.75, 0.625, 0.5]):
        kept = [draw[layer] for draw in draws if draw[layer] is not None]
        assert len(kept) / 2000 == pytest.approx(chance, abs=0.04)
        assert sorted(set(kept)) == pytest.approx([chance])
