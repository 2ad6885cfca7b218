"""A robust score: quiet before enough is known, blind to nothing, the same after being written down."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.health.guard_history import History

FLOATS = st.floats(min_value=-1e6, max_value=1e6)


def filled(values: list[float], *, length: int = 64, at_least: int = 4) -> History:
    history = History(length=length, at_least=at_least)
    for value in values:
        history.add(value)
    return history


def test_nothing_is_scored_before_enough_is_known() -> None:
    assert filled([1.0, 1.0, 1.0]).score(100.0, floor=1.0) is None
    assert filled([1.0, 1.0, 1.0, 1.0]).score(100.0, floor=1.0) == 99.0


def test_normal_noise_is_scored_in_standard_deviations() -> None:
    chance = random.Random(3)
    history = filled([chance.gauss(5.0, 2.0) for _ in range(4000)], length=4000)
    assert history.score(5.0 + 3 * 2.0, floor=1e-9) == pytest.approx(3.0, abs=0.15)


def test_outliers_in_the_window_do_not_hide_the_next_one() -> None:
    """Where a mean and a standard deviation would call it 1.3 deviations."""
    values = [2.0 + 0.01 * (i % 5) for i in range(20)] + [50.0, 60.0, 70.0, 80.0, 90.0]
    score = filled(values).score(60.0, floor=1e-9)
    assert score is not None
    assert score > 100


def test_the_floor_keeps_equal_numbers_from_making_noise_an_outlier() -> None:
    assert filled([3.0] * 10).score(3.01, floor=0.1) == pytest.approx(0.1)


def test_only_the_last_numbers_count() -> None:
    history = filled([100.0] * 8 + [1.0] * 4, length=4)
    assert history.values() == [1.0] * 4
    assert history.middle() == 1.0


@given(st.lists(FLOATS, min_size=4, max_size=40), FLOATS)
def test_what_is_written_down_scores_the_same(values: list[float], value: float) -> None:
    history, other = filled(values, length=16), History(length=16, at_least=4)
    other.restore(json.loads(json.dumps(history.values())))
    assert other.score(value, floor=0.5) == history.score(value, floor=0.5)


@given(st.lists(FLOATS, min_size=4, max_size=40), FLOATS)
def test_the_middle_scores_nothing_and_higher_scores_more(values: list[float], value: float) -> None:
    history = filled(values)
    assert history.score(history.middle(), floor=0.5) == 0
    low, high = sorted([value, value + 1.0])
    assert history.score(low, floor=0.5) <= history.score(high, floor=0.5)
    assert math.isfinite(history.score(high, floor=0.5))


def test_forgetting_forgets_all() -> None:
    history = filled([1.0] * 9)
    history.clear()
    assert (history.values(), history.middle()) == ([], 0.0)
