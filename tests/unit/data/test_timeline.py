import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import ConfigError
from dstrain.data.timeline import Phase, Timeline, with_window

LANES = 4


@st.composite
def timelines(draw):
    starts = sorted(draw(st.sets(st.integers(1, 60), max_size=4)))
    phases = [Phase(start, LANES * draw(st.integers(1, 4)), (1,)) for start in [0, *starts]]
    windows = draw(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 5)), max_size=3))
    skip = [(first, first + length) for first, length in windows]
    return Timeline(phases, lanes=LANES, skip_steps=skip, origin=draw(st.sampled_from([0, 0, 7, 30])))


@given(timelines())
def test_turns_run_on_from_step_to_step_but_for_the_windows_stepped_over(timeline):
    windows = [w for w in timeline.skip_steps if w[0] >= timeline.origin]
    phase, turn = None, 0
    for step in range(timeline.origin, timeline.origin + 80):
        place = timeline.place(step)
        assert place.per_lane * LANES == timeline.phases[place.phase].global_batch
        if place.phase != phase:
            if phase is not None:
                assert timeline.turns(phase) == turn
            phase, turn = place.phase, 0
        turn += sum(last - first for first, last in windows if first == step) * place.per_lane
        assert place.turn == turn
        turn += place.per_lane


def test_a_window_is_what_its_steps_would_have_taken():
    plain = Timeline([Phase(0, 8, (1,)), Phase(10, 4, (1,))], lanes=4)
    skipping = Timeline([Phase(0, 8, (1,)), Phase(10, 4, (1,))], lanes=4, skip_steps=[(3, 5)])
    [window] = skipping.skipped_windows()
    assert (window.step, window.phase) == (3, 0)
    assert (window.first_turn, window.last_turn) == (plain.place(3).turn, plain.place(5).turn)
    assert [skipping.place(step).turn for step in (0, 1, 2)] == [plain.place(step).turn for step in (0, 1, 2)]
    assert [skipping.place(step).turn for step in (3, 4)] == [plain.place(step).turn for step in (5, 6)]
    assert skipping.place(10) == plain.place(10)  # the next phase begins where it did
    assert skipping.turns(0) == plain.turns(0) + 4


def test_a_later_origin_starts_its_data_at_the_beginning():
    timeline = Timeline([Phase(0, 8, (1,)), Phase(10, 4, (1,))], lanes=4, origin=6)
    assert timeline.place(6).turn == 0
    assert timeline.place(9).turn == 6
    assert (timeline.place(10).phase, timeline.place(10).turn) == (1, 0)
    assert timeline.turns(0) == 8
    with pytest.raises(ValueError, match="before the data's beginning"):
        timeline.place(5)
    late = Timeline([Phase(0, 8, (1,)), Phase(10, 4, (1,))], lanes=4, origin=15)
    assert (late.place(15).phase, late.place(15).turn, late.turns(0)) == (1, 0, 0)


@pytest.mark.parametrize(
    ("phases", "skip", "message"),
    [
        ([(0, 8), (5, 8), (5, 4)], [], "from_step must ascend"),
        ([(0, 8), (5, 6)], [], "data.lanes: 4 does not divide the global batch 6"),
        ([(0, 8)], [(5, 5)], r"data.skip_steps: \[5, 5\] is no window"),
        ([(0, 8)], [(-1, 5)], r"data.skip_steps: \[-1, 5\] is no window"),
    ],
)
def test_what_cannot_be_is_refused(phases, skip, message):
    with pytest.raises(ConfigError, match=message):
        Timeline([Phase(start, batch, (1,)) for start, batch in phases], lanes=4, skip_steps=skip)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=6))
def test_one_more_window_takes_out_what_its_steps_had_and_nothing_comes_back(windows):
    """However windows are nested: the order of the data is the old one without the steps of the new window."""

    def data(windows):
        timeline = Timeline([Phase(0, LANES, (1,))], lanes=LANES, skip_steps=windows)
        return [timeline.place(step).turn for step in range(200)]

    known: tuple[tuple[int, int], ...] = ()
    for first, length in windows:
        before = data(known)
        known = with_window(known, first, first + length)
        after = data(known)
        assert after[: 200 - length] == before[:first] + before[first + length :]
