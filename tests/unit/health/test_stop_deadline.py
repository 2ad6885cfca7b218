import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.health.stop_deadline import HURRY_MARGIN_S, Limit, Needs, latest_request

SECONDS = st.floats(min_value=0, max_value=1e6)


@given(at=SECONDS, step=SECONDS, save=SECONDS, margin=SECONDS, late=st.floats(min_value=0, max_value=1))
def test_a_stop_asked_for_in_time_leaves_room_for_the_step_in_flight_one_save_and_the_margin(
    at, step, save, margin, late
):
    asked = latest_request(Limit(at, "end", margin_s=margin), Needs(step_s=step, save_s=save))
    on_disk = asked + late * step + save  # the rest of the step in flight, then the save
    assert on_disk <= at - margin + 1e-6 * (1 + at + step + save + margin)


def test_the_request_comes_no_earlier_than_needed():
    assert latest_request(Limit(1000.0, "end", margin_s=60.0), Needs(step_s=2.0, save_s=30.0)) == 908.0
    assert latest_request(Limit(1000.0, "end"), Needs()) == 1000.0


@pytest.mark.parametrize(("left", "short"), [(32 + HURRY_MARGIN_S, False), (31.9 + HURRY_MARGIN_S, True), (-1.0, True)])
def test_time_is_short_when_hardly_more_than_step_and_save_fits(left, short):
    assert Needs(step_s=2.0, save_s=30.0).is_short(left) is short
