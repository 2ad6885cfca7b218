import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.objectives.mask_rate import rate_at

rate = st.floats(0.01, 0.99)


@given(rate, st.integers(0, 10**9))
def test_without_a_last_rate_it_is_constant(first, step):
    assert rate_at(step, first=first, last=None, steps=None, shape="linear") == first


@given(rate, rate, st.integers(1, 10**6), st.sampled_from(["linear", "cosine"]), st.data())
def test_a_schedule_begins_and_ends_where_it_is_told_and_never_turns_back(first, last, steps, shape, data):
    def at(step):
        return rate_at(step, first=first, last=last, steps=steps, shape=shape)

    assert at(0) == first
    assert at(steps) == at(10 * steps) == pytest.approx(last, abs=1e-15)
    one, two = sorted(data.draw(st.tuples(st.integers(0, steps), st.integers(0, steps))))
    assert (at(two) - at(one)) * (last - first) >= 0
    assert min(first, last) - 1e-15 <= at(one) <= max(first, last) + 1e-15


def test_the_shapes_are_a_line_and_half_a_cosine():
    def at(step, shape):
        return rate_at(step, first=0.3, last=0.1, steps=100, shape=shape)

    assert [at(step, "linear") for step in (25, 50, 75)] == pytest.approx([0.25, 0.2, 0.15])
    assert [at(step, "cosine") for step in (25, 50, 75)] == pytest.approx(
        [0.3 - 0.2 * 0.146447, 0.2, 0.3 - 0.2 * 0.853553], abs=1e-6
    )
