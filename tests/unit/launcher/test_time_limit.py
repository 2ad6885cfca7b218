"""SLURM's time limits as sbatch reads them, and limits and graces in which a save does not fit."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import ConfigError
from dstrain.launcher.time_limit import (
    SIGNAL_LEAD_S,
    check_grace,
    check_time_limit,
    longest_save_s,
    parse_time_limit,
    signal_option,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800), ("30:15", 1815), ("1:30:15", 5415), ("2-0", 172800), ("1-2:30", 95400), ("1-02:03:04", 93784),
        ("UNLIMITED", math.inf), ("infinite", math.inf),
    ],
)  # fmt: skip
def test_every_form_of_the_sbatch_manual_is_read(text: str, seconds: float) -> None:
    assert parse_time_limit(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0:0", "1h", "-5", "1:2:3:4", "1-", "1 ", "1;id", "１２", "1\n"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--time"):
        parse_time_limit(text)


@given(st.integers(0, 400), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_days_hours_minutes_and_seconds_add_up(days: int, hours: int, minutes: int, seconds: int) -> None:
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total:
        assert parse_time_limit(f"{days}-{hours}:{minutes}:{seconds}") == total


def test_the_longest_of_the_latest_saves_counts() -> None:
    events = [{"event": "saved", "seconds": 900.0}] + [{"event": "saved", "seconds": float(n)} for n in range(20)]
    assert longest_save_s([*events, {"event": "step", "seconds": 5000.0}, {"event": "saved", "seconds": None}]) == 19.0
    assert longest_save_s([]) == 0.0


def test_a_limit_that_would_be_spent_on_leaving_is_refused_with_one_that_would_not() -> None:
    check_time_limit("2", margin_s=60, save_s=30)
    with pytest.raises(ConfigError, match=r"--time 1 \(60 s\): .*60 s.*at least --time 2"):
        check_time_limit("1", margin_s=60, save_s=0)
    with pytest.raises(ConfigError, match=r"a save \(240 s, measured.*at least --time 10"):
        check_time_limit("0:300", margin_s=60, save_s=240)
    check_time_limit("10", margin_s=60, save_s=240)
    check_time_limit("UNLIMITED", margin_s=60, save_s=240)


def test_a_grace_shorter_than_the_runs_saves_is_refused() -> None:
    check_grace(120, save_s=120)
    with pytest.raises(ConfigError, match=r"--grace 120: saves of this run take up to 200 s.*--grace 300"):
        check_grace(120, save_s=200)


def test_a_short_job_is_not_signalled_at_its_start() -> None:
    assert signal_option("24:00:00") is None
    assert signal_option("UNLIMITED") is None
    assert signal_option("8") == "--signal=USR1@120"
    assert signal_option("20") is None
    assert 4 * SIGNAL_LEAD_S == parse_time_limit("20")
