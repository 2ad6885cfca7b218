import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dstrain.optim.schedule import ScheduleConfig, budget_factor, learning_rate_factor

KINDS = ("linear", "cosine", "wsd", "inverse_sqrt", "constant")


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
        decay_shape=draw(st.sampled_from(["linear", "one_minus_sqrt"])) if kind == "wsd" else "linear",
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
    if warmup < max_steps and config.kind not in ("constant", "inverse_sqrt"):
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


def test_one_minus_sqrt_falls_fast_at_first():
    factors = curve(100, kind="wsd", warmup_steps=0, decay_steps=16, decay_shape="one_minus_sqrt", min_ratio=0.1)
    assert factors[84] == 1.0
    assert factors[88] == pytest.approx(0.1 + 0.9 * (1 - 0.5))
    assert factors[93] == pytest.approx(0.1 + 0.9 * (1 - 0.75))
    assert factors[100] == pytest.approx(0.1)


def test_inverse_sqrt_halves_when_progress_is_four_warm_ups_and_stops_at_the_least():
    factors = curve(100, kind="inverse_sqrt", warmup_steps=4, min_ratio=0.25)
    assert factors[4] == 1.0
    assert factors[16] == 0.5
    assert factors[64] == factors[100] == 0.25


@given(schedules(), st.integers(1, 400))
def test_a_budget_gives_the_curve_that_as_many_steps_give(config, max_steps):
    """Whatever the unit: only the share of the whole counts (the rise in steps begins one step higher)."""
    warmup = min(config.warmup_steps or 0, max_steps - 1) / max_steps
    decay = (
        None
        if config.kind != "wsd"
        else min(config.decay_steps or max(1, round(0.1 * max_steps)), max_steps) / max_steps
    )
    in_shares = ScheduleConfig(
        kind=config.kind, clock="tokens", warmup_share=warmup, decay_share=decay, decay_shape=config.decay_shape,
        min_ratio=config.min_ratio,
    )  # fmt: skip
    in_steps = config.model_copy(update={
        "warmup_steps": round(warmup * max_steps), "decay_steps": None if decay is None else round(decay * max_steps),
    })  # fmt: skip
    for step in range(round(warmup * max_steps), max_steps + 1):
        if config.kind == "inverse_sqrt" and not warmup:
            continue  # without a rise there is no scale, and each clock has its own
        expected = learning_rate_factor(in_steps, step=step, max_steps=max_steps)
        assert budget_factor(in_shares, share=step / max_steps) == pytest.approx(expected, abs=1e-6)


def test_a_budget_begins_at_nothing_ends_at_the_least_and_stays_there():
    config = ScheduleConfig(clock="hours", warmup_share=0.1, min_ratio=0.2)
    found = [budget_factor(config, share=share) for share in (0.0, 0.05, 0.1, 0.55, 1.0, 1.7)]
    assert found == pytest.approx([0.0, 0.5, 1.0, 0.6, 0.2, 0.2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clock": "tokens", "warmup_steps": 5}, "warmup_steps does not go with clock: tokens; give warmup_share"),
        ({"warmup_share": 0.1}, "warmup_share does not go with clock: steps; give warmup_steps"),
        ({"kind": "wsd", "decay_share": 0.1}, "decay_share does not go with clock: steps; give decay_steps"),
        ({"kind": "cosine", "decay_shape": "one_minus_sqrt"}, "decay_shape belongs to kind: wsd"),
    ],
)
def test_lengths_are_in_the_clocks_own_unit(settings, message):
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig(**settings)
