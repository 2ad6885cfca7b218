import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.monitor.goodput import BUCKETS, MEANINGS, Attempt, account


def life(number, started_at, elapsed_s, *, seconds=None, **more):
    return Attempt(number=number, started_at=started_at, elapsed_s=elapsed_s, seconds=seconds or {}, **more)


def test_every_bucket_is_explained():
    assert set(MEANINGS) == set(BUCKETS)


def test_one_attempt_is_its_own_buckets():
    goodput = account(
        [life(1, 1000.0, 100.0, seconds={"start_up": 10.0, "productive": 85.0, "data_wait": 5.0}, step=9)]
    )
    assert goodput.wall_s == 100.0
    assert goodput.ratio == 0.85
    assert (goodput.attempts, goodput.step, goodput.replayed_steps) == (1, 9, 0)


def test_no_attempt_is_no_time_and_no_ratio():
    assert (account([]).wall_s, account([]).ratio) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("outcome", "bucket"),
    [("saved", "queue"), ("failed", "down"), ("killed", "down"), ("hang", "down"), (None, "down")],
)
def test_the_time_between_attempts_is_named_by_how_the_first_ended(outcome, bucket):
    goodput = account([life(1, 0.0, 100.0, seconds={"productive": 100.0}, outcome=outcome), life(2, 130.0, 0.0)])
    assert goodput.seconds[bucket] == 30.0
    assert goodput.wall_s == 130.0


def test_a_complete_run_that_is_extended_a_week_later_was_not_down():
    done = life(1, 0.0, 100.0, seconds={"productive": 100.0}, outcome="complete")
    more = life(2, 604_800.0, 50.0, seconds={"productive": 50.0}, outcome="complete")
    assert account([done, more]).ratio == 1.0


def test_a_hang_counts_from_the_last_progress_to_the_end_that_was_seen():
    hung = life(1, 0.0, 60.0, seconds={"productive": 50.0}, step=5, outcome="hang", ended_s=170.0)
    goodput = account([hung, life(2, 200.0, 0.0)])
    assert goodput.seconds["hang"] == 120.0
    assert goodput.seconds["down"] == 30.0
    assert goodput.wall_s == 200.0


def test_silence_before_the_first_step_is_start_up_and_later_it_is_other():
    assert account([life(1, 0.0, 60.0)]).seconds["start_up"] == 60.0
    assert account([life(1, 0.0, 60.0, step=3)]).seconds["other"] == 60.0
    assert account([life(1, 0.0, 60.0, step=3, resumed_step=3)]).seconds["start_up"] == 60.0


def test_the_uptime_of_one_machine_wins_over_a_wall_clock_that_jumped():
    first = life(1, 1_000_000.0, 100.0, seconds={"productive": 100.0}, boot="a", started_uptime_s=500.0)
    jumped = life(2, 5.0, 10.0, boot="a", started_uptime_s=620.0)
    goodput = account([first, jumped])
    assert goodput.seconds["down"] == 20.0
    assert goodput.wall_s == 130.0


def test_a_wall_clock_that_jumped_back_on_another_machine_takes_nothing_away():
    first = life(1, 1_000_000.0, 100.0, seconds={"productive": 100.0}, boot="a", started_uptime_s=500.0)
    goodput = account([first, life(2, 5.0, 10.0, boot="b", started_uptime_s=20.0)])
    assert goodput.seconds["down"] == 0.0
    assert goodput.wall_s == 110.0


def test_the_table_shows_shares_of_what_is_not_empty_largest_first():
    goodput = account(
        [
            life(1, 0.0, 3600.0, seconds={"productive": 3000.0, "start_up": 600.0}, step=10, outcome="saved"),
            life(2, 3700.0, 300.0, seconds={"replayed": 300.0}, step=12, replayed_steps=2, outcome="complete"),
        ]
    )
    lines = goodput.table().splitlines()
    assert lines[0] == "goodput 75.0 % of 1:06:40 in 2 attempts, 2 steps done again"
    assert [line.split()[0] for line in lines[1:]] == ["productive", "start_up", "replayed", "queue"]
    assert "0:50:00" in lines[1]
    assert "75.0 %" in lines[1]


INSIDE = [bucket for bucket in BUCKETS if bucket not in ("queue", "down")]
finite = st.floats(-1e9, 1e9)


@given(
    st.lists(
        st.builds(
            Attempt,
            number=st.integers(1, 50),
            started_at=finite,
            elapsed_s=st.floats(0, 1e6),
            seconds=st.dictionaries(st.sampled_from([*INSIDE, "unknown"]), st.floats(-1e3, 1e6)),
            step=st.integers(0, 100),
            outcome=st.sampled_from([None, "complete", "saved", "failed", "hang", "killed"]),
            ended_s=st.none() | st.floats(0, 1e6),
            boot=st.sampled_from(["", "a", "b"]),
            started_uptime_s=st.floats(0, 1e9),
        ),
        max_size=6,
    )
)
def test_whatever_the_records_say_no_bucket_is_negative_and_the_attempts_are_all_in(attempts):
    goodput = account(attempts)
    assert all(seconds >= 0 and math.isfinite(seconds) for seconds in goodput.seconds.values())
    inside = sum(attempt.lifetime_s for attempt in attempts)
    between = goodput.seconds["queue"] + goodput.seconds["down"]
    assert goodput.wall_s == pytest.approx(inside + between, rel=1e-9, abs=1e-6)
    assert account(random.Random(0).sample(attempts, len(attempts))).attempts == goodput.attempts
