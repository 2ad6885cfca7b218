import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.health.heartbeat import Beat, Ended, Phase
from dstrain.health.phase_budgets import STEPS_TO_LEARN_FROM, ObservedTime
from dstrain.health.watchdog import WatchdogConfig

BUDGETS = WatchdogConfig().budgets()
STEPS = st.lists(st.floats(0.001, 1000), min_size=STEPS_TO_LEARN_FROM, max_size=64)


def beat(phase, *, longest=0.0, recent=(), of=None):
    return Beat(
        counter=2, phase=phase, step=9, stamp_ns=0, ended=Ended.RUNNING,
        longest_s=tuple(longest if p is (of or phase) else 0.0 for p in Phase), recent_steps_s=tuple(recent),
    )  # fmt: skip


def test_a_step_gets_five_times_its_median_and_thirty_seconds_at_least():
    assert BUDGETS.allowance_s(beat(Phase.STEP, recent=[1, 2, 3])) == 30.0
    assert BUDGETS.allowance_s(beat(Phase.STEP, recent=[10, 20, 300])) == 100.0


def test_the_first_step_alone_has_the_allowance_for_compiling():
    assert BUDGETS.allowance_s(beat(Phase.FIRST_STEP)) == 1800.0
    for known in range(5):
        assert BUDGETS.allowance_s(beat(Phase.STEP, recent=[0.1] * known)) == 30.0


@pytest.mark.parametrize(
    ("recent", "allowed"), [((), 600.0), ((8.0,), 600.0), ((8.0, 130.0), 650.0), ((8.0, 8.0, 9.0), 40.0)]
)
def test_until_three_steps_are_known_the_longest_one_with_the_first_stands_for_the_median(recent, allowed):
    assert BUDGETS.allowance_s(beat(Phase.STEP, longest=120.0, of=Phase.FIRST_STEP, recent=recent)) == allowed


@given(STEPS)
def test_no_step_as_long_as_usual_is_ever_a_hang(recent):
    allowed = BUDGETS.allowance_s(beat(Phase.STEP, recent=recent))
    assert allowed >= 30.0
    assert sum(s > allowed for s in recent) <= len(recent) / 2  # a hang would be an outlier even among these


@given(STEPS, st.floats(1.0, 100.0))
def test_one_outlier_does_not_move_the_allowance_beyond_the_other_steps(recent, outlier):
    with_it = BUDGETS.allowance_s(beat(Phase.STEP, recent=[*recent, *recent, outlier * 1e6]))
    assert with_it <= max(30.0, 5 * max(recent))


@pytest.mark.parametrize("phase", [p for p in Phase if p is not Phase.STEP])
def test_any_other_phase_has_its_own_setting_and_learns_from_its_longest_stay(phase):
    name = f"{phase.value}_s"
    changed = dataclasses.replace(BUDGETS, **{name: 7.0})
    assert changed.allowance_s(beat(phase)) == 7.0
    assert changed.allowance_s(beat(phase, longest=100.0)) == 500.0
    assert BUDGETS.allowance_s(beat(phase)) == getattr(WatchdogConfig(), name)


def test_time_without_progress_adds_up_and_progress_ends_it():
    time = ObservedTime(longest_look_s=1.0)
    time.look(counter=2, stamp_s=100.0, now_s=100.0)
    assert [time.look(counter=2, stamp_s=100.0, now_s=100.0 + n / 2) for n in (1, 2, 3)] == [0.5, 1.0, 1.5]
    assert time.look(counter=4, stamp_s=101.6, now_s=102.0) == pytest.approx(0.4)


def test_a_pause_of_the_whole_machine_is_no_hang():
    time = ObservedTime(longest_look_s=1.0)
    time.look(counter=2, stamp_s=0.0, now_s=0.0)
    assert time.look(counter=2, stamp_s=0.0, now_s=3600.0) == 1.0


def test_paused_time_is_forgiven_when_asked_and_counting_goes_on_after_it():
    time = ObservedTime(longest_look_s=10.0)
    time.look(counter=2, stamp_s=0.0, now_s=0.0)
    assert time.look(counter=2, stamp_s=0.0, now_s=1.0) == 1.0
    assert time.look(counter=2, stamp_s=0.0, now_s=5.0, forgive=True) == 1.0
    assert time.look(counter=2, stamp_s=0.0, now_s=7.0) == 3.0


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 100)), max_size=50))
def test_counted_time_is_never_more_than_the_true_time_since_progress(looks):
    time, now, stamp, counter = ObservedTime(longest_look_s=2.0), 50.0, 50.0, 2
    for progress, passed in looks:
        now += passed
        if progress:
            counter, stamp = counter + 2, now
        assert 0.0 <= time.look(counter=counter, stamp_s=stamp, now_s=now) <= now - stamp + 1e-6
