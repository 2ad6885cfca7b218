import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dstrain.optim.schedule import ScheduleConfig, learning_rate_factor

KINDS = ("linear", "cosine", "wsd", "constant")


def curve(max_steps, **settings):
    config = ScheduleConfig(**settings)
    return [learning_rate_factor(config, step=step, max_steps=max_steps) for step in range(max_steps + 1)]


@st.composite
def schedules(draw):
    kind = draw(st.sampled_from(KINDS))
    return ScheduleConfig(
        kind=kind,
        warmup_steps=draw(st.none() | st.integers(0, 120)),
        decay_steps=draw(st.none() | st.integers(1, 120)) if kind == "wsd" else None,
        min_ratio=draw(st.floats(0, 1)),
    )


@given(schedules(), st.integers(1, 100), st.integers(0, 200))
def test_a_rate_is_never_negative_nor_above_the_peak(config, max_steps, step):
    factor = learning_rate_factor(config, step=step, max_steps=max_steps)
    warmup = config.warmup_steps if config.warmup_steps is not None else math.ceil(0.06 * max_steps)
    assert (0 if step < warmup else config.min_ratio) <= factor <= 1
    if step < warmup:
        assert factor == (step + 1) / warmup


@given(schedules(), st.integers(1, 100))
def test_a_rate_rises_to_the_peak_once_and_never_rises_again(config, max_steps):
    factors = [learning_rate_factor(config, step=step, max_steps=max_steps) for step in range(max_steps + 1)]
    top = factors.index(max(factors))
    assert all(a < b for a, b in pairwise(factors[: top + 1]))
    assert all(a >= b for a, b in pairwise(factors[top:]))


@given(schedules(), st.integers(1, 100))
def test_a_run_ends_at_the_asked_share_of_the_peak(config, max_steps):
    warmup = config.warmup_steps if config.warmup_steps is not None else math.ceil(0.06 * max_steps)
    end = learning_rate_factor(config, step=max_steps, max_steps=max_steps)
    if warmup < max_steps and config.kind != "constant":
        assert end == pytest.approx(config.min_ratio, abs=1e-12)


def test_linear_falls_in_equal_steps():
    assert curve(8, kind="linear", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_cosine_is_half_way_down_in_the_middle():
    factors = curve(12, kind="cosine", warmup_steps=2, min_ratio=0.2)
    assert factors[2] == 1.0
    assert factors[7] == pytest.approx(0.6)
    assert factors[12] == pytest.approx(0.2)
    assert factors[3] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 10)))


def test_wsd_holds_the_peak_and_falls_over_its_last_steps():
    assert curve(10, kind="wsd", warmup_steps=2, decay_steps=4) == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0]


def test_wsd_decays_over_a_tenth_of_the_run_by_default():
    factors = curve(100, kind="wsd", warmup_steps=0)
    assert factors[90] == 1.0
    assert factors[91] == pytest.approx(0.9)


def test_wsd_still_reaches_its_end_when_the_warm_up_reaches_into_the_decay():
    assert curve(8, kind="wsd", warmup_steps=4, decay_steps=8) == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_constant_stays_at_the_peak():
    assert curve(5, kind="constant", warmup_steps=2, min_ratio=0.5) == [0.5, 1, 1, 1, 1, 1]


def test_the_default_warm_up_is_six_percent_of_the_run():
    factors = curve(100, kind="constant")
    assert factors[:7] == [pytest.approx((step + 1) / 6) for step in range(6)] + [1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_no_warm_up_starts_at_the_peak(kind):
    assert curve(10, kind=kind, warmup_steps=0)[0] == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_one_step_does_train(kind):
    assert curve(1, kind=kind)[0] == 1.0


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_a_decay_length_belongs_to_wsd_only(kind):
    with pytest.raises(ValidationError, match=f"decay_steps belongs to kind: wsd, not to kind: {kind}"):
        ScheduleConfig(kind=kind, decay_steps=5)
